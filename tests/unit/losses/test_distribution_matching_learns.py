# SPDX-License-Identifier: Apache-2.0
"""DMD and TDM with a fake score that learns bring a student to the target's distribution."""

import pytest
import torch

from trl_diffusion_opd.losses.distribution_matching import DMD, TDM
from trl_diffusion_opd.losses.objective import Prediction
from trl_diffusion_opd.sampling.denoising import Schedule, Trajectory


BATCH, ROUNDS = 32, 200
MEAN, STD = 1.5, 0.5  # of the target


def gaussian_velocity(sample: torch.Tensor, timestep: torch.Tensor, mean: float, variance: float) -> torch.Tensor:
    """`E[eps - x_0 | x_t]` for Gaussian data."""
    t = timestep[:, None] / 1000
    centered = (sample - (1 - t) * mean) / ((1 - t) ** 2 * variance + t**2)
    return t * centered - mean - (1 - t) * variance * centered


class Run:
    """One step from noise to a Gaussian, `x_0 = x - (a x + b)`, and the score of a Gaussian with the moments of lessons."""

    def __init__(self):
        self.schedule, self.num_steps = Schedule(torch.tensor([1.0, 0.0]), torch.tensor([1000.0])), 1
        self.queries, self.guidance_scale, self.targets, self.draw = {0: 1.0}, 1.0, [1.0], [0]
        self.generators = [torch.Generator().manual_seed(seed) for seed in range(BATCH)]
        self.theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        self.moments = torch.zeros(3, dtype=torch.float64)

    def trajectory(self) -> Trajectory:
        noise = torch.stack([torch.randn(1, generator=generator) for generator in self.generators])
        return Trajectory(noise.double(), self.schedule)

    def student(self, sample: torch.Tensor, timestep: torch.Tensor) -> Prediction:
        return Prediction(self.theta[0] * sample + self.theta[1])

    def target(self, sample: torch.Tensor, timestep: torch.Tensor, index: int = 0) -> Prediction:
        return Prediction(gaussian_velocity(sample, timestep, MEAN, STD**2))

    def fake(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        mean, square = (self.moments[1:] / self.moments[0]).tolist()
        return gaussian_velocity(sample, timestep, mean, square - mean**2)

    def train_fake(
        self, sample: torch.Tensor, timestep: torch.Tensor, velocity: torch.Tensor, weight: torch.Tensor
    ) -> None:
        clean = (sample - timestep[:, None] / 1000 * velocity)[:, 0]
        lesson = torch.stack([weight.sum(), (weight * clean).sum(), (weight * clean**2).sum()])
        self.moments = 0.9 * self.moments + lesson


@pytest.mark.parametrize("objective", [DMD(fake_updates=1), TDM(fake_updates=1)])
def test_the_students_gaussian_becomes_the_targets(objective):
    run = Run()
    optimizer = torch.optim.Adam([run.theta], lr=0.1)
    for index in range(ROUNDS):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - index / ROUNDS)
        for loss in objective.losses(run):
            optimizer.zero_grad()
            loss.value.mean().backward()
            optimizer.step()
    a, b = run.theta.tolist()
    assert -b == pytest.approx(MEAN, abs=0.1)  # it was 0
    assert abs(1 - a) == pytest.approx(STD, abs=0.1)  # it was 1
