# SPDX-License-Identifier: Apache-2.0
"""`trl-diffusion-opd eval`: LoRAs of one base scored on the same prompts, with the paper's table."""
