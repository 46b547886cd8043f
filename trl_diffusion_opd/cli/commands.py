# SPDX-License-Identifier: Apache-2.0
"""The commands of the command line: those that have recipes, and the others, one entry of `COMMANDS` each."""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..models.registry import DEFAULT_PIPELINE
from ..rewards import REWARDS


# The methods of `train.METHODS`, in a few words.
TRAININGS = {
    "opd": "distill teachers into one student, from a recipe",
    "grpo": "train a LoRA from rewards by GRPO-Guard or Flow-GRPO, from a recipe",
    "nft": "train a LoRA from rewards by DiffusionNFT, from a recipe",
}
ALIASES = {"train": "opd"}
# Its options are those of `EvaluationArguments`.
EVALUATION = {"eval": "draw benchmarks with LoRAs and score the images"}
TOKEN = (
    "The token is the one of `hf auth login` or of the environment variable HF_TOKEN, never an option: the history of "
    "the shell and the list of processes would show it."
)


@dataclass(frozen=True)
class Command:
    """
    A command of the command line.

    Args:
        help (`str`):
            A few words for the list of commands.
        description (`str`):
            What it does.
        add_arguments (`Callable`):
            Adds its arguments to a parser.
        run (`Callable`):
            Gets the arguments that were given by name. What is wrong with them it raises as `ValueError`, `OSError` or
            `ImportError`.
        epilog (`str`, *optional*):
            End of its help.
    """

    help: str
    description: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[..., None]
    epilog: str | None = None


def push(**arguments) -> None:
    from ..publishing.push import push_folder

    print(push_folder(**arguments))


def card(folder: str, repo_id: str | None = None, base_model: str | None = None, show: bool = False) -> None:
    from ..publishing.card import render_card
    from ..publishing.record import RunRecord

    record = RunRecord.load(folder)
    record.drop_missing(folder)
    results = Path(folder) / "results.json"
    if results.is_file():
        try:
            record.results = json.loads(results.read_text(encoding="utf-8"))
            scored = record.results["student"].keys()
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{str(results)!r} holds no results: {error}. Evaluate again, or remove it.") from error
        if unknown := sorted(scored - record.reward_names.keys()):
            raise ValueError(f"{str(results)!r} is not of this run, whose rewards are not of {unknown}. Remove it.")
    if repo_id is not None:
        record.repo_id, record.name = repo_id, repo_id.rpartition("/")[2]
    if base_model is not None:
        record.set_base(base_model)
    rendered = render_card(record)
    if show:
        print(rendered)
        return
    record.save(folder)
    rendered.save(Path(folder) / "README.md")
    print(Path(folder) / "README.md")


def convert(base: str | None = None, **arguments) -> None:
    from ..lora.convert import convert_lora
    from ..lora.names import TABLES

    if base is not None and base not in TABLES:
        from ..models.loading import check_pipeline

        base = check_pipeline(base, owner="--base")[1].pipeline_class.__name__
    print(convert_lora(**arguments, base=base))


def space(student: str, **arguments) -> None:
    if "teachers" in arguments:
        named = [teacher.partition("=") for teacher in arguments["teachers"]]
        if wrong := [name for name, separator, source in named if not (name and separator and source)]:
            raise ValueError(
                f"`--teachers` takes TASK=SOURCE, but got {wrong[0]!r}. Name the task, e.g. `ocr=owner/repo`."
            )
        arguments["teachers"] = {name: source for name, _, source in named}
    if "repo_id" in arguments:
        from ..publishing.space import deploy_space

        if "port" in arguments:
            raise ValueError("`--port` is for the app on this machine. Leave out `--port` or `--repo_id`.")
        print(deploy_space(student, **arguments))
    else:
        from ..publishing.space import run_space

        for name in ("private", "include_weights"):
            if name in arguments:
                raise ValueError(f"`--{name}` is for a Space on the Hub. Name it with `--repo_id owner/demo`.")
        run_space(student, **arguments)


def rewards(**arguments) -> None:
    from ..rewards.check import main

    main(**arguments)


