# SPDX-License-Identifier: Apache-2.0
"""`trl-diffusion-opd eval`: several LoRAs of one base drawn and judged on the same prompts, with the paper's table."""

import argparse
from typing import Any

from .suites import BENCHMARKS, GENERATED, SHAPES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `trl-diffusion-opd eval`. Their defaults are those of [`~benchmark.run.evaluate`]."""
    names = ", ".join([*BENCHMARKS, SHAPES])
    parser.add_argument("--model", required=True, metavar="BASE", help="base: Hub repository or local folder")
    parser.add_argument(
        "--lora",
        nargs="+",
        action="extend",
        metavar="[NAME=]SOURCE",
        help="LoRAs: Hub repositories, folders or files, each with a name",
    )
    parser.add_argument("--no_base", dest="base", action="store_false", help="leave the base itself out")
    parser.add_argument(
        "--merge",
        nargs="+",
        action="extend",
        metavar="HOW[=NAME,NAME]",
        help="evaluate merges of the LoRAs too: sum, mean, or both; sum=a,b of two of them",
    )
    parser.add_argument(
        "--benchmarks",
        nargs="+",
        action="extend",
        metavar="NAME",
        help=f"of {names}, or a name of your own that has --prompts and --rewards; by default the paper's Table 1: "
        "geneval, ocr and drawbench",
    )
    parser.add_argument(
        "--prompts",
        nargs="+",
        action="extend",
        metavar="NAME=SOURCE",
        help=f"prompts of a benchmark: a file, an address or a Hub dataset; geneval={GENERATED} makes those of GenEval",
    )
    parser.add_argument(
        "--rewards",
        nargs="+",
        action="extend",
        metavar="[NAME=]REWARD",
        help="judges instead of the usual ones, of one benchmark or of all: names of built-in rewards, or "
        "file.py:function",
    )
    parser.add_argument(
        "--reward_options",
        nargs="+",
        action="extend",
        metavar="REWARD.OPTION=VALUE",
        help="options of built-in rewards, such as unifiedreward.base_url=http://localhost:8000/v1",
    )
    parser.add_argument(
        "--num_images",
        type=int,
        help="images of each model and benchmark; by default one of each prompt",
    )
    parser.add_argument("--output_dir", metavar="FOLDER", help="where everything is kept, by default ./evaluation")
    parser.add_argument("--num_inference_steps", type=int, help="steps of the ODE, by default 40")
    parser.add_argument(
        "--guidance_scale",
        nargs="+",
        action="extend",
        metavar="[NAME=]SCALE",
        help="guidance of all models, by default 4.5, or of one; base=1 base=4.5 are two rows of the table",
    )
    parser.add_argument(
        "--resolution", type=int, help="height and width, by default 512, or the base's own size if that is smaller"
    )
    parser.add_argument("--max_sequence_length", type=int, help="length of a prompt in tokens, by default 128")
    parser.add_argument("--seed", type=int, help="seed of all noise, by default 42")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="precision of the base, by default bfloat16, on the CPU float32",
    )
    parser.add_argument("--batch_size", type=int, help="images drawn at once by each process, by default 8")
    parser.add_argument("--use_cpu", action="store_true", help="leave GPUs alone")


def main(**arguments: Any) -> None:
    """Runs `trl-diffusion-opd eval` with the options that were given."""
    from accelerate import PartialState

    from .options import parse_options
    from .run import evaluate

    evaluate(**parse_options(arguments))
    PartialState().destroy_process_group()  # or a process may abort while it exits, its communication still running
