# SPDX-License-Identifier: Apache-2.0
"""Recipes: what a run is made from, in a YAML file and on the command line."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

from trl import TrlParser

from ..rewards import REWARDS
from ..rewards.lookup import find_reward, load_function, locate, locate_function
from ..utils.settings import AT_LEAST_1, check_kinds, check_rules
from .parser import Parser
from .recipe_file import check_recipe, unique_pairs


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
            "help": "Prompts of each task: a list of prompts, a .txt or .jsonl file (a path or an address), a dataset "
            "of the Hub `owner/name[@revision]` with a prompt column, or a mapping with `path` and any of `name`, "
            "`split`, `revision`, `column`, `streaming`."
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
                    setattr(self, name, json.loads(value, object_pairs_hook=unique_pairs))
                except json.JSONDecodeError as error:
                    raise ValueError(
                        f"`{name}` must be a mapping (JSON on the command line), but is {value!r}."
                    ) from error
        check_kinds(self)
        check_rules(self, {"lora_r": AT_LEAST_1, "lora_alpha": AT_LEAST_1})
        for name in self.required:
            if getattr(self, name) in (None, "", {}, []):
                raise ValueError(
                    f"`{name}` is not set. Name it in a recipe (`--config recipe.yaml`) or as `--{name}`."
                )
        for name in self.by_task:
            self._check_mapping(name)
        if self.tasks is not None:
            if unknown := [task for task in self.tasks if task not in self.datasets]:
                raise ValueError(f"`tasks` names {unknown}, but `datasets` has prompts for {list(self.datasets)}.")
            for name in self.by_task:
                if isinstance(value := getattr(self, name), dict):
                    setattr(self, name, {task: value[task] for task in value if task in self.tasks})

    def _check_mapping(self, name: str) -> None:
        value = getattr(self, name)
        if name == "teachers" and isinstance(value, list):  # each with its `task`
            return
        if value is not None and not isinstance(value, Mapping):
            raise ValueError(f"`{name}` must be a mapping, with a name for each task, but is {value!r}.")
        if empty := [task for task in value or {} if value[task] is None]:
            raise ValueError(f"`{name}` has nothing for task {empty[0]!r}. Give it a value, or leave the task out.")

    def trainer_arguments(self, recipe: Path | None = None) -> dict[str, Any]:
        """
        Arguments of the trainer.

        Args:
            recipe (`Path`, *optional*):
                File of the recipe, whose folder local paths may be relative to.
        """

        def prompts(source: Any) -> Any:
            if isinstance(source, list):
                return source
            options = dict(source) if isinstance(source, Mapping) else {"path": source}
            if "path" in options:
                options["path"] = locate(options["path"], recipe)
            return {"split": self.dataset_split, **options}

        return {
            "model": locate(self.model_name_or_path, recipe),
            "train_dataset": {task: prompts(source) for task, source in self.datasets.items()},
            "eval_dataset": {task: prompts(source) for task, source in (self.eval_datasets or {}).items()} or None,
            "reward_funcs": {
                task: [find_reward(spec, recipe) for spec in (specs if isinstance(specs, list) else [specs])]
                for task, specs in (self.reward_funcs or {}).items()
            },
            "peft_config": self.peft_config(),
            "adapter": locate(self.adapter, recipe),
        }

    def peft_config(self) -> dict[str, Any] | None:
        """The fields in which the student's LoRA differs from the default; `None` to take that of the adapter."""
        settings = {"r": self.lora_r, "lora_alpha": self.lora_alpha, "target_modules": self.lora_target_modules}
        settings = {name: value for name, value in settings.items() if value is not None}
        return settings if settings or self.adapter is None else None


@dataclass
class OPDScriptArguments(ScriptArguments):
    """What is distilled into what."""

    required: ClassVar = ("model_name_or_path", "teachers", "datasets")
    by_task: ClassVar = ("teachers", "datasets", "eval_datasets", "reward_funcs")

    teachers: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Teacher of each task: a Hub id `owner/repo[/sub/folder][@revision]`, a local path, or a mapping "
            "with `name_or_path`, `subfolder`, `revision`, `weight_name`, `base`, `guidance_scale`."
        },
    )
    student_prompt: str | None = field(
        default=None,
        metadata={
            "help": "What the student is asked where its teacher is asked the prompt: a column of the prompts, or a "
            "function `f(row, seed)`, as `file.py:function` or `package.module:function`."
        },
    )

    def trainer_arguments(self, recipe: Path | None = None) -> dict[str, Any]:
        def found(teacher: Any) -> Any:
            if isinstance(teacher, dict) and "name_or_path" in teacher:
                places = {name: locate(teacher[name], recipe) for name in ("name_or_path", "base") if name in teacher}
                return {**teacher, **places}
            return locate(teacher, recipe)

        teachers = self.teachers
        teachers = (
            {task: found(teacher) for task, teacher in teachers.items()}
            if isinstance(teachers, dict)
            else [found(teacher) for teacher in teachers]
        )
        asked = self.student_prompt
        if asked is not None and ":" in asked:
            asked = load_function(locate_function(asked, recipe))
        return {"teachers": teachers, "student_prompt": asked, **super().trainer_arguments(recipe)}


@dataclass
class RLScriptArguments(ScriptArguments):
    """What is rewarded."""

    required: ClassVar = ("model_name_or_path", "datasets", "reward_funcs")


class _RecipeParser(Parser, TrlParser):
    """[`~trl.TrlParser`], with errors of one line, and with one value for a list of one."""

    def set_defaults_with_config(self, **kwargs) -> list[str]:
        for action in self._actions:
            value = kwargs.get(action.dest)
            if action.nargs == "+" and value is not None and not isinstance(value, (list, Mapping)):
                kwargs[action.dest] = [value]  # or argparse would take a word for a list of letters
        return super().set_defaults_with_config(**kwargs)


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
    switches = {name for kind in kinds for name, hint in get_type_hints(kind).items() if hint == bool | None}
    for action in parser._actions:
        if action.dest in switches and action.nargs is None:  # `--disable_tqdm` alone is true, as of other switches
            action.nargs, action.const = "?", True
    # Without this, the verbosity that hides the noise of imports would hide the progress bars too.
    parser.set_defaults(disable_tqdm=False)
    argv = [part for a in argv for part in (a.split("=", 1) if a.startswith("--config=") else [a])]
    recipe = None
    if "--config" in argv:
        if argv.count("--config") > 1 or argv[-1] == "--config":
            raise ValueError("`--config` takes one recipe. Give it once, with its path.")
        recipe = Path(argv[argv.index("--config") + 1])
        if not recipe.is_file():
            raise ValueError(f"There is no recipe {str(recipe)!r}. Check the path after `--config`.")
        check_recipe(recipe)
    *parsed, keys, options = parser.parse_args_and_config(
        argv, return_remaining_strings=True, separate_remaining_strings=True
    )
    if keys:
        raise ValueError(f"{recipe}: unknown settings {_names(keys)}. `{parser.prog} --help` lists all.")
    if options:
        raise ValueError(f"Unknown options {_names(options)}. `{parser.prog} --help` lists all.")
    return *parsed[: len(kinds)], recipe


def _names(words: list[str]) -> str:
    """The names of options without their values, which may be secrets; all words if none is a name."""
    return " ".join(word.partition("=")[0] for word in words if word.startswith("-")) or " ".join(words)
