# SPDX-License-Identifier: Apache-2.0
"""The training round: its gradient, what it runs, what it changes, and that it learns."""

import math

import pytest
import torch
from datasets import Dataset

from tests.support.runs import PROMPTS, make_teachers, make_trainer, small_lora, student_state
from tests.support.tiny import random_lora, save_diffusers_lora, tiny_pipeline, tiny_transformer
from trl_diffusion_opd import TeacherConfig
from trl_diffusion_opd.lora.adapters import use_adapter
from trl_diffusion_opd.teachers.loading import teacher_fingerprint


def run_round(trainer, round_index=0) -> dict[str, torch.Tensor]:
    """Gradients of one training step, without an optimizer step."""
    trainer.state.global_step = round_index
    trainer.current_gradient_accumulation_steps = 1
    trainer.accelerator.gradient_state._set_sync_gradients(True)
    trainer.model.zero_grad()
    trainer.training_step(trainer.model, {"micro_round": round_index})
    return {name: p.grad.clone() for name, p in trainer.transformer.named_parameters() if p.requires_grad}


def guided(transformer, x, timestep, text, negative, scale):
    """Independent velocity with guidance: two separate forwards."""
    embeds, pooled = text
    timestep = timestep.repeat(len(x))

    def forward(embeds, pooled):
        return transformer(x, embeds, pooled, timestep, return_dict=False)[0]

    positive = forward(embeds, pooled)
    if scale <= 1:
        return positive
    unconditional = forward(negative[0].expand_as(embeds), negative[1].expand_as(pooled))
    return unconditional + scale * (positive - unconditional)


def three_pass_gradient(trainer, *, noise_level: float) -> dict[str, torch.Tensor]:
    """Algorithm 1 by the book: roll out, replay the teacher, replay the student, one backward over everything."""
    transformer, args = trainer.transformer, trainer.args
    sigmas, timesteps = trainer.schedule.sigmas.double().tolist(), trainer.schedule.timesteps
    steps = args.num_inference_steps - args.skip_last_steps
    encoded = trainer.prompts.encode([*trainer.rounds.distinct_prompts(99), ""])
    dtype = next(transformer.parameters()).dtype
    negative = tuple(tensor[None].to(dtype) for tensor in encoded[""].values())
    losses = []
    for batch in trainer.rounds.batches(0):
        text = [torch.stack([encoded[prompt][i] for prompt in batch.prompts]).to(dtype) for i in encoded[""]]
        teacher = trainer.loaded_teachers[batch.task]
        x, generators = trainer.sampler.noise(batch.seeds)
        x = x.to(dtype)
        states, noises = [], []
        for j in range(steps):
            s, dt = sigmas[j], sigmas[j + 1] - sigmas[j]
            k2 = noise_level**2 * s / (1 - (sigmas[1] if s == 1 else s))
            states.append(x)
            with torch.no_grad():
                v = guided(transformer, x, timesteps[j], text, negative, args.guidance_scale)
            mean = (1 + k2 / (2 * s) * dt) * x + (1 + k2 * (1 - s) / (2 * s)) * v * dt
            noise = torch.stack([torch.randn(x.shape[1:], generator=g, dtype=torch.float32) for g in generators])
            noises.append(noise)
            x = mean + math.sqrt(k2 * -dt) * noise.to(dtype) if noise_level else mean
        with torch.no_grad(), use_adapter(transformer, teacher.adapter_name):
            targets = [
                guided(transformer, state, timesteps[j], text, negative, teacher.guidance_scale)
                for j, state in enumerate(states)
            ]
        for j, (state, target) in enumerate(zip(states, targets, strict=True)):
            s, dt = sigmas[j], sigmas[j + 1] - sigmas[j]
            k2 = noise_level**2 * s / (1 - (sigmas[1] if s == 1 else s))
            v = guided(transformer, state, timesteps[j], text, negative, args.guidance_scale)
            difference = (1 + k2 * (1 - s) / (2 * s)) * dt * (v - target)
            variance = k2 * -dt if noise_level else 1.0
            losses.append((difference.square() / (2 * variance)).mean())
    transformer.zero_grad()
    torch.stack(losses).mean().backward()
    return {name: p.grad.clone() for name, p in transformer.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("noise_level", [0.0, 0.7])
def test_single_pass_gives_the_gradient_of_three_passes(tmp_path, noise_level):
    trainer = make_trainer(tmp_path, noise_level=noise_level, skip_last_steps=1)
    single = run_round(trainer)
    reference = three_pass_gradient(trainer, noise_level=noise_level)
    assert single.keys() == reference.keys()
    scale = max(gradient.abs().max() for gradient in reference.values())
    assert scale > 0
    for name, gradient in reference.items():
        torch.testing.assert_close(single[name], gradient, rtol=1e-4, atol=1e-5 * scale.item(), msg=name)


def test_single_pass_equals_three_passes_to_rounding_in_float64(tmp_path):
    trainer = make_trainer(tmp_path, pipeline=tiny_pipeline().to(torch.float64))
    trainer.transformer.to(torch.float64)
    noise = trainer.sampler.noise
    trainer.sampler.noise = lambda seeds: (noise(seeds)[0].double(), noise(seeds)[1])
    single, reference = run_round(trainer), three_pass_gradient(trainer, noise_level=0.0)
    difference = sum((single[name] - reference[name]).square().sum() for name in reference).sqrt()
    # Not to the last bit: the reference computes the two branches of the guidance one after the other.
    assert difference / sum(gradient.square().sum() for gradient in reference.values()).sqrt() < 1e-12


def test_gradient_of_a_round_is_the_weighted_mean_over_tasks(tmp_path):
    both = run_round(make_trainer(tmp_path, task_weights={"scene": 2}))
    alone = {
        task: run_round(
            make_trainer(
                tmp_path,
                teachers={task: make_teachers(tmp_path)[task]},
                data={task: PROMPTS[task]},
                per_device_train_batch_size=2 * weight,
            )
        )
        for task, weight in (("count", 1), ("scene", 2))
    }
    for name, gradient in both.items():
        expected = (alone["count"][name] + 2 * alone["scene"][name]) / 3
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-8)


