# SPDX-License-Identifier: Apache-2.0
"""The configuration: documented, used, validated, and like TRL's where it is not ours."""

import re
import warnings
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from trl.trainer.base_config import _BaseConfig

from tests.support.tiny import tiny_pipeline
from trl_diffusion_opd import DiffusionOPDConfig
from trl_diffusion_opd.models.registry import family_of
from trl_diffusion_opd.trainers.base_config import DiffusionConfig
from trl_diffusion_opd.trainers.checks import resolve_family_settings
from trl_diffusion_opd.trainers.grpo_config import FlowGRPOConfig
from trl_diffusion_opd.trainers.nft_config import DiffusionNFTConfig
from trl_diffusion_opd.trainers.rl_config import RLConfig


PACKAGE = Path(__file__).parents[3] / "trl_diffusion_opd"
PARENTS = {
    DiffusionConfig: _BaseConfig,
    DiffusionOPDConfig: DiffusionConfig,
    RLConfig: DiffusionConfig,
    FlowGRPOConfig: RLConfig,
    DiffusionNFTConfig: RLConfig,
}


def own_fields(config):
    return sorted({f.name for f in fields(config)} - {f.name for f in fields(PARENTS[config])})


def make(tmp_path, **overrides):
    return DiffusionOPDConfig(output_dir=str(tmp_path), use_cpu=True, **overrides)


@pytest.mark.parametrize(("config", "name"), [(config, name) for config in PARENTS for name in own_fields(config)])
def test_every_field_is_documented_and_used(config, name):
    field = next(f for f in fields(config) if f.name == name)
    assert field.metadata["help"]
    assert re.search(rf"^        {name} \(`", config.__doc__, re.M), "missing in the class docstring"
    others = "".join(path.read_text() for path in PACKAGE.rglob("*.py") if not path.name.endswith("config.py"))
    assert re.search(rf"args\.{name}\b", others), "no code reads it"


@pytest.mark.parametrize("config", PARENTS)
def test_the_docstring_names_no_field_that_does_not_exist(config):
    documented = set(re.findall(r"^        (\w+) \(`", config.__doc__, re.M))
    assert documented == set(own_fields(config))


@pytest.mark.parametrize("config", [FlowGRPOConfig, DiffusionNFTConfig])
def test_the_note_tells_every_default_that_differs(config):
    """Of the fields that the class declares again, those whose default is another one are told, with both values."""
    parents = {f.name: f.default for f in fields(DiffusionConfig)} | {f.name: f.default for f in fields(RLConfig)}
    again = {f.name: f.default for f in fields(config) if f.name in parents and f.default != parents[f.name]}
    told = dict(re.findall(r"> - `(\w+)`: Defaults to `(.+?)` instead of", config.__doc__))
    assert told.keys() == again.keys()


