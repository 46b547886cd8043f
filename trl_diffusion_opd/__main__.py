# SPDX-License-Identifier: Apache-2.0
"""`python -m trl_diffusion_opd`, and so `accelerate launch -m trl_diffusion_opd opd ...`."""

from .cli.main import main


if __name__ == "__main__":
    main()
