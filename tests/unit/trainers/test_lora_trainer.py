# SPDX-License-Identifier: Apache-2.0
"""What our overrides rely on in transformers, TRL, diffusers and PEFT. A failure here means: look at `lora_trainer.py` again."""

import inspect
import subprocess
import sys

import pytest
import torch
import transformers
import trl
from diffusers import SD3Transformer2DModel
from transformers import Trainer
from trl.trainer.base_trainer import _BaseTrainer

from tests.support.runs import make_trainer
from trl_diffusion_opd.trainers.lora_trainer import LoraTrainer


OVERRIDES = [
    "train",
    "_run_epoch",
    "_load_optimizer_and_scheduler",
    "_send_telemetry",
    "get_train_dataloader",
    "_save",
    "_get_output_dir",
    "_save_checkpoint",
    "_load_from_checkpoint",
    "_load_best_model",
    "_push_from_checkpoint",
    "push_to_hub",
    "init_hf_repo",
    "create_model_card",
]


@pytest.mark.parametrize("name", OVERRIDES)
def test_an_override_takes_what_upstream_passes(name):
    theirs = list(inspect.signature(getattr(_BaseTrainer, name)).parameters)
    ours = list(inspect.signature(getattr(LoraTrainer, name)).parameters)
    if "args" in ours:  # which takes and passes on all others
        ours, theirs = ours[: ours.index("args")], theirs[: ours.index("args")]
    assert ours[: len(theirs)] == theirs


def test_there_are_no_overrides_beyond_the_list():
    classes = LoraTrainer.__mro__[: LoraTrainer.__mro__.index(_BaseTrainer)]
    assert [owner.__name__ for owner in classes] == ["LoraTrainer", "PushMixin"]
    own = {name for owner in classes for name in vars(owner) if callable(getattr(_BaseTrainer, name, None))}
    assert own - {"__init__", "__doc__", "__module__"} == set(OVERRIDES)


def test_upstream_still_saves_in_place_through_the_methods_that_we_override():
    source = inspect.getsource(Trainer._save_checkpoint)
    for call in ("self._get_output_dir(", "self.save_model(", "self._push_from_checkpoint(", "rotate_checkpoints("):
        assert call in source, call
    assert "self._save(" in inspect.getsource(Trainer.save_model)
    assert "self._load_from_checkpoint(resume_from_checkpoint)" in inspect.getsource(Trainer.train)


def test_upstream_still_needs_the_overrides():
    """When one of these goes, the override can go too."""
    assert "self.model.config.model_type" in inspect.getsource(_BaseTrainer._send_telemetry)
    assert "torch.save(self.args" in inspect.getsource(Trainer._save)
    assert "torch.save(self.args" in inspect.getsource(Trainer._push_from_checkpoint)
    assert "folder_path=self.args.output_dir" in inspect.getsource(Trainer.push_to_hub)
    assert "self.push_in_progress = None" in inspect.getsource(Trainer.init_hf_repo)
    assert not hasattr(SD3Transformer2DModel, "activation_checkpointing_enable")
    assert hasattr(SD3Transformer2DModel, "enable_gradient_checkpointing")


def test_upstream_still_trains_before_it_asks_whether_a_step_is_left():
    """It asks after a step alone, in the callback that stops training."""
    assert "self._run_epoch(" in inspect.getsource(Trainer._inner_training_loop)
    for function in (Trainer._inner_training_loop, Trainer._run_epoch):
        assert "global_step >= " not in inspect.getsource(function)
    assert "state.global_step >= state.max_steps" in inspect.getsource(transformers.DefaultFlowCallback.on_step_end)


def test_upstream_still_takes_the_last_checkpoint_whoever_saved_it():
    assert "get_last_checkpoint(args.output_dir)" in inspect.getsource(Trainer.train)
    assert "self.set_initial_training_values(args, train_dataloader)" in inspect.getsource(
        Trainer._inner_training_loop
    )


