# SPDX-License-Identifier: Apache-2.0
"""On-policy distillation of several diffusion teachers into one LoRA, and the reinforcement learning of teachers."""

import importlib
from typing import TYPE_CHECKING


__version__ = "0.1.0"

# Public name -> module. Imported on first use: torch, diffusers and trl take seconds to import.
_MODULES = {
    "DiffusionNFTConfig": "trainers.nft_config",
    "DiffusionNFTTrainer": "trainers.nft_trainer",
    "DiffusionOPDConfig": "trainers.opd_config",
    "DiffusionOPDTrainer": "trainers.opd_trainer",
    "FlowGRPOConfig": "trainers.grpo_config",
    "FlowGRPOTrainer": "trainers.grpo_trainer",
    "StableDiffusion3SDEPipeline": "models.sd3_sde_pipeline",
    "StableDiffusion3SDEPipelineOutput": "models.sd3_sde_pipeline",
    "TeacherConfig": "teachers.config",
}

__all__ = [*_MODULES, "__version__"]

if TYPE_CHECKING:
    from .models.sd3_sde_pipeline import StableDiffusion3SDEPipeline as StableDiffusion3SDEPipeline
    from .models.sd3_sde_pipeline import StableDiffusion3SDEPipelineOutput as StableDiffusion3SDEPipelineOutput
    from .teachers.config import TeacherConfig as TeacherConfig
    from .trainers.grpo_config import FlowGRPOConfig as FlowGRPOConfig
    from .trainers.grpo_trainer import FlowGRPOTrainer as FlowGRPOTrainer
    from .trainers.nft_config import DiffusionNFTConfig as DiffusionNFTConfig
    from .trainers.nft_trainer import DiffusionNFTTrainer as DiffusionNFTTrainer
    from .trainers.opd_config import DiffusionOPDConfig as DiffusionOPDConfig
    from .trainers.opd_trainer import DiffusionOPDTrainer as DiffusionOPDTrainer


def __getattr__(name: str):
    if name in _MODULES:
        return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
