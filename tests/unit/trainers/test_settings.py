# SPDX-License-Identifier: Apache-2.0
"""Settings out of range, of the wrong kind or not finite, and output folders that cannot be written to."""

from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from tests.support.runs import make_trainer
from trl_diffusion_opd import DiffusionOPDConfig
from trl_diffusion_opd.trainers.grpo_config import FlowGRPOConfig
from trl_diffusion_opd.trainers.nft_config import DiffusionNFTConfig
from trl_diffusion_opd.trainers.output_dir import check_output_dir


CONFIGS = (DiffusionOPDConfig, FlowGRPOConfig, DiffusionNFTConfig)


def refused(tmp_path, config=DiffusionOPDConfig, **settings):
    with pytest.raises(ValueError) as info:
        config(output_dir=str(tmp_path / "out"), use_cpu=True, **settings)
    assert "\n" not in str(info.value)
    return str(info.value)


def numbers_of(kind, configs=CONFIGS):
    """The settings that are numbers of a kind, each with a config that has it."""
    return sorted(
        {
            field.name: config
            for config in configs
            for field in fields(config)
            if kind in {get_type_hints(config)[field.name], *get_args(get_type_hints(config)[field.name])}
            and len({*get_args(get_type_hints(config)[field.name])} - {type(None)}) < 2
        }.items(),
        key=lambda item: item[0],
    )


@pytest.mark.parametrize(("name", "config"), numbers_of(int), ids=lambda value: str(value))
def test_whole_numbers_must_be_whole(tmp_path, name, config):
    for value in (2.5, "2", True, [2]):
        assert refused(tmp_path, config, **{name: value}) == f"`{name}` must be a whole number, but is {value!r}."


@pytest.mark.parametrize(("name", "config"), numbers_of(float), ids=lambda value: str(value))
def test_numbers_must_be_finite(tmp_path, name, config):
    infinite = [] if name == "max_grad_norm" else [float("inf")]
    for value in (*infinite, float("-inf"), float("nan"), "2", True):
        assert refused(tmp_path, config, **{name: value}) == f"`{name}` must be a finite number, but is {value!r}."


def test_there_are_settings_of_every_kind():
    assert {"max_steps", "height", "num_generations", "old_policy_schedule"} <= dict(numbers_of(int)).keys()
    floats = {"advantage_clip", "beta", "kl_coef", "nft_beta", "noise_level", "eval_noise_level", "guidance_scale"}
    assert floats | {"eval_guidance_scale", "learning_rate"} <= dict(numbers_of(float)).keys()


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"per_device_train_batch_size": 0}, "at least 1"),
        ({"per_device_train_batch_size": -1}, "at least 1"),
        ({"per_device_eval_batch_size": 0}, "at least 1"),
        ({"gradient_accumulation_steps": 0}, "at least 1"),
        ({"gradient_accumulation_steps": -1}, "at least 1"),
        ({"max_steps": 0}, "at least 1, or -1 to train `num_train_epochs` epochs"),
        ({"max_steps": -2}, "at least 1, or -1 to train `num_train_epochs` epochs"),
        ({"num_train_epochs": 0}, "positive"),
        ({"learning_rate": -1}, "0 or more"),
        ({"weight_decay": -0.1}, "0 or more"),
        ({"warmup_steps": -1}, "0 or more"),
        ({"adam_beta1": 2}, "at least 0 and below 1"),
        ({"adam_beta2": 1.0}, "at least 0 and below 1"),
        ({"adam_epsilon": -1e-8}, "0 or more"),
        ({"max_grad_norm": -1.0}, "0 or more"),
        ({"logging_steps": 0}, "positive"),
        ({"save_steps": -5}, "positive"),
        ({"eval_steps": 0}, "positive"),
        ({"save_total_limit": 0}, "at least 1"),
        ({"seed": -1}, "from 0 to 4294967295"),
        ({"offload_text_encoders": "no"}, "true or false"),
        ({"task_weights": [1]}, "a mapping (JSON on the command line)"),
        ({"task_weights": "ocr"}, "a mapping (JSON on the command line)"),
        ({"model_init_kwargs": 5}, "a mapping (JSON on the command line)"),
        ({"prompt_cache_size": None}, "a whole number"),
        ({"noise_level": None}, "a finite number"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(tmp_path, settings, rule):
    (name, value), *_ = settings.items()
    assert refused(tmp_path, **settings) == f"`{name}` must be {rule}, but is {value!r}."


@pytest.mark.parametrize("weights", [5, "ab", [True], [float("inf")], ["1"], {"a": 1}])
def test_weights_of_rewards_must_be_a_list_of_numbers(tmp_path, weights):
    message = refused(tmp_path, FlowGRPOConfig, reward_weights=weights)
    assert message == f"`reward_weights` must be a list of finite numbers, but is {weights!r}."


@pytest.mark.parametrize("config", CONFIGS)
def test_settings_at_their_bounds(tmp_path, config):
    made = config(
        output_dir=str(tmp_path),
        use_cpu=True,
        max_steps=-1,
        learning_rate=0,
        adam_beta1=0.0,
        max_grad_norm=float("inf"),
        num_grid_prompts=0,
        seed=0,
        save_total_limit=1,
        num_train_epochs=0.5,
    )
    assert (made.max_grad_norm, made.learning_rate) == (float("inf"), 0)


# The output folder


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path.write_text("x"), "it is a file"),
        (lambda path: path.symlink_to("nowhere"), "it is a link to nothing"),
        (lambda path: path.symlink_to("/proc/nowhere"), "it is a link to nothing"),
        (lambda path: path.symlink_to("/proc"), "No such file or directory"),  # a mount that takes no file
    ],
)
def test_an_output_folder_that_cannot_be_written_to_is_refused_before_anything_is_loaded(
    tmp_path, monkeypatch, make, reason
):
    monkeypatch.setattr("trl_diffusion_opd.trainers.base_trainer.load_pipeline", None)
    out = tmp_path / "out"
    make(out)
    with pytest.raises(OSError) as info:
        make_trainer(tmp_path, output_dir=str(out))
    assert str(info.value) == f"`output_dir` {str(out)!r} cannot be written to: {reason}. Choose another folder."


def test_an_output_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="cannot be written to: Not a directory. Choose another folder."):
        check_output_dir(tmp_path / "file" / "out")


def test_the_output_folder_is_created_and_left_empty(tmp_path):
    check_output_dir(str(tmp_path / "a" / "b"))
    assert list(Path(tmp_path, "a", "b").iterdir()) == []
