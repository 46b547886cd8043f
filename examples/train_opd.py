# SPDX-License-Identifier: Apache-2.0
# /// script
# dependencies = ["trl-diffusion-opd[examples]"]
# ///
"""
Distills several LoRA teachers into one LoRA student.

Without arguments, the embedded default: three teachers of the Shapes world (`examples/shapes`), a few minutes on a CPU.

    accelerate launch examples/train_opd.py

The published recipe for Stable Diffusion 3.5 Medium; first what it would do, then for real:

    accelerate launch examples/train_opd.py --config examples/configs/sd35_medium.yaml --dry_run
    accelerate launch examples/train_opd.py --config examples/configs/sd35_medium.yaml

Every setting of the recipe can be overridden on the command line; `--help` lists them.
"""

import sys
from pathlib import Path

from trl_diffusion_opd.cli.main import train


if __name__ == "__main__":
    train(sys.argv[1:], default_recipe=Path(__file__).parent / "configs" / "shapes.yaml")
