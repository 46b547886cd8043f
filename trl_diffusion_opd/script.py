# SPDX-License-Identifier: Apache-2.0
"""The body of `examples/train_opd.py`: from a recipe to a trained student."""

import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset

from .comparison import compare, format_table, save_results
from .config import DiffusionOPDConfig
from .data import load_prompts
from .loading import check_pipeline, default_lora
from .opd_trainer import DiffusionOPDTrainer
from .plan import describe_plan


@dataclass
class ScriptArguments:
    """
    What is trained on what. Mappings are given in the recipe (`--config recipe.yaml`), or as JSON on the command line.
    Local paths are looked up from the current folder, then from the recipe's.
    """

    model_name_or_path: str | None = field(default=None, metadata={"help": "Base pipeline: Hub id or local folder."})
    teachers: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Teacher of each task: a Hub id `owner/repo[/sub/folder][@revision]`, a local path, or a mapping "
            "with `name_or_path`, `subfolder`, `revision`, `weight_name`, `guidance_scale`."
        },
    )
    datasets: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Prompts of each task: a .txt or .jsonl file (a path or an address), a dataset of the Hub with a "
            "prompt column, or a mapping with `path` and, for the Hub, `name`, `split`, `column`."
        },
    )
    eval_datasets: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Held-out prompts of each task, in the same form."}
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of datasets from the Hub."})
    reward_funcs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Reward function (or list of them) of each task for evaluation, as `package.module:function` or "
            "`path/to/file.py:function`."
        },
    )
    lora_r: int = field(default=32, metadata={"help": "Rank of the student's LoRA."})
    lora_alpha: int = field(default=64, metadata={"help": "Alpha of the student's LoRA."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules that get a LoRA. Defaults to the eight attention projections."}
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Load and check everything, print the plan, and stop before training."}
    )
    compare: bool = field(
        default=False,
        metadata={"help": "Score base, teachers, their merge and the student at the end, and write results.json."},
    )

    def __post_init__(self):
        for name in ("teachers", "datasets", "eval_datasets", "reward_funcs"):
            value = getattr(self, name)
            if isinstance(value, str):
                try:
                    setattr(self, name, json.loads(value, object_pairs_hook=_unique_pairs))
                except json.JSONDecodeError as error:
                    raise ValueError(
                        f"`{name}` must be a mapping (JSON on the command line), but is {value!r}."
                    ) from error
        for name in ("model_name_or_path", "teachers", "datasets"):
            if not getattr(self, name):
                raise ValueError(
                    f"`{name}` is not set. Name it in a recipe (`--config recipe.yaml`) or as `--{name}`."
                )


def make_trainer(
    script_args: ScriptArguments, training_args: DiffusionOPDConfig, recipe: Path | None = None
) -> DiffusionOPDTrainer:
    """
    Builds the trainer that a recipe describes.

    Args:
        script_args ([`ScriptArguments`]), training_args ([`DiffusionOPDConfig`]):
            The recipe.
        recipe (`Path`, *optional*):
            Its file, whose folder local paths may be relative to.
    """

    def locate(value: Any) -> Any:
        if not isinstance(value, str) or recipe is None or Path(value).exists():
            return value
        found = (recipe.parent / value).resolve()
        return str(found) if found.exists() else value

    def locate_teacher(teacher: Any) -> Any:
        if isinstance(teacher, dict):
            return {key: locate(value) if key == "name_or_path" else value for key, value in teacher.items()}
        return locate(teacher)

    teachers = script_args.teachers
    teachers = (
        {task: locate_teacher(teacher) for task, teacher in teachers.items()}
        if isinstance(teachers, dict)
        else [locate_teacher(teacher) for teacher in teachers]
    )

    def load(sources: dict[str, Any] | None) -> dict[str, Dataset]:
        loaded = {}
        for task, source in (sources or {}).items():
            options = dict(source) if isinstance(source, dict) else {"path": source}
            column = options.pop("column", training_args.prompt_column)
            path = locate(options.pop("path"))
            data = load_prompts(path, column=column, **{"split": script_args.dataset_split, **options})
            renamed = column != training_args.prompt_column
            loaded[task] = data.rename_column(column, training_args.prompt_column) if renamed else data
        return loaded

    def load_function_at(spec: str) -> Callable:
        module, separator, name = spec.rpartition(":")
        return load_function(f"{locate(module)}{separator}{name}")

    model = locate(script_args.model_name_or_path)
    check_pipeline(model, training_args.model_init_kwargs)
    return DiffusionOPDTrainer(
        model=model,
        teachers=teachers,
        args=training_args,
        train_dataset=load(script_args.datasets),
        eval_dataset=load(script_args.eval_datasets) or None,
        reward_funcs={
            task: [load_function_at(spec) for spec in (specs if isinstance(specs, list) else [specs])]
            for task, specs in (script_args.reward_funcs or {}).items()
        },
        peft_config=default_lora(
            r=script_args.lora_r,
            lora_alpha=script_args.lora_alpha,
            **({"target_modules": script_args.lora_target_modules} if script_args.lora_target_modules else {}),
        ),
    )


def train(trainer: DiffusionOPDTrainer, script_args: ScriptArguments) -> None:
    """Trains the student and shows what came of it."""
    training_args, main = trainer.args, trainer.is_world_process_zero()
    resume = training_args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if str(resume).lower() == "true" else resume)
    # "Internal", or upstream would push here too, before there are results
    trainer.save_model(training_args.output_dir, _internal_call=True)
    trainer.create_model_card()
    output_dir = Path(training_args.output_dir)
    if script_args.compare:
        results = compare(trainer)
        if main:
            save_results(results, output_dir)
            print(f"\n{format_table(results)}\n")
    if main:
        print(f"images   {output_dir / 'images'}")
        if training_args.save_curves:
            print(f"curves   {output_dir / 'curves.png'}")
        print(f'the LoRA pipe.load_lora_weights("{output_dir}", weight_name="pytorch_lora_weights.safetensors")')
    if training_args.push_to_hub:
        trainer.push_to_hub()


