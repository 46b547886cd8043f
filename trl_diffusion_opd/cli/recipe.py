# SPDX-License-Identifier: Apache-2.0
"""Recipes: what a run is made from, in a YAML file and on the command line."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import yaml
from trl import TrlParser

from ..rewards import REWARDS
from ..rewards.lookup import find_reward, locate
from .parser import Parser


if TYPE_CHECKING:
    from peft import LoraConfig


@dataclass
class ScriptArguments:
    """
    What is trained on what, for every method. Mappings are given in the recipe (`--config recipe.yaml`), or as JSON on
    the command line. Local paths are looked up from the current folder, then from the recipe's.
    """

    required: ClassVar = ("model_name_or_path", "datasets")
    by_task: ClassVar = ("datasets", "eval_datasets", "reward_funcs")

    model_name_or_path: str | None = field(default=None, metadata={"help": "Base pipeline: Hub id or local folder."})
    datasets: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Prompts of each task: a .txt or .jsonl file (a path or an address), a dataset of the Hub "
            "`owner/name[@revision]` with a prompt column, or a mapping with `path` and any of `name`, `split`, "
            "`revision`, `column`, `streaming`."
        },
    )
    eval_datasets: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Held-out prompts of each task, in the same form."}
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of datasets from the Hub."})
    reward_funcs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Reward (or list of them) of each task: the name of a built-in one "
            f"({', '.join(REWARDS)}), `package.module:function` or `path/to/file.py:function`. Distillation needs "
            "them for evaluation only."
        },
    )
    tasks: list[str] | None = field(
        default=None, metadata={"help": "Which of the recipe's tasks to train on. Defaults to all."}
    )
    adapter: str | None = field(
        default=None,
        metadata={
            "help": "LoRA to start from: a local path or a Hub id `owner/repo[/sub/folder][@revision]`. Its shape is "
            "the default of the other settings of the LoRA."
        },
    )
    lora_r: int | None = field(default=None, metadata={"help": "Rank of the student's LoRA. Defaults to 32."})
    lora_alpha: int | None = field(default=None, metadata={"help": "Alpha of the student's LoRA. Defaults to 64."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules that get a LoRA. Defaults to the eight attention projections."}
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Load and check everything, print the plan, and stop before training."}
    )
    compare: bool = field(
        default=False,
        metadata={
            "help": "Score base and student at the end, with teachers also these and their merge, and write "
            "results.json."
        },
    )

    def __post_init__(self):
        for name in self.by_task:
            value = getattr(self, name)
            if isinstance(value, str):
                try:
                    setattr(self, name, json.loads(value, object_pairs_hook=_unique_pairs))
                except json.JSONDecodeError as error:
                    raise ValueError(
                        f"`{name}` must be a mapping (JSON on the command line), but is {value!r}."
                    ) from error
        for name in self.required:
            if not getattr(self, name):
                raise ValueError(
                    f"`{name}` is not set. Name it in a recipe (`--config recipe.yaml`) or as `--{name}`."
                )
        if self.tasks is not None:
            if unknown := [task for task in self.tasks if task not in self.datasets]:
                raise ValueError(f"`tasks` names {unknown}, but `datasets` has prompts for {list(self.datasets)}.")
            for name in self.by_task:
                if isinstance(value := getattr(self, name), dict):
                    setattr(self, name, {task: value[task] for task in value if task in self.tasks})

    def trainer_arguments(self, recipe: Path | None = None) -> dict[str, Any]:
        """
        Arguments of the trainer.

        Args:
            recipe (`Path`, *optional*):
                File of the recipe, whose folder local paths may be relative to.
        """

        def prompts(sources: dict[str, Any] | None) -> dict[str, Any]:
            mappings = {task: s if isinstance(s, dict) else {"path": s} for task, s in (sources or {}).items()}
            return {
                task: {"split": self.dataset_split, **mapping, "path": locate(mapping.get("path"), recipe)}
                for task, mapping in mappings.items()
            }

        return {
            "model": locate(self.model_name_or_path, recipe),
            "train_dataset": prompts(self.datasets),
            "eval_dataset": prompts(self.eval_datasets) or None,
            "reward_funcs": {
                task: [find_reward(spec, recipe) for spec in (specs if isinstance(specs, list) else [specs])]
                for task, specs in (self.reward_funcs or {}).items()
            },
            "peft_config": self.peft_config(),
            "adapter": locate(self.adapter, recipe),
        }

    def peft_config(self) -> "LoraConfig | None":
        """The student's LoRA; `None` to take that of the adapter."""
        from ..models.loading import default_lora  # takes seconds, which `--help` does not need

        settings = {"r": self.lora_r, "lora_alpha": self.lora_alpha, "target_modules": self.lora_target_modules}
        settings = {name: value for name, value in settings.items() if value is not None}
        return default_lora(**settings) if settings or self.adapter is None else None


