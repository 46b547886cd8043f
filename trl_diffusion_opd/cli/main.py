# SPDX-License-Identifier: Apache-2.0
"""The command line, `trl-diffusion-opd COMMAND`. What a command needs is imported when it runs: `--help` is fast."""

import argparse
import re
import sys
from pathlib import Path

from .. import __version__
from .commands import ALIASES, COMMANDS, EVALUATION, TOKEN, TRAININGS
from .launch import LAUNCHING, launch, split_launch_options
from .parser import BAD_INPUT, PROG, Parser, fail, one_line_errors, silence_imports


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
    if argv and argv[0] in (*TRAININGS, *ALIASES):
        train(argv[1:], argv[0], prog=f"{PROG} {argv[0]}")
    elif argv and argv[0] in EVALUATION:
        evaluate(argv[1:], prog=f"{PROG} {argv[0]}")
    else:
        with one_line_errors(*BAD_INPUT):
            _run_command(argv)


def _run_command(argv: list[str]) -> None:
    parser = Parser(
        prog=PROG, description="Several LoRA teachers into one LoRA, and what comes after.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, title=f"commands (`{PROG} COMMAND --help` tells more)"
    )
    for name, text in TRAININGS.items():
        subparsers.add_parser(name, help=text, aliases=[alias for alias in ALIASES if ALIASES[alias] == name])
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
    # Options may also be written with hyphens, as those of `hf` and of the trainings.
    argv = [re.sub(r"^--[\w-]+", lambda match: "--" + match[0][2:].replace("-", "_"), part) for part in argv]
    arguments = vars(parser.parse_args(argv))
    command = COMMANDS[arguments.pop("command")]
    silence_imports()
    command.run(**arguments)


def train(
    argv: list[str], method: str = "opd", *, default_recipe: Path | None = None, prog: str | None = None
) -> None:
    """
    Trains from a recipe: `trl-diffusion-opd opd` and `examples/train_opd.py`, and those of the other methods.

    Args:
        argv (`list[str]`):
            The arguments.
        method (`str`, *optional*, defaults to `"opd"`):
            One of `TRAININGS` or `ALIASES`.
        default_recipe (`Path`, *optional*):
            Recipe to use if there is no `--config`.
        prog (`str`, *optional*):
            Name of the command for `--help`, by default that of the running script.
    """
    method = ALIASES.get(method, method)
    launch_options, argv = split_launch_options(argv, method)
    if default_recipe is not None and not any(part.partition("=")[0] == "--config" for part in argv):
        argv = ["--config", str(default_recipe), *argv]
    if launch_options:
        return launch(launch_options, method, argv)
    silence_imports()
    from .train import main

    main(argv, method=method, prog=prog, epilog=LAUNCHING)


def evaluate(argv: list[str], *, prog: str | None = None) -> None:
    """Evaluates LoRAs on benchmarks: `trl-diffusion-opd eval`."""
    silence_imports()
    from .evaluate import main

    main(argv, prog=prog)
