# SPDX-License-Identifier: Apache-2.0
"""The body of `trl-diffusion-opd eval`: from options or a recipe to the tables of an evaluation."""

from ..evaluation.benchmark.arguments import EvaluationArguments
from .parser import BAD_INPUT, one_line_errors
from .recipe import parse_recipe


DESCRIPTION = (
    "Draws the prompts of benchmarks with a base and LoRAs on it, scores the images, and writes tables, a dataset and "
    "pages with the images. Run again, it goes on where it stopped."
)
EPILOG = "`accelerate launch -m trl_diffusion_opd eval ...` shares the work among processes."


def main(argv: list[str], prog: str | None = None) -> None:
    """
    Evaluates what the options or a recipe describe. Bad input ends with exit code 2.

    Args:
        argv (`list[str]`):
            The arguments.
        prog (`str`, *optional*):
            Name of the command for `--help`.
    """
    with one_line_errors(*BAD_INPUT, TypeError):
        arguments, recipe = parse_recipe(
            argv,
            (EvaluationArguments,),
            usage="%(prog)s --model BASE [--config RECIPE] [--SETTING VALUE ...]",
            description=DESCRIPTION,
            prog=prog,
            epilog=EPILOG,
        )
    with one_line_errors(*BAD_INPUT):
        from accelerate import PartialState

        from ..evaluation.benchmark.run import evaluate

        evaluate(arguments.located(recipe))
    PartialState().destroy_process_group()  # or a process may abort while it exits, its communication still running