def test_upstream_still_loads_the_learning_rate_with_the_optimizer():
    assert "self.optimizer.load_state_dict(" in inspect.getsource(Trainer._load_optimizer_and_scheduler)
    assert "self._load_optimizer_and_scheduler(" in inspect.getsource(Trainer._prepare_for_training)


def test_the_training_loop_hands_over_what_our_step_reads():
    source = inspect.getsource(Trainer._run_epoch)
    assert "self.current_gradient_accumulation_steps = len(batch_samples)" in source
    assert "self.training_step(model, inputs, num_items_in_batch)" in source
    assert "gradient_state._set_sync_gradients(do_sync_step)" in source


def test_accelerate_does_not_divide_the_loss_again(tmp_path):
    trainer = make_trainer(tmp_path, gradient_accumulation_steps=4)
    assert trainer.accelerator.gradient_accumulation_steps == 1


def test_nothing_is_sent_where_ci_is_not_set(tmp_path, monkeypatch):
    """TRL's telemetry reads `model.config.model_type`, which fails for every diffusers model unless `CI` is set."""
    sent = []
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda **kwargs: sent.append(kwargs))
    make_trainer(tmp_path)
    assert not sent


def test_activation_checkpointing_is_switched_on_by_diffusers_name_alone(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    assert trainer.transformer.is_gradient_checkpointing and trainer.args.activation_checkpointing
    off = make_trainer(tmp_path, gradient_checkpointing=False)
    off.train()
    assert not off.transformer.is_gradient_checkpointing
    with pytest.raises(ValueError, match="`activation_checkpointing_kwargs` is not supported"):
        make_trainer(tmp_path, activation_checkpointing_kwargs={"use_reentrant": False}).train()


def test_the_model_has_no_config_for_integrations_to_misread(tmp_path):
    assert not hasattr(make_trainer(tmp_path).model, "config")


def test_several_gpus_in_one_process_are_refused(tmp_path):
    from tests.support.runs import PROMPTS, make_config, make_teachers, tiny_pipeline

    config = make_config(tmp_path)
    config._n_gpu = 2
    from trl_diffusion_opd import DiffusionOPDTrainer

    with pytest.raises(ValueError, match="One process sees 2 GPUs"):
        DiffusionOPDTrainer(tiny_pipeline(), make_teachers(tmp_path), config, PROMPTS)


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"])
def test_sharding_by_the_launcher_is_refused(tmp_path, monkeypatch, variable):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ValueError, match="DeepSpeed and FSDP are not supported"):
        make_trainer(tmp_path)


def test_bf16_base_keeps_the_adapters_in_float32(tmp_path):
    from tests.support.tiny import tiny_pipeline

    trainer = make_trainer(tmp_path, pipeline=tiny_pipeline().to(torch.bfloat16), bf16=True, max_steps=2)
    dtypes = {("lora_" in name, parameter.dtype) for name, parameter in trainer.transformer.named_parameters()}
    assert dtypes == {(False, torch.bfloat16), (True, torch.float32)}
    assert trainer.pipeline.vae.dtype == torch.float32
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    expected = make_trainer(tmp_path, max_steps=2)
    expected.train()
    for loss, exact in zip(losses, (e["loss"] for e in expected.state.log_history if "loss" in e), strict=True):
        assert loss == pytest.approx(exact, rel=0.1)


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, trl_diffusion_opd; print([m for m in ('torch', 'diffusers', 'trl') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_public_names():
    import trl_diffusion_opd

    for name in trl_diffusion_opd.__all__:
        assert getattr(trl_diffusion_opd, name) is not None
    assert set(trl_diffusion_opd.__all__) <= set(dir(trl_diffusion_opd))
    with pytest.raises(AttributeError, match="no attribute 'DiffusionTrainer2'"):
        trl_diffusion_opd.DiffusionTrainer2  # noqa: B018


def test_versions_are_those_the_overrides_were_written_for():
    assert transformers.__version__.split(".")[0] == "5"
    assert trl.__version__.split(".")[0] == "1"
