# SPDX-License-Identifier: Apache-2.0
"""Edges of the losses: bounds, zeros, and the precision of what is returned."""

import math

import pytest
import torch

from trl_diffusion_opd.losses.advantages import group_advantages, prompt_group
from trl_diffusion_opd.losses.grpo import check_guard, is_clipped, log_ratio, mean_shift, surrogate_loss
from trl_diffusion_opd.losses.nft import nft_losses, noised
from trl_diffusion_opd.losses.opd import step_divergence
from trl_diffusion_opd.sampling.transitions import transition


HIGH, LOW = math.log1p(1e-4), math.log1p(-1e-4)


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class TestPrecision:
    """The student's velocity decides; what is more precise beside it does not."""

    def test_step_divergence_and_mean_shift(self):
        student, teacher = draw(0, 2, 8, dtype=torch.float32), draw(1, 2, 8)
        step = transition("flow", student, student, 0.8, 0.7, noise_level=0.7, sigma_max=0.96)
        for other in (teacher, teacher.float()):
            assert step_divergence(student, other, step).dtype == torch.float32
            assert mean_shift(student, other, step.coefficient).dtype == torch.float32
        assert torch.equal(step_divergence(student, teacher, step), step_divergence(student, teacher.float(), step))

    @pytest.mark.parametrize("loss_type", ["grpo", "grpo_guard"])
    def test_log_ratio(self, loss_type):
        shift, noise, std = draw(0, 2, 8, dtype=torch.float32), draw(1, 2, 2, 4), torch.tensor(0.5).double()
        ratio = log_ratio(shift, noise, std, loss_type=loss_type)
        assert ratio.dtype == torch.float32
        assert torch.equal(ratio, log_ratio(shift, noise.float(), std, loss_type=loss_type))

    def test_nft_losses(self):
        v, old, reference, sample, clean = (draw(seed, 2, 4, 3, 3) for seed in range(5))
        sigma, probability = torch.tensor([0.3, 0.7]), torch.tensor([0.2, 0.4])
        single = [tensor.float() for tensor in (v, old, reference, sample, clean)]
        expected = nft_losses(*single, sigma, probability, beta=0.3)
        got = nft_losses(
            single[0], *(tensor.double() for tensor in single[1:3]), sample, clean, sigma, probability, beta=0.3
        )
        assert all(
            torch.equal(one, other) and one.dtype == other.dtype for one, other in zip(got, expected, strict=True)
        )
        # Single numbers of single precision are no reason to compute in it.
        precise = nft_losses(v, old, reference, sample, clean, sigma.double(), probability.double(), beta=0.3)
        rough = nft_losses(v, old, reference, sample, clean, sigma, probability, beta=0.3)
        assert all(torch.equal(one, other) for one, other in zip(rough, precise, strict=True))
        for sigma in (torch.tensor([0.1, 0.2]), torch.tensor([0.3, 0.7])):  # 1 - 0.1 is rounded in float32
            assert torch.equal(noised(clean, v, sigma), noised(clean, v, sigma.double()))


class TestSurrogate:
    def test_an_advantage_of_zero_gives_zero_whatever_the_ratio(self):
        ratios = torch.tensor([-1000.0, 0.0, 1000.0])
        assert surrogate_loss(ratios, torch.zeros(3), 1e-4).abs().tolist() == [0, 0, 0]
        assert not is_clipped(ratios, torch.zeros(3), 1e-4).any()

    @pytest.mark.parametrize("size", [0.01, 0.5, 3.0])
    def test_advantages_of_all_sizes_are_clipped_on_the_side_they_pull_to(self, size):
        ratios = torch.tensor([-0.1, 0.1, -0.1, 0.1], dtype=torch.float64, requires_grad=True)
        advantages = size * torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
        loss = surrogate_loss(ratios, advantages, 1e-4)
        expected = [-size * math.exp(-0.1), -size * (1 + 1e-4), size * (1 - 1e-4), size * math.exp(0.1)]
        assert loss.tolist() == pytest.approx(expected, rel=1e-12)
        assert is_clipped(ratios, advantages, 1e-4).tolist() == [False, True, True, False]
        (gradient,) = torch.autograd.grad(loss.sum(), ratios)
        assert (gradient == 0).tolist() == [False, True, True, False]

    def test_a_ratio_on_the_bound_still_has_its_gradient(self):
        ratios = torch.tensor([HIGH, LOW], dtype=torch.float64, requires_grad=True)
        advantages = torch.tensor([1.0, -1.0], dtype=torch.float64)
        (gradient,) = torch.autograd.grad(surrogate_loss(ratios, advantages, 1e-4).sum(), ratios)
        assert (gradient != 0).all() and not is_clipped(ratios, advantages, 1e-4).any()


def test_solvers_without_grpo_guard_are_refused_in_words():
    with pytest.raises(ValueError) as caught:
        check_guard("cps")
    assert str(caught.value) == (
        "`loss_type='grpo_guard'` is defined for the solvers flow and dance, but `solver` is 'cps'. Choose one of them, "
        "or `loss_type='grpo'`."
    )


def test_rewards_that_cancel_are_not_equal():
    same = torch.zeros(2, dtype=torch.long)
    advantages = group_advantages(torch.tensor([-1.0, 1.0]), same, same)
    assert advantages.tolist() == pytest.approx([-1 / 1.0001, 1 / 1.0001], rel=1e-12)


def test_a_group_has_the_same_number_everywhere():
    """In every process and Python: not Python's own hash, which differs from one to the next."""
    assert prompt_group("ocr", "a sign") == 1720887225807699304
    assert prompt_group("ocr", "a sign") != prompt_group("geneval", "a sign")
    numbers = {prompt_group(task, f"{prompt}") for task in ("a", "b") for prompt in range(10_000)}
    assert len(numbers) == 20_000 and 0 <= min(numbers) and 2**62 < max(numbers) < 2**63
