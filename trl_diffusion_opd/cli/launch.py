# SPDX-License-Identifier: Apache-2.0
"""Options of `accelerate launch` that the trainings take too."""

import argparse
import os
from pathlib import Path

from .parser import BAD_INPUT, PROG, Parser, fail, one_line_errors


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


def split_launch_options(argv: list[str], method: str) -> tuple[list[str], list[str]]:
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


def launch(options: list[str], method: str, argv: list[str]) -> None:
    """
    Has accelerate start the processes of a training, and waits for them.

    Args:
        options (`list[str]`):
            What [`split_launch_options`] found for `accelerate launch`.
        method (`str`):
            The command of the training.
        argv (`list[str]`):
            Its arguments.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser

    command = ["--quiet", *options, "-m", "trl_diffusion_opd", method, *argv]
    with one_line_errors(*BAD_INPUT):
        launch_command(launch_command_parser().parse_args(command))
