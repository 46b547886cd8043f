# SPDX-License-Identifier: Apache-2.0
"""On-policy distillation of several diffusion teachers into one LoRA, and the reinforcement learning of teachers."""

import importlib
from typing import TYPE_CHECKING


__version__ = "0.1.0"

# Public name -> module. Imported on first use: torch, diffusers and trl take seconds to import.
_MODULES = {
    "DiffusionNFTConfig": "rl_config",
    "DiffusionNFTTrainer": "nft_trainer",
    "DiffusionOPDConfig": "config",
    "DiffusionOPDTrainer": "opd_trainer",
    "FlowGRPOConfig": "rl_config",
    "FlowGRPOTrainer": "grpo_trainer",
    "StableDiffusion3SDEPipeline": "pipeline",
    "StableDiffusion3SDEPipelineOutput": "pipeline_output",
    "TeacherConfig": "teacher_config",
}

__all__ = [*_MODULES, "__version__"]

if TYPE_CHECKING:
    from .config import DiffusionOPDConfig as DiffusionOPDConfig
    from .grpo_trainer import FlowGRPOTrainer as FlowGRPOTrainer
    from .nft_trainer import DiffusionNFTTrainer as DiffusionNFTTrainer
    from .opd_trainer import DiffusionOPDTrainer as DiffusionOPDTrainer
    from .pipeline import StableDiffusion3SDEPipeline as StableDiffusion3SDEPipeline
    from .pipeline_output import StableDiffusion3SDEPipelineOutput as StableDiffusion3SDEPipelineOutput
    from .rl_config import DiffusionNFTConfig as DiffusionNFTConfig
    from .rl_config import FlowGRPOConfig as FlowGRPOConfig
    from .teacher_config import TeacherConfig as TeacherConfig


def __getattr__(name: str):
    if name in _MODULES:
        return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