def test_constructing_it_warns_about_nothing(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = make(tmp_path)
    assert config.activation_checkpointing is True and config.ddp_broadcast_buffers is False


@pytest.mark.parametrize(
    "config, overrides, message",
    [
        (FlowGRPOConfig, {"loss_type": "ppo"}, "`loss_type` must be one of grpo, grpo_guard, but is 'ppo'"),
        (FlowGRPOConfig, {"noise_level": 0.0}, "`noise_level` is 0: a deterministic rollout has no probabilities"),
        (FlowGRPOConfig, {"solver": "cps"}, "`loss_type='grpo_guard'` is defined for the solvers flow and dance"),
        (
            FlowGRPOConfig,
            {"solver": "cps", "loss_type": "grpo", "skip_last_steps": 0},
            "the last step of `solver='cps'` has no noise",
        ),
        (FlowGRPOConfig, {"epsilon": 0.0}, "`epsilon` must be between 0 and 1"),
        (FlowGRPOConfig, {"beta": -1.0}, "`beta` must be 0 or more"),
        (FlowGRPOConfig, {"num_generations": 1}, "`num_generations` must be at least 2"),
        (FlowGRPOConfig, {"num_generations": 9}, "draws 24 images of each task .* no multiple of .* = 9"),
        (FlowGRPOConfig, {"save_steps": 3}, "`save_steps` must be a multiple of `steps_per_rollout` = 2"),
        (FlowGRPOConfig, {"advantage_clip": 0.0}, "`advantage_clip` must be positive"),
        (FlowGRPOConfig, {"reward_workers": 0}, "`reward_workers` must be at least 1"),
        (FlowGRPOConfig, {"scale_rewards": "batch"}, "`scale_rewards` must be one of task, group, none"),
        (DiffusionNFTConfig, {"nft_beta": 0.0}, "`nft_beta` must be positive"),
        (DiffusionNFTConfig, {"kl_coef": -1.0}, "`kl_coef` must be 0 or more"),
        (DiffusionNFTConfig, {"old_policy_schedule": 3}, "`old_policy_schedule` must be one of 0, 1, 2"),
    ],
)
def test_settings_of_the_methods_out_of_range_are_refused(tmp_path, config, overrides, message):
    settings = {"per_device_train_batch_size": 12 if config is FlowGRPOConfig else 24, **overrides}
    with pytest.raises(ValueError, match=message):
        config(output_dir=str(tmp_path), use_cpu=True, **settings)


def test_published_defaults_of_the_methods(tmp_path):
    settings = {"output_dir": str(tmp_path), "use_cpu": True}
    guard, grpo = FlowGRPOConfig(**settings), FlowGRPOConfig(loss_type="grpo", **settings)
    assert (guard.epsilon, guard.beta, grpo.epsilon, grpo.beta) == (2e-6, 0.0, 1e-4, 0.04)
    assert (guard.learning_rate, guard.scale_rewards) == (1e-4, "group")
    assert (grpo.learning_rate, grpo.scale_rewards) == (3e-4, "task")
    assert (guard.noise_level, guard.solver) == (0.7, "flow")
    nft = DiffusionNFTConfig(**settings)
    assert (nft.solver, nft.noise_level, nft.nft_beta, nft.kl_coef) == ("dpm2", 0.0, 1.0, 1e-4)
    assert (guard.num_generations, nft.num_generations, nft.advantage_clip) == (24, 24, 5.0)
    assert guard.per_device_train_batch_size == nft.per_device_train_batch_size == 24, "images of whole prompts"
    assert DiffusionNFTConfig(**settings, save_steps=0.1).save_steps == 0.1
    assert (guard.ema_decay, guard.ema_update_every, nft.ema_decay, nft.ema_update_every) == (0.9, 8, 0.9, 1)


def test_published_defaults(tmp_path):
    config, family = make(tmp_path), family_of(tiny_pipeline())
    resolve_family_settings(config, family, family.defaults(dict))
    assert (config.num_inference_steps, config.skip_last_steps, config.guidance_scale) == (10, 1, 4.5)
    assert (config.solver, config.noise_level, config.max_sequence_length) == ("flow", 0.0, 128)
    assert (config.learning_rate, config.max_grad_norm, config.weight_decay) == (3e-4, 1.0, 1e-4)
    assert config.lr_scheduler_type == "constant" and config.remove_unused_columns is False


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells what happens without a GPU")
def test_a_machine_without_bfloat16_gets_none(tmp_path):
    assert DiffusionOPDConfig(output_dir=str(tmp_path)).bf16 is False


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"solver": "euler"}, "`solver` must be one of flow, .*, but is 'euler'"),
        ({"noise_level": -0.1}, "`noise_level` must be a finite number >= 0, but is -0.1"),
        ({"noise_level": float("nan")}, "`noise_level` must be a finite number"),
        ({"solver": "dpm2", "noise_level": 0.7}, "deterministic .* `noise_level` is 0.7. Set `noise_level=0.0`"),
        ({"num_inference_steps": 0}, "`num_inference_steps` must be at least 1"),
        (
            {"skip_last_steps": 10, "num_inference_steps": 10},
            "`skip_last_steps` must be from 0 to num_inference_steps - 1 = 9",
        ),
        ({"skip_last_steps": -1}, "`skip_last_steps` must be at least 0"),
        ({"guidance_scale": -1.0}, "`guidance_scale` must be 0 or more"),
        ({"max_sequence_length": 0}, "`max_sequence_length` must be at least 1"),
        ({"prompt_cache_size": 0}, "`prompt_cache_size` must be at least 1"),
        ({"prompt_batch_size": 0}, "`prompt_batch_size` must be at least 1"),
        ({"ema_decay": 1.0}, "`ema_decay` must be between 0 and 1"),
        ({"ema_update_every": 0}, "`ema_update_every` must be at least 1"),
        (
            {"eval_num_inference_steps": 1, "skip_last_steps": 1},
            "`eval_num_inference_steps` must be more than skip_last_steps = 1",
        ),
        ({"eval_guidance_scale": -2.0}, "`eval_guidance_scale` must be 0 or more"),
        ({"eval_noise_level": -1.0}, "`noise_level` must be a finite number"),
        ({"num_eval_images": 0}, "`num_eval_images` must be at least 1"),
        ({"num_grid_prompts": -1}, "`num_grid_prompts` must be 0 or more"),
        ({"height": 0}, "`height` must be positive"),
        ({"task_weights": {"ocr": 0.5}}, "`task_weights\\['ocr'\\]` must be a whole number of batches"),
        ({"task_weights": {"ocr": True}}, "must be a whole number of batches"),
        ({"auto_find_batch_size": True}, "`auto_find_batch_size` is not supported"),
        ({"bf16_full_eval": True}, "are not supported: evaluation runs in the precision of training"),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "DeepSpeed and FSDP are not supported"),
    ],
)
def test_values_out_of_range_are_refused(tmp_path, overrides, message):
    with pytest.raises((ValueError, ImportError), match=message):
        make(tmp_path, **overrides)


def test_mappings_may_come_as_json(tmp_path):
    config = make(tmp_path, task_weights='{"ocr": 2}', model_init_kwargs='{"revision": "main"}')
    assert config.task_weights == {"ocr": 2} and config.model_init_kwargs == {"revision": "main"}