def test_teacher_follows_the_sample_whatever_the_order_of_the_tasks(tmp_path):
    teachers = make_teachers(tmp_path)
    forward = run_round(make_trainer(tmp_path))
    backward = run_round(
        make_trainer(tmp_path, teachers=dict(reversed(teachers.items())), data=dict(reversed(PROMPTS.items())))
    )
    for name in forward:
        torch.testing.assert_close(forward[name], backward[name], rtol=1e-4, atol=1e-8)


def test_gradient_is_there_at_the_first_step_of_a_new_student(tmp_path):
    gradients = run_round(make_trainer(tmp_path))
    moving = [name for name in gradients if "lora_B" in name]
    # the text stream of the last block ends there: its LoRA cannot get a gradient
    assert moving
    assert all(gradients[name].abs().max() > 0 for name in moving)


def test_a_teacher_that_equals_the_student_gives_exactly_zero(tmp_path):
    config, state = random_lora(seed=1)
    save_diffusers_lora(tmp_path / "zero", config, {k: torch.zeros_like(v) for k, v in state.items()})
    trainer = make_trainer(tmp_path, teachers={"count": str(tmp_path / "zero")}, data={"count": PROMPTS["count"]})
    gradients = run_round(trainer)
    assert all(gradient.eq(0).all() for gradient in gradients.values())
    assert trainer.metrics["kl/count"] == [0.0]


