# SPDX-License-Identifier: Apache-2.0
"""Optimizer steps of Flow-GRPO, GRPO-Guard and DiffusionNFT, and the policies that they compare."""

import pytest
import torch

from tests.support.rl_reference import train_grpo, train_nft
from tests.support.rl_runs import (
    Forwards,
    brightness,
    in_float64,
    logs,
    make_trainer,
    perturb,
    prepare,
    run_round,
    student_and_old,
)
from tests.support.runs import student_state
from trl_diffusion_opd.lora.adapters import use_adapter
from trl_diffusion_opd.models.sampler import Policy


# Plain gradient descent: what a run has moved by is the sum of its gradients.
PLAIN = {"optim": "sgd", "max_grad_norm": 0.0, "weight_decay": 0.0}


def assert_moved_alike(trainer, reference, before) -> None:
    """Both have moved from `before`, by the same to a millionth of it."""
    moved, expected = student_and_old(trainer), student_and_old(reference)
    distance = sum((expected[name] - tensor).square().sum() for name, tensor in before.items()).sqrt()
    apart = sum((expected[name] - tensor).square().sum() for name, tensor in moved.items()).sqrt()
    assert distance > 1e-3 and apart < 1e-6 * distance, (distance, apart)


class TestGRPO:
    @pytest.mark.parametrize("solver", ["flow", "dance"])
    @pytest.mark.parametrize("beta", [0.0, 0.5])
    @pytest.mark.parametrize(("loss_type", "rate", "epsilon"), [("grpo", 1.0, 2e-5), ("grpo_guard", 0.3, 1e-5)])
    def test_steps_against_the_formulas_in_float64(self, tmp_path, loss_type, rate, epsilon, beta, solver):
        """Two rollouts of two steps, the second of which has ratios on both sides of their bounds."""

        def make(folder):
            trainer = make_trainer(
                "grpo",
                tmp_path / folder,
                loss_type=loss_type,
                beta=beta,
                solver=solver,
                epsilon=epsilon,
                learning_rate=rate,
                steps_per_rollout=2,
                num_generations=2,
                max_steps=4,
                **PLAIN,
            )
            perturb(in_float64(trainer))
            return trainer

        trainer, reference = make("a"), make("b")
        before = student_and_old(trainer)
        trainer.train()
        clipped = train_grpo(reference, brightness, 4)
        assert_moved_alike(trainer, reference, before)
        assert clipped[0] == clipped[2] == 0 and 0 < clipped[1] < 1 and 0 < clipped[3] < 1
        assert logs(trainer, "clip_ratio/brightness") == pytest.approx(clipped)

    @pytest.mark.parametrize("loss_type", ["grpo", "grpo_guard"])
    @pytest.mark.parametrize(
        "settings", [{}, {"bf16": True, "activation_checkpointing": True}, {"guidance_scale": 1.0}]
    )
    def test_the_ratio_is_one_at_the_first_pass_only(self, tmp_path, loss_type, settings):
        settings = {"guidance_scale": 4.5, "beta": 0.1, "max_steps": 4, **settings}
        trainer = make_trainer("grpo", tmp_path, loss_type=loss_type, steps_per_rollout=2, **settings)
        trainer.train()
        first, second, third, fourth = logs(trainer, "log_ratio/brightness")
        assert first == third == 0 and second > 0 and fourth > 0
        divergence = logs(trainer, "kl/brightness")
        assert divergence[0] == 0 and min(divergence[1:]) > 0, "a fresh LoRA is the base, a trained one is not"

    def test_the_noise_that_is_kept_is_the_noise_that_was_drawn(self, tmp_path):
        trainer = make_trainer("grpo", tmp_path, data=["a red circle"])
        trainer.prepare_prompts(0)
        (batch,) = trainer.rounds.batches(0)
        with torch.no_grad():
            latents, visited = trainer.draw(batch)
        generators = trainer.sampler.noise(batch.seeds)[1]
        assert len(visited) == 3 and latents.shape == (4, 4, 8, 8)
        for step in visited:
            drawn = torch.stack([torch.randn(4, 8, 8, generator=generator) for generator in generators])
            torch.testing.assert_close(step.noise, drawn, rtol=0, atol=1e-5)

    def test_accumulating_gives_the_gradient_of_one_large_batch(self, tmp_path):
        whole = run_round(make_trainer("grpo", tmp_path, per_device_train_batch_size=4))
        parts = run_round(make_trainer("grpo", tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2))
        for name, gradient in whole.items():
            torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-6 * gradient.abs().max().item())


