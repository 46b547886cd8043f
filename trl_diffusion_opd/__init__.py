# SPDX-License-Identifier: Apache-2.0
"""On-policy distillation of several diffusion teachers into one LoRA, and the reinforcement learning of teachers."""

import importlib
import sys
from typing import TYPE_CHECKING

from .utils.moved import MovedModules, find_moved


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


# What was found as `trl_diffusion_opd.<name>` in 0.1 -> where it is. To be removed in 0.3.
_MOVED = {
    "RewardConfig": "trainers.rl_config:RLConfig",
    "RewardTrainer": "trainers.rl_trainer:RLTrainer",
    "advantages": "losses.advantages",
    "config": "trainers.opd_config",
    "denoising": "sampling.denoising",
    "forward_process": "losses.nft",
    "grpo_trainer": "trainers.grpo_trainer",
    "nft_trainer": "trainers.nft_trainer",
    "objectives": "losses.opd",
    "opd_trainer": "trainers.opd_trainer",
    "pipeline": "models.sd3_sde_pipeline",
    "policy_gradient": "losses.grpo",
    "rl_config": "trainers.rl_config",
    "space": "publishing.space",
    "teacher_config": "teachers.config",
    "transitions": "sampling.transitions",
}


sys.meta_path.append(MovedModules(__name__, _MOVED))


def __getattr__(name: str):
    if name in _MODULES:
        return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    if name in _MOVED:
        return find_moved(__name__, name, _MOVED)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
