# SPDX-License-Identifier: Apache-2.0
# /// script
# dependencies = ["trl-diffusion-opd[rewards]"]
# ///
"""
Trains a LoRA from rewards by GRPO-Guard or Flow-GRPO; `trl-diffusion-opd grpo` is the same.

The published recipe of the teacher that spells, for Stable Diffusion 3.5 Medium; first what it would do, then for real:

    accelerate launch examples/train_grpo.py --config examples/configs/sd35_grpo_guard_ocr.yaml --dry_run
    accelerate launch examples/train_grpo.py --config examples/configs/sd35_grpo_guard_ocr.yaml

Every setting of the recipe can be overridden on the command line; `--help` lists them.
"""

import sys

from trl_diffusion_opd.cli.main import train


if __name__ == "__main__":
    train(sys.argv[1:], "grpo")