class TestNFT:
    @pytest.mark.parametrize("nft_beta", [1.0, 0.1])
    def test_steps_against_the_formulas_in_float64(self, tmp_path, nft_beta):
        """Two rollouts of two steps; the first draws as the student, the second by a mean of the older policy and it."""

        def make(folder):
            trainer = make_trainer(
                "nft",
                tmp_path / folder,
                nft_beta=nft_beta,
                kl_coef=0.5,
                solver="dpm1",  # Euler steps
                old_policy_schedule=1,
                steps_per_rollout=2,
                num_generations=2,
                max_steps=4,
                **PLAIN,
            )
            perturb(in_float64(trainer))
            return trainer

        trainer, reference = make("a"), make("b")
        before = student_and_old(trainer)
        perturb(trainer, 0.04, "old")  # as an earlier run may have left it
        trainer.train()
        train_nft(reference, brightness, 4, lambda n: 0.001 * n)
        assert_moved_alike(trainer, reference, before)

    def test_old_policies_by_hand(self, tmp_path):
        trainer = make_trainer("nft", tmp_path)
        perturb(trainer)
        for schedule, step, kept in ((0, 85, 0.0), (1, 85, 0.085), (1, 800, 0.5), (2, 74, 0.0), (2, 85, 0.075)):
            perturb(trainer, 0.1, "old")
            before = student_and_old(trainer)
            trainer.args.old_policy_schedule, trainer.state.global_step = schedule, step
            trainer.prepare_rollout()
            for name, tensor in student_and_old(trainer).items():
                student = before[name.replace(".old.", ".default.")]
                expected = kept * before[name] + (1 - kept) * student if ".old." in name else before[name]
                torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-7)
                if kept == 0:
                    assert tensor.equal(student)

    def test_the_old_policy_draws(self, tmp_path):
        trainer = make_trainer("nft", tmp_path)
        trainer.prepare_prompts(0)
        (batch,) = trainer.rounds.batches(0)
        with torch.no_grad():
            first, kept = trainer.draw(batch)
            perturb(trainer)
            assert trainer.draw(batch)[0].equal(first) and kept is first
            trainer.prepare_rollout()
            assert not trainer.draw(batch)[0].allclose(first, atol=1e-3)

    def test_a_new_run_draws_as_its_student(self, tmp_path):
        trainer = make_trainer("nft", tmp_path)
        weights = student_and_old(trainer)
        assert all(weights[name.replace(".old.", ".default.")].equal(tensor) for name, tensor in weights.items())
        trainer.train()
        weights = student_and_old(trainer)
        assert not all(weights[name.replace(".old.", ".default.")].equal(tensor) for name, tensor in weights.items())
        trained = {name for name, p in trainer.transformer.named_parameters() if p.requires_grad}
        assert trained == {name for name in weights if ".default." in name}
        divergence = logs(trainer, "kl/brightness")
        assert divergence[0] == 0 and divergence[1] > 0

    def test_every_image_visits_noise_levels_in_an_order_of_its_own(self, tmp_path):
        trainer = make_trainer(
            "nft", tmp_path, num_inference_steps=6, skip_last_steps=1, per_device_train_batch_size=8
        )
        prepare(trainer)
        with Forwards(trainer.model) as forwards:
            trainer.training_step(trainer.model, {"micro_round": 0})
        learning = [t for t, graded in zip(forwards.timesteps, forwards.graded, strict=True) if graded]
        visited = torch.stack(learning, 1)  # a row for each image
        levels = set(trainer.schedule.timesteps.tolist())
        assert visited.shape == (8, 5)
        assert all(len(set(row)) == 5 and set(row) <= levels for row in visited.tolist())
        assert len({tuple(row) for row in visited.tolist()}) > 4
        assert set(visited.flatten().tolist()) == levels, "no level is left out for all"


@pytest.mark.parametrize("method", ["grpo", "nft"])
def test_the_reference_is_the_base_whatever_the_run_started_from(tmp_path, method):
    trainer = make_trainer(method, tmp_path)
    batch = trainer.rounds.batches(0)[0]
    trainer.prepare_prompts(0)
    text = trainer.prompts.conditioning(batch.prompts)
    x, t = trainer.sampler.noise(batch.seeds)[0], trainer.schedule.timesteps[1]
    base = trainer.sampler.velocity(Policy("base", 2.0), x, t, text)
    assert trainer.sampler.velocity(trainer.student_policy, x, t, text).equal(base), "B is zero"
    perturb(trainer)
    assert trainer.sampler.velocity(Policy("base", 2.0), x, t, text).equal(base)
    with torch.no_grad(), use_adapter(trainer.transformer, "default"):
        assert not trainer.model(x, t, *text.batch(2.0), 2.0).allclose(base, atol=1e-3)
    assert all(p.requires_grad for name, p in trainer.transformer.named_parameters() if ".default." in name)
    assert student_state(trainer)