def use_all_cores(device: torch.device) -> None:
    """Lets a process on the CPU use its share of the cores: `accelerate launch` leaves it one thread by default."""
    launched = any(name.startswith("ACCELERATE_") for name in os.environ)
    if device.type == "cpu" and launched and os.environ.get("OMP_NUM_THREADS") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def load_function(spec: str) -> Callable:
    """The function that `package.module:function` or `path/to/file.py:function` names."""
    module_name, separator, name = spec.rpartition(":")
    if not separator:
        raise ValueError(f"A function is named as `module:function` or `file.py:function`, but got {spec!r}.")
    if module_name.endswith(".py"):
        if not Path(module_name).is_file():
            raise ValueError(f"{spec!r}: there is no file {module_name!r}. Check its spelling.")
        loader = importlib.util.spec_from_file_location(Path(module_name).stem, module_name)
        module = importlib.util.module_from_spec(loader)
        loader.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise ValueError(f"{spec!r}: {error}. Install it, or name a file as `file.py:function`.") from error
    if not hasattr(module, name):
        raise ValueError(f"{spec!r}: the module has no {name!r}.")
    return getattr(module, name)


def check_unique_keys(recipe: Path) -> None:
    """Raises a `ValueError` if a mapping of a YAML file has a key twice, of which YAML would drop the first silently."""

    def walk(node: yaml.Node) -> None:
        if isinstance(node, yaml.MappingNode):
            _unique_pairs([(key.value, None) for key, _ in node.value], f"{recipe}: ")
            for _, value in node.value:
                walk(value)
        elif isinstance(node, yaml.SequenceNode):
            for value in node.value:
                walk(value)

    if (root := yaml.compose(recipe.read_text(encoding="utf-8"))) is not None:
        walk(root)


def _unique_pairs(pairs: list[tuple[str, Any]], where: str = "") -> dict[str, Any]:
    mapping = {}
    for key, value in pairs:
        if key in mapping:
            raise ValueError(f"{where}the key {key!r} is there twice. Keep one of them.")
        mapping[key] = value
    return mapping


def main(default_recipe: Path | None = None, argv: list[str] | None = None) -> None:
    """
    Parses the command line and trains. Bad input ends with one line and exit code 2.

    Args:
        default_recipe (`Path`, *optional*):
            Recipe to use if there is no `--config`.
        argv (`list[str]`, *optional*):
            Arguments instead of those of the process.
    """
    from trl import TrlParser

    argv = list(sys.argv[1:] if argv is None else argv)
    if default_recipe is not None and "--config" not in argv and not any(a.startswith("--config=") for a in argv):
        argv = ["--config", str(default_recipe), *argv]
    parser = TrlParser((ScriptArguments, DiffusionOPDConfig))
    try:
        recipe = _recipe_of(argv)
        script_args, training_args = parser.parse_args_and_config(argv)
        use_all_cores(training_args.device)
        training_args.push_to_hub &= not script_args.dry_run  # or constructing the trainer creates the repository
        trainer = make_trainer(script_args, training_args, recipe)
    except (ValueError, TypeError, OSError, ImportError) as error:
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        raise SystemExit(2) from None
    if trainer.is_world_process_zero():
        print(describe_plan(trainer), flush=True)
    if not script_args.dry_run:
        train(trainer, script_args)


def _recipe_of(argv: list[str]) -> Path | None:
    for argument, following in zip(argv, [*argv[1:], None], strict=True):
        if argument == "--config" or argument.startswith("--config="):
            recipe = Path(argument.partition("=")[2] or following or "")
            if not recipe.is_file():
                raise ValueError(f"There is no recipe {str(recipe)!r}. Check the path after `--config`.")
            check_unique_keys(recipe)
            return recipe
    return None
