# SPDX-License-Identifier: Apache-2.0
"""Settings of the [`DiffusionOPDTrainer`]."""

from dataclasses import dataclass

from .base_config import DiffusionConfig


@dataclass
class DiffusionOPDConfig(DiffusionConfig):
    r"""
    Configuration class for the [`DiffusionOPDTrainer`].

    All its parameters are those of [`DiffusionConfig`], with the defaults of the published recipe.
    """