def test_activation_checkpointing_changes_no_gradient(tmp_path):
    plain = make_trainer(tmp_path, activation_checkpointing=False)
    checkpointed = make_trainer(tmp_path, activation_checkpointing=True)
    checkpointed.model.activation_checkpointing_enable()  # as `train` does
    assert checkpointed.transformer.is_gradient_checkpointing and not plain.transformer.is_gradient_checkpointing
    expected, gradients = run_round(plain), run_round(checkpointed)
    for name in expected:
        torch.testing.assert_close(gradients[name], expected[name], rtol=1e-5, atol=1e-9)


def test_only_the_student_changes(tmp_path):
    trainer = make_trainer(tmp_path, peft_config=small_lora(target_modules=["attn.to_q", "attn.to_add_out"]))
    before = {name: tensor.clone() for name, tensor in trainer.transformer.state_dict().items()}
    trainer.train()
    changed = {name for name, tensor in trainer.transformer.state_dict().items() if not tensor.equal(before[name])}
    assert changed and all(".default." in name for name in changed)
    assert {n for n, p in trainer.transformer.named_parameters() if p.requires_grad} >= changed
    for teacher in trainer.loaded_teachers.values():
        assert teacher_fingerprint(teacher, trainer.transformer) == teacher.fingerprint


def test_training_pulls_the_student_to_its_teachers(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=25, peft_config=small_lora(r=8, target_modules="all-linear"))
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "kl/count" in entry]
    for task in PROMPTS:
        first, last = (sum(entry[f"kl/{task}"] for entry in part) for part in (logs[:5], logs[-5:]))
        assert last < 0.3 * first, task


def test_a_round_runs_each_model_once_per_trained_step(tmp_path):
    trainer = make_trainer(tmp_path, num_inference_steps=5, skip_last_steps=2)
    rows, decoded, encoded = [], [], []
    trainer.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append((torch.is_grad_enabled(), len(kwargs["hidden_states"]))),
        with_kwargs=True,
    )
    trainer.pipeline.vae.decoder.register_forward_hook(lambda *args: decoded.append(1))
    trainer.pipeline.text_encoder_3.register_forward_hook(lambda *args: encoded.append(1))
    run_round(trainer)
    # teacher, then student, at each of 3 steps; `count` has guidance in both, the teacher of `scene` has none
    assert rows == [(False, 4), (True, 4)] * 3 + [(False, 2), (True, 4)] * 3
    assert not decoded
    encodings = len(encoded)
    run_round(trainer, round_index=1)
    assert len(encoded) == encodings, "prompts that were encoded ahead are not encoded again"