def _push_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="`output_dir` of a run, finished or not, or a checkpoint")
    parser.add_argument("--repo_id", metavar="OWNER/NAME", help="where to; by default where the run was going to push")
    _base_model_argument(parser)
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", help="branch, created if needed; by default that of the run")
    parser.add_argument("--commit_message", metavar="TEXT", help="title of the commit")
    parser.add_argument(
        "--eval",
        dest="evaluation",
        metavar="RESULTS",
        help="folder of `eval` whose scores of this LoRA go on its card",
    )


def _card_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="`output_dir` of a run")
    parser.add_argument("--repo_id", metavar="OWNER/NAME", help="repository to name in it, and to push to by default")
    _base_model_argument(parser)
    parser.add_argument("--print", dest="show", action="store_true", help="print the card and change no file")


def _base_model_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base_model",
        metavar="OWNER/NAME[@REVISION]",
        help="the base on the Hub, for the card of a run that was made with a local folder",
    )


def _convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="SOURCE", help="local file or folder, or `owner/repo[/sub/folder][@revision]` on the Hub"
    )
    parser.add_argument("destination", metavar="DESTINATION", help="folder to write into, new or empty")
    parser.add_argument(
        "--to",
        choices=("diffusers", "peft", "comfyui"),
        help="format to write; by default diffusers or PEFT, whichever SOURCE is not",
    )
    parser.add_argument(
        "--base",
        metavar="PIPELINE",
        help=f"folder or Hub id of the base, or the class of its pipeline (such as {DEFAULT_PIPELINE}): to read files of kohya, "
        "ComfyUI and ai-toolkit, and to write --to comfyui under the names of kohya's scripts",
    )
    parser.add_argument(
        "--weight_name",
        metavar="FILE",
        help="file inside SOURCE; by default adapter_model.safetensors or pytorch_lora_weights.safetensors",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="write into a folder that holds files; replaces those of the same names",
    )


def _space_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("student", metavar="STUDENT", help="repository of a student, or the local folder of a run")
    parser.add_argument("--repo_id", metavar="OWNER/NAME", help="Space to create or update; without it, run locally")
    parser.add_argument("--base", help="base model; by default the one that the run's record names")
    parser.add_argument("--title", help="title of the app")
    parser.add_argument(
        "--teachers",
        nargs="*",
        metavar="TASK=SOURCE",
        help="LoRA teachers to show, local or of the Hub, or none; by default those that the record names on the Hub",
    )
    parser.add_argument("--private", action="store_true", help="make a new Space private")
    parser.add_argument(
        "--include_weights",
        action="store_true",
        help="upload what is on this machine of base, student and teachers into the Space, up to 200 MB",
    )
    parser.add_argument("--port", type=int, help="port of the app on this machine")


def _rewards_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(REWARDS)}; by default all")
    parser.add_argument(
        "--check", action="store_true", help="download the models and compare their scores with known ones"
    )
    parser.add_argument("--device", help="where the models run, by default the GPU if there is one")


COMMANDS = {
    "push": Command(
        "push the folder of a run to the Hub",
        "Pushes the LoRA of a run with its model card and images, and prints the address of the commit.",
        _push_arguments,
        push,
        TOKEN,
    ),
    "card": Command(
        "write the model card of a run again",
        "Writes README.md from the record of a run (run.json) and its results (results.json), and prints its path.",
        _card_arguments,
        card,
    ),
    "convert": Command(
        "convert a LoRA between the formats of diffusers, PEFT, ComfyUI and kohya",
        "Converts a LoRA between the formats of diffusers, PEFT, ComfyUI and kohya, exactly, and prints the path of the "
        "file.",
        _convert_arguments,
        convert,
        f"For a private or gated SOURCE: {TOKEN[0].lower()}{TOKEN[1:]}",
    ),
    "space": Command(
        "try a student in the browser, here or as a Space",
        "Runs the demo of a student on this machine, or with --repo_id creates a Space of it and prints its address.",
        _space_arguments,
        space,
        TOKEN,
    ),
    "rewards": Command(
        "list the built-in rewards, or check them",
        "Lists the built-in rewards and what they need, or with --check compares their scores with known ones.",
        _rewards_arguments,
        rewards,
    ),
}
