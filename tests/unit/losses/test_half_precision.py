# SPDX-License-Identifier: Apache-2.0
"""
Differences of half precision velocities, which half precision cannot hold.

Numbers that lie close together have differences that are exact in any precision, so these velocities do not: the
subtraction itself would round.
"""

import pytest
import torch

from trl_diffusion_opd.losses.grpo import mean_shift
from trl_diffusion_opd.losses.nft import nft_losses
from trl_diffusion_opd.losses.opd import step_divergence
from trl_diffusion_opd.sampling.transitions import transition


def draw(seed: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 4, 16, 16, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
class TestDifferences:
    def test_the_case_is_one_where_half_precision_would_show(self, dtype):
        one, other = draw(0, dtype), draw(1, dtype)
        rounded = (one - other).double() - (one.double() - other.double())
        assert (rounded != 0).double().mean() > 0.3

    def test_step_divergence(self, dtype):
        student, teacher = draw(0, dtype), draw(1, dtype)
        at = transition("flow", student, student, 0.8, 0.7, noise_level=0.0, sigma_max=0.96)
        expected = 0.5 * 0.1**2 * (student.double() - teacher.double()).square().flatten(1).mean(1)
        torch.testing.assert_close(step_divergence(student, teacher, at).double(), expected, rtol=3e-7, atol=0)

    def test_its_gradient(self, dtype):
        """By elements: each is `2 w (v_S - v_T) / D`."""
        student, teacher = draw(0, dtype).requires_grad_(), draw(1, dtype)
        at = transition("flow", student, student, 0.8, 0.7, noise_level=0.0, sigma_max=0.96)
        step_divergence(student, teacher, at).sum().backward()
        expected = 0.1**2 * (student.double() - teacher.double()) / 1024
        torch.testing.assert_close(student.grad.double(), expected.to(dtype).double(), rtol=0, atol=0)

    def test_mean_shift(self, dtype):
        velocity, other = draw(0, dtype), draw(1, dtype)
        shift = mean_shift(velocity, other, torch.tensor(-0.25, dtype=torch.float64))
        assert shift.dtype == torch.float32
        expected = -0.25 * (velocity.double() - other.double()).flatten(1)
        torch.testing.assert_close(shift.double(), expected, rtol=1e-6, atol=0)

    def test_nft_losses(self, dtype):
        v, old, reference, clean, noise = (draw(seed, dtype) for seed in range(5))
        sigma, probability = torch.tensor([0.3, 0.8]), torch.tensor([0.2, 0.9])
        t = sigma[:, None, None, None]
        sample = (1 - t) * clean.float() + t * noise.float()
        arguments = [v, old, reference, sample, clean]
        ours = nft_losses(*arguments, sigma, probability, beta=0.5)
        exact = nft_losses(*(a.double() for a in arguments), sigma.double(), probability.double(), beta=0.5)
        for got, expected in zip(ours, exact, strict=True):
            torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=0)
