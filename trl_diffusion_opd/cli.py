# SPDX-License-Identifier: Apache-2.0
"""The command line, `trl-diffusion-opd COMMAND`. What a command needs is imported when it runs: `--help` is fast."""

import argparse
import os
import re
import sys
import time
from pathlib import Path
from typing import NoReturn

from . import __version__
from .commands import COMMANDS, TOKEN, TRAININGS


PROG = "trl-diffusion-opd"
# After one process has failed, the launcher ends the others within this time.
SECONDS_TO_END_ALL = 3

# Options of `accelerate launch` that the trainings take too.
LAUNCH_OPTIONS = {
    "config_file": str,
    "num_processes": int,
    "num_machines": int,
    "machine_rank": int,
    "main_process_ip": str,
    "main_process_port": int,
    "gpu_ids": str,
}
LAUNCHING = (
    "Runs in this process, unless an option of `accelerate launch` is given: then accelerate starts the processes. "
    f"These are {', '.join(f'--{name}' for name in LAUNCH_OPTIONS)}, and --accelerate_config as another name of "
    "--config_file."
)


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message}. See `{self.prog} --help`.")


def fail(error: str | Exception, exit_code: int = 2) -> NoReturn:
    """
    Ends the process with `error: ...` in one line. Of several processes the first prints it; another one only if the
    first did not fail too, in which case the launcher ends it before.
    """
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        time.sleep(SECONDS_TO_END_ALL)
    sys.stderr.write(f"error{f' (process {rank})' if rank else ''}: {' '.join(str(error).split())}\n")
    raise SystemExit(exit_code)


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
    # Options may also be written with hyphens, as those of `hf` and of `train`.
    argv = [re.sub(r"^--[\w-]+", lambda match: "--" + match[0][2:].replace("-", "_"), part) for part in argv]
    arguments = vars(parser.parse_args(argv))
    command = COMMANDS[arguments.pop("command")]
    _silence_imports()
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
    launch_options, argv = _split_launch_options(argv, method)
    if default_recipe is not None and not any(part.partition("=")[0] == "--config" for part in argv):
        argv = ["--config", str(default_recipe), *argv]
    if launch_options:
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", *launch_options]
        os.execv(sys.executable, [*launcher, "-m", "trl_diffusion_opd", method, *argv])
    _silence_imports()
    from .script import main

    main(argv, method=method, prog=prog, epilog=LAUNCHING)


def _silence_imports() -> None:
    # Without torchvision transformers warns about image processors that are not used here, and the client of the Hub
    # has a line for each retry, before the error that says what to do.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")


def _split_launch_options(argv: list[str], method: str) -> tuple[list[str], list[str]]:
    """What is for `accelerate launch`, and what is for the training."""
    parser = Parser(prog=f"{PROG} {method}", add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for name, kind in LAUNCH_OPTIONS.items():
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", type=kind)
    parser.add_argument("--accelerate_config", "--accelerate-config", dest="config_file")
    options, rest = parser.parse_known_args(argv)
    if "config_file" in options and not Path(options.config_file).is_file():
        fail(f"There is no file {options.config_file!r}. Check the path of accelerate's configuration.")
    if vars(options) and "LOCAL_RANK" in os.environ:
        fail(f"accelerate has started this process: {', '.join(vars(options))} belong to `accelerate launch` itself.")
    return [part for name, value in vars(options).items() for part in (f"--{name}", str(value))], rest
