# SPDX-License-Identifier: Apache-2.0
"""The command line, `trl-diffusion-opd COMMAND`. What a command needs is imported when it runs: `--help` is fast."""

import argparse
import os
import re
import sys
from pathlib import Path

from .. import __version__
from .commands import COMMANDS, EVALUATION, TOKEN, TRAININGS
from .launch import LAUNCHING, split_launch_options
from .parser import PROG, Parser, fail, silence_imports


def main(argv: list[str] | None = None) -> None:
    """
    Runs a command. Bad input ends with one line and exit code 2.

    Args:
        argv (`list[str]`, *optional*):
            Arguments instead of those of the process.
    """
    argv = sys.argv[1:] if argv is None else argv
    if any(part.partition("=")[0] == "--token" for part in argv):
        fail(f"`--token` is no option. {TOKEN}")  # and is not repeated here
    if argv and argv[0] in TRAININGS:
        return train(argv[1:], argv[0], prog=f"{PROG} {argv[0]}")
    if argv and argv[0] in EVALUATION:
        return evaluate(argv[1:], prog=f"{PROG} {argv[0]}")
    parser = Parser(
        prog=PROG, description="Several LoRA teachers into one LoRA, and what comes after.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, title=f"commands (`{PROG} COMMAND --help` tells more)"
    )
    for name, text in TRAININGS.items():
        subparsers.add_parser(name, help=text)
    for name, command in COMMANDS.items():
        # What is not given is not passed on, so that each default is written once.
        subparser = subparsers.add_parser(
            name,
            help=command.help,
            description=command.description,
            epilog=command.epilog,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
        )
        command.add_arguments(subparser)
    for name, text in EVALUATION.items():
        subparsers.add_parser(name, help=text)
    # Options may also be written with hyphens, as those of `hf` and of `train`.
    argv = [re.sub(r"^--[\w-]+", lambda match: "--" + match[0][2:].replace("-", "_"), part) for part in argv]
    arguments = vars(parser.parse_args(argv))
    command = COMMANDS[arguments.pop("command")]
    silence_imports()
    try:
        command.run(**arguments)
    except (ValueError, OSError, ImportError) as error:
        fail(error)


def train(
    argv: list[str], method: str = "train", *, default_recipe: Path | None = None, prog: str | None = None
) -> None:
    """
    Trains from a recipe: `trl-diffusion-opd train` and `examples/train_opd.py`, and those of the other methods.

    Args:
        argv (`list[str]`):
            The arguments.
        method (`str`, *optional*, defaults to `"train"`):
            One of `TRAININGS`.
        default_recipe (`Path`, *optional*):
            Recipe to use if there is no `--config`.
        prog (`str`, *optional*):
            Name of the command for `--help`, by default that of the running script.
    """
    launch_options, argv = split_launch_options(argv, method)
    if default_recipe is not None and not any(part.partition("=")[0] == "--config" for part in argv):
        argv = ["--config", str(default_recipe), *argv]
    if launch_options:
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", *launch_options]
        os.execv(sys.executable, [*launcher, "-m", "trl_diffusion_opd", method, *argv])
    silence_imports()
    from .train import main

    main(argv, method=method, prog=prog, epilog=LAUNCHING)


def evaluate(argv: list[str], *, prog: str | None = None) -> None:
    """Evaluates LoRAs on benchmarks: `trl-diffusion-opd eval`."""
    silence_imports()
    from .evaluate import main

    main(argv, prog=prog)
