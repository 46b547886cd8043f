# SPDX-License-Identifier: Apache-2.0
"""What an evaluation is given, by the options of `trl-diffusion-opd eval`, by a recipe or from Python."""

import argparse
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ...rewards.lookup import locate, locate_function
from ...utils.settings import AT_LEAST_1, check_kinds, check_rules
from .options import (
    parse_guidance,
    parse_loras,
    parse_prompts,
    parse_reward_options,
    parse_rewards,
    parse_words,
)
from .suites import BENCHMARK_FILE, BENCHMARKS, GENERATED


# The paper's Table 1.
DEFAULT_BENCHMARKS = ("geneval", "ocr", "drawbench")
_RULES = {
    **dict.fromkeys(("num_images", "resolution", "num_inference_steps", "batch_size"), AT_LEAST_1),
    "max_sequence_length": AT_LEAST_1,
}


class _Extend(argparse.Action):
    """An option that comes twice is one longer option. What is given replaces the default, which may be a recipe's."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, values if before is self.default else [*before, *values])


def _words(text: str, metavar: str, default: Any = None, **metadata: Any) -> Any:
    metadata |= {"help": text, "metavar": metavar, "nargs": "+", "action": _Extend}
    return field(default=default, metadata=metadata)


@dataclass
class EvaluationArguments:
    """
    What is drawn and scored. The fields that take words on the command line take mappings in a recipe and from Python:
    `loras={"student": "folder"}` for `--lora student=folder`. Each is a mapping afterwards, whichever it was.

    Raises:
        `ValueError`: a value that makes no sense.
    """

    model: str = field(metadata={"metavar": "BASE", "help": "Base: Hub repository or local folder."})
    loras: dict[str, Any] | str | list[str] | None = _words(
        "LoRAs: Hub repositories `owner/repo[/sub/folder][@revision]`, folders or files, in the format of diffusers or "
        "PEFT, each with a name.",
        "[NAME=]SOURCE",
        aliases="--lora",
    )
    base: bool = field(default=True, metadata={"help": "Evaluate the base itself; --no_base leaves it out."})
    merge: list[str] | str | None = _words(
        "Evaluate merges of the LoRAs too: sum, mean, ties, dare; sum=a,b of two of them.", "HOW[=NAME,NAME]"
    )
    benchmarks: list[str] | str | tuple[str, ...] | None = _words(
        f"Of {', '.join(BENCHMARKS)}, files of benchmarks (path/to/benchmarks.yaml, or path/to/benchmarks.yaml:NAME "
        "for one of them), or a name of your own that has --prompts and --rewards. The default is the paper's Table 1.",
        "NAME",
        DEFAULT_BENCHMARKS,
    )
    prompts: dict[str, Any] | str | list[str] | None = _words(
        "Prompts of a benchmark instead of the usual ones: a file, an address or a Hub dataset; "
        f"geneval={GENERATED} makes those of GenEval.",
        "NAME=SOURCE",
    )
    rewards: dict[str | None, Any] | str | list[str] | None = _words(
        "Rewards instead of the usual ones, of one benchmark or of all: names of built-in rewards, or "
        "file.py:function.",
        "[NAME=]REWARD",
    )
    reward_options: dict[str, Any] | str | list[str] | None = _words(
        "Options of built-in rewards, such as unifiedreward.base_url=http://localhost:8000/v1.",
        "REWARD.OPTION=VALUE",
    )
    num_images: int | None = field(
        default=None,
        metadata={
            "help": "Images of each model and benchmark; by default one of each prompt. Fewer are spread over the "
            "prompts, more start over with other noise."
        },
    )
    output_dir: str = field(
        default="evaluation",
        metadata={
            "metavar": "FOLDER",
            "help": "Where everything is kept. What is there already is not made again; what was made with other "
            "settings is refused.",
        },
    )
    num_inference_steps: int | None = field(
        default=None,
        metadata={
            "help": "Steps of the first-order ODE; by default those that the base is made for, as 40 for Stable "
            "Diffusion 3.5 and 8 for Z-Image-Turbo."
        },
    )
    guidance_scale: dict[str | None, Any] | str | list[Any] | float | None = _words(
        "Classifier-free guidance of all models, or of one; base=1 base=4.5 are two rows of the table.",
        "[NAME=]SCALE",
    )
    resolution: int | None = field(
        default=None,
        metadata={"help": "Height and width; by default 512, or the base's own size if that is smaller."},
    )
    max_sequence_length: int | None = field(
        default=None,
        metadata={"help": "Length of a prompt in tokens; by default what the base is made for."},
    )
    seed: int = field(default=42, metadata={"help": "Seed of all noise."})
    dtype: Literal["float32", "bfloat16", "float16"] | None = field(
        default=None, metadata={"help": "Precision of the base; by default bfloat16, on the CPU float32."}
    )
    batch_size: int = field(default=8, metadata={"help": "Images drawn at once by each process."})
    use_cpu: bool = field(default=False, metadata={"help": "Leave GPUs alone."})

    def __post_init__(self):
        for name in ("model", "output_dir"):
            if not isinstance(value := getattr(self, name), (str, Path)) or not str(value):
                raise ValueError(f"`{name}` must be text, but is {value!r}.")
            setattr(self, name, str(value))
        check_kinds(self)
        check_rules(self, _RULES)
        if self.dtype not in (None, "float32", "bfloat16", "float16"):
            raise ValueError(f"`dtype` must be float32, bfloat16 or float16, but is {self.dtype!r}.")
        self.loras = parse_loras(self.loras)
        self.merge = parse_words("merge", self.merge)
        self.benchmarks = parse_words("benchmarks", self.benchmarks) or list(DEFAULT_BENCHMARKS)
        self.prompts = parse_prompts(self.prompts)
        self.rewards = parse_rewards(self.rewards)
        self.reward_options = parse_reward_options(self.reward_options)
        self.guidance_scale = parse_guidance(self.guidance_scale)

    def located(self, recipe: Path | None) -> "EvaluationArguments":
        """The same with local paths as seen from the current folder, or else from the recipe's."""
        if recipe is None:
            return self
        return replace(
            self,
            model=locate(self.model, recipe),
            loras={name: locate(source, recipe) for name, source in self.loras.items()},
            benchmarks=[
                locate_function(locate(word, recipe), recipe) if BENCHMARK_FILE.fullmatch(word) else word
                for word in self.benchmarks
            ],
            prompts={name: locate(source, recipe) for name, source in self.prompts.items()},
            rewards={name: [locate_function(spec, recipe) for spec in own] for name, own in self.rewards.items()},
        )