@dataclass
class OPDScriptArguments(ScriptArguments):
    """What is distilled into what."""

    required: ClassVar = ("model_name_or_path", "teachers", "datasets")
    by_task: ClassVar = ("teachers", "datasets", "eval_datasets", "reward_funcs")

    teachers: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Teacher of each task: a Hub id `owner/repo[/sub/folder][@revision]`, a local path, or a mapping "
            "with `name_or_path`, `subfolder`, `revision`, `weight_name`, `guidance_scale`."
        },
    )

    def trainer_arguments(self, recipe: Path | None = None) -> dict[str, Any]:
        def found(teacher: Any) -> Any:
            if isinstance(teacher, dict) and "name_or_path" in teacher:
                return {**teacher, "name_or_path": locate(teacher["name_or_path"], recipe)}
            return locate(teacher, recipe)

        teachers = self.teachers
        teachers = (
            {task: found(teacher) for task, teacher in teachers.items()}
            if isinstance(teachers, dict)
            else [found(teacher) for teacher in teachers]
        )
        return {"teachers": teachers, **super().trainer_arguments(recipe)}


@dataclass
class RLScriptArguments(ScriptArguments):
    """What is rewarded."""

    required: ClassVar = ("model_name_or_path", "datasets", "reward_funcs")


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

    with open(recipe, encoding="utf-8") as file:
        try:
            root = yaml.compose(file)
        except yaml.YAMLError as error:
            raise ValueError(f"{recipe} is no YAML: {error}") from error
    if root is not None:
        walk(root)


def _unique_pairs(pairs: list[tuple[str, Any]], where: str = "") -> dict[str, Any]:
    mapping = {}
    for key, value in pairs:
        if key in mapping:
            raise ValueError(f"{where}the key {key!r} is there twice. Keep one of them.")
        mapping[key] = value
    return mapping


class _RecipeParser(Parser, TrlParser):
    """[`~trl.TrlParser`], with errors of one line."""


def parse_recipe(
    argv: list[str],
    kinds: tuple[type, ...],
    *,
    usage: str = "%(prog)s --config RECIPE [--SETTING VALUE ...]",
    description: str | None = None,
    prog: str | None = None,
    epilog: str | None = None,
) -> tuple[Any, ...]:
    """
    Parses the command line of a training or an evaluation.

    Args:
        argv (`list[str]`):
            The arguments.
        kinds (`tuple[type, ...]`):
            Dataclasses of the settings, such as those of what is trained on what and of the trainer.
        usage (`str`, *optional*), description (`str`, *optional*), prog (`str`, *optional*), epilog (`str`, *optional*):
            Start of the text of `--help`, name of the command in it (by default that of the running script), its end.

    Returns:
        One of each kind, and the file that was given with `--config`.
    """
    parser = _RecipeParser(
        kinds,
        prog=prog,
        usage=usage,
        description=description,
        epilog=epilog,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="RECIPE", help="YAML file with any of these settings; options here win.")
    argv = [part for a in argv for part in (a.split("=", 1) if a.startswith("--config=") else [a])]
    recipe = None
    if "--config" in argv:
        if argv.count("--config") > 1 or argv[-1] == "--config":
            raise ValueError("`--config` takes one recipe. Give it once, with its path.")
        recipe = Path(argv[argv.index("--config") + 1])
        if not recipe.is_file():
            raise ValueError(f"There is no recipe {str(recipe)!r}. Check the path after `--config`.")
        check_unique_keys(recipe)
    *parsed, keys, options = parser.parse_args_and_config(
        argv, return_remaining_strings=True, separate_remaining_strings=True
    )
    if keys:
        raise ValueError(f"{recipe}: unknown settings {' '.join(keys)}. `{parser.prog} --help` lists all.")
    if options:
        raise ValueError(f"Unknown options {' '.join(options)}. `{parser.prog} --help` lists all.")
    return *parsed[: len(kinds)], recipe