def test_gradient_accumulation_equals_a_larger_batch(tmp_path):
    large = make_trainer(tmp_path, per_device_train_batch_size=4)
    small = make_trainer(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    for trainer in (large, small):
        trainer.train()
    expected, state = student_state(large), student_state(small)
    for name in expected:
        torch.testing.assert_close(state[name], expected[name], rtol=1e-3, atol=1e-5)
    losses = [[entry["loss"] for entry in trainer.state.log_history if "loss" in entry] for trainer in (large, small)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert [len(values) for values in losses] == [3, 3]


@pytest.mark.parametrize(
    "solver, noise_level", [("flow", 0.7), ("dance", 0.3), ("ddim", 0.5), ("cps", 0.5), ("dpm2", 0.0)]
)
def test_every_solver_trains(tmp_path, solver, noise_level):
    trainer = make_trainer(tmp_path, solver=solver, noise_level=noise_level, max_steps=2)
    before = student_state(trainer)
    trainer.train()
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
    assert any(not tensor.equal(before[name]) for name, tensor in student_state(trainer).items())


def test_full_model_teacher_beside_a_lora_teacher(tmp_path):
    full = tiny_transformer(seed=5)
    before = {name: tensor.clone() for name, tensor in full.state_dict().items()}
    teachers = make_teachers(tmp_path, scene=TeacherConfig(full, guidance_scale=1.0))
    trainer = make_trainer(tmp_path, teachers=teachers)
    trainer.train()
    assert trainer.state.log_history[0]["kl/scene"] > trainer.state.log_history[0]["kl/count"]
    assert all(tensor.equal(before[name]) for name, tensor in full.state_dict().items())
    assert not any(parameter.requires_grad for parameter in full.parameters())


@pytest.mark.parametrize("bad_task", ["count", "scene"])
def test_nan_stops_with_task_and_step_and_keeps_the_last_checkpoint(tmp_path, bad_task):
    from transformers import TrainerCallback

    class BreakTeacher(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                adapter = trainer.loaded_teachers[bad_task].adapter_name
                for name, parameter in trainer.transformer.named_parameters():
                    if f"lora_B.{adapter}." in name:
                        parameter.data.fill_(float("nan"))

    trainer = make_trainer(
        tmp_path, callbacks=[BreakTeacher()], save_strategy="steps", save_steps=1, max_steps=5, save_total_limit=3
    )
    with pytest.raises(FloatingPointError, match=f"task '{bad_task}' is nan at denoising step 0 .* of round 2"):
        trainer.train()
    assert (tmp_path / "out" / "checkpoint-2" / "pytorch_lora_weights.safetensors").is_file()
    assert not (tmp_path / "out" / "checkpoint-3").exists()
    assert all(torch.isfinite(tensor).all() for tensor in student_state(trainer).values())


def test_the_same_seed_gives_the_same_run_and_another_one_does_not(tmp_path):
    states = []
    for seed in (1, 1, 2):
        trainer = make_trainer(tmp_path, seed=seed, max_steps=2)
        trainer.train()
        states.append(student_state(trainer))
    assert all(states[0][name].equal(states[1][name]) for name in states[0])
    assert any(not states[0][name].equal(states[2][name]) for name in states[0])


def test_one_dataset_with_a_task_column(tmp_path):
    rows = [{"prompt": prompt, "task": task} for task, prompts in PROMPTS.items() for prompt in prompts]
    by_column = make_trainer(tmp_path, data=Dataset.from_list(rows))
    by_mapping = make_trainer(tmp_path)
    for trainer in (by_column, by_mapping):
        trainer.train()
    expected = student_state(by_mapping)
    assert all(tensor.equal(expected[name]) for name, tensor in student_state(by_column).items())


def test_what_is_logged(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    entry = trainer.state.log_history[0]
    names = {"loss", "grad_norm", "kl/count", "kl/scene", "step_time", "images_per_second", "peak_memory_gb"}
    names |= {f"kl_step/{j}" for j in range(3)}
    assert names <= entry.keys()
    assert entry["loss"] == pytest.approx((entry["kl/count"] + entry["kl/scene"]) / 2, rel=1e-5)
    assert entry["loss"] == pytest.approx(sum(entry[f"kl_step/{j}"] for j in range(3)) / 3, rel=1e-5)
    assert entry["images_per_second"] == pytest.approx(4 / entry["step_time"], rel=1e-5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"data": {"count": ["a"]}}, "teachers without prompts: \\['scene'\\]"),
        ({"data": {**PROMPTS, "extra": ["a"]}}, "`train_dataset` names unknown tasks \\['extra'\\]"),
        ({"task_weights": {"ocr": 2}}, "`task_weights` names unknown tasks \\['ocr'\\]"),
        ({"eval_dataset": {"ocr": ["a"]}}, "`eval_dataset` names unknown tasks \\['ocr'\\]"),
        ({"reward_funcs": {"ocr": len}}, "`reward_funcs` names the unknown task 'ocr'"),
        ({"reward_funcs": {"count": "orc"}}, "There is no reward 'orc'. Did you mean 'ocr'"),
        ({"reward_funcs": {"count": 1}}, "must be callables"),
        (
            {"reward_funcs": {"count": lambda images, prompts: []}},
            "tasks that `eval_dataset` has no prompts for: \\['count'\\]",
        ),
        ({"prompt_cache_size": 3}, "`prompt_cache_size` is 3, but this process needs 4 prompts at once"),
        ({"peft_config": small_lora(lora_dropout=0.1)}, "has `lora_dropout=0.1`.* Set `lora_dropout=0`"),
        ({"peft_config": small_lora(init_lora_weights="pissa")}, "the student: .* changes the base weights"),
        ({"peft_config": small_lora(bias="all")}, "the student: .* trains biases of the base model"),
        ({"peft_config": small_lora(modules_to_save=["proj_out"])}, "the student: .*modules_to_save"),
        ({"optimizers": (torch.optim.SGD([torch.zeros(1)], lr=1.0), None)}, "`optimizers` must hold functions"),
        ({"optimizers": (None, lambda optimizer: None)}, "a scheduler without an optimizer"),
        ({"eval_num_inference_steps": 1}, "`eval_num_inference_steps` must be more than skip_last_steps = 1, .* is 1"),
        ({"num_inference_steps": 1}, "`num_inference_steps` must be more than skip_last_steps = 1"),
        ({"max_sequence_length": 513}, "`max_sequence_length` must be at most 512 for this model, but is 513"),
        ({"height": 18}, "`height` must be a multiple of 4 .* but is 18. Use 16"),
        ({"width": 64}, "`width` must be at most 32"),
    ],
)
def test_mistakes_are_refused_at_start_up(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **arguments)


def test_a_pipeline_with_adapters_is_refused(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.transformer.add_adapter(small_lora(), adapter_name="mine")
    with pytest.raises(ValueError, match="has adapters already \\(mine\\)"):
        make_trainer(tmp_path, pipeline=pipeline)


def test_own_optimizer_and_scheduler(tmp_path):
    def constant(optimizer):
        return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)

    trainer = make_trainer(
        tmp_path, max_steps=1, optimizers=(lambda parameters: torch.optim.SGD(parameters, lr=2.0), constant)
    )
    before = student_state(trainer)
    gradients = run_round(trainer)
    trainer.state.global_step = 0
    trainer.train()
    norm = torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum().sqrt()
    assert 0 < norm < 1, "no clipping"
    for name, tensor in student_state(trainer).items():
        torch.testing.assert_close(tensor, before[name] - 2.0 * gradients[name], rtol=1e-4, atol=1e-7)


def test_nan_gradients_stop_before_they_reach_the_weights(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=3, save_strategy="steps", save_steps=1)
    poisoned = next(p for n, p in trainer.transformer.named_parameters() if "lora_B.default" in n)
    poisoned.register_hook(lambda gradient: gradient * float("nan") if trainer.state.global_step == 1 else gradient)
    with pytest.raises(FloatingPointError, match="The gradient of round 1 has the norm nan"):
        trainer.train()
    assert (tmp_path / "out" / "checkpoint-1").is_dir() and not (tmp_path / "out" / "checkpoint-2").exists()
    assert all(torch.isfinite(tensor).all() for tensor in student_state(trainer).values())


def test_epochs_count_passes_over_the_largest_task(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=-1, num_train_epochs=2)
    trainer.train()
    assert trainer.state.global_step == 2 * math.ceil(5 / 2)
    assert trainer.state.epoch == 2.0


def test_step_time_is_that_of_the_whole_round(tmp_path):
    trainer = make_trainer(tmp_path, gradient_accumulation_steps=3, max_steps=2)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["images_per_second"] == pytest.approx(3 * 4 / entry["step_time"], rel=1e-5)


def test_text_encoders_are_moved_for_each_chunk_and_not_in_between(tmp_path):
    trainer = make_trainer(tmp_path, prompt_cache_size=4, max_steps=3)
    moves = []
    encoder = trainer.pipeline.text_encoder_3
    to = type(encoder).to

    def watch(device):
        moves.append((trainer.state.global_step, str(device)))
        return to(encoder, device)

    encoder.to = watch
    trainer.train()
    assert moves == [(step, device) for step in range(3) for device in ("cpu", "cpu")]
