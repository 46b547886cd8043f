# SPDX-License-Identifier: Apache-2.0
# /// script
# dependencies = ["trl-diffusion-opd[rewards]"]
# ///
"""
Trains a LoRA from rewards by DiffusionNFT; `trl-diffusion-opd nft` is the same.

The published recipe of the teacher that composes, for Stable Diffusion 3.5 Medium; first what it would do, then for
real:

    accelerate launch examples/train_nft.py --config examples/configs/sd35_nft_geneval.yaml --dry_run
    accelerate launch examples/train_nft.py --config examples/configs/sd35_nft_geneval.yaml

Every setting of the recipe can be overridden on the command line; `--help` lists them.
"""

import sys

from trl_diffusion_opd.cli.main import train


if __name__ == "__main__":
    train(sys.argv[1:], "nft")
