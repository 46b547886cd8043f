# SPDX-License-Identifier: Apache-2.0
"""How the losses of a rollout are handed out, against a rollout written out in float64."""

import math
from dataclasses import dataclass

import pytest
import torch

from trl_diffusion_opd.losses.distances import KL
from trl_diffusion_opd.losses.objective import Prediction, StepObjective, Visit
from trl_diffusion_opd.losses.registry import OBJECTIVES, make_objective
from trl_diffusion_opd.sampling.denoising import Schedule, Trajectory


SIGMAS = [1.0, 0.875, 0.75, 0.5, 0.25, 0.0]  # of float32
GUIDANCE = 2.0


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Run:
    """A batch of a toy: both branches of the student are linear in the state, those of the targets too."""

    def __init__(self, queries: dict[int, float], *, noise_level: float = 0.0, anchors=(), shape=(3, 4)):
        sigmas = torch.tensor(SIGMAS)
        self.schedule, self.num_steps, self.queries = Schedule(sigmas, 1000 * sigmas[:-1]), 5, queries
        self.generators = [torch.Generator().manual_seed(seed) for seed in range(shape[0])]
        self.draw, self.guidance_scale, self.targets = [0], GUIDANCE, [1.0, *anchors]
        self.noise, self.noise_level = draw(11, *shape), noise_level
        self.theta = torch.tensor([0.4, -0.3, 0.2, 0.7], dtype=torch.float64, requires_grad=True)
        self.calls = []

    def trajectory(self) -> Trajectory:
        return Trajectory(self.noise, self.schedule, noise_level=self.noise_level, generator=self.generators)

    def student(self, sample: torch.Tensor, timestep: torch.Tensor) -> Prediction:
        self.calls.append(("student", timestep.item() / 1000, torch.is_grad_enabled()))
        return guided(self.theta[0] * sample + self.theta[1], self.theta[2] * sample + self.theta[3])

    def target(self, sample: torch.Tensor, timestep: torch.Tensor, index: int = 0) -> Prediction:
        self.calls.append((f"target {index}", timestep.item() / 1000, torch.is_grad_enabled()))
        a, b = TARGETS[index]
        return guided(a * sample + b, a * sample)


TARGETS = [(-0.5, 0.1), (0.9, -0.6), (0.2, 0.3)]


def guided(positive: torch.Tensor, negative: torch.Tensor) -> Prediction:
    return Prediction(negative + GUIDANCE * (positive - negative), positive, negative)


@dataclass
class Reference:
    """A state of the rollout: what student and targets predict there, and the weight of Eq. 11 or 12."""

    state: torch.Tensor
    student: torch.Tensor
    targets: list[torch.Tensor]
    weight: float
    sigma: float

    def divergence(self, number: int = 0) -> torch.Tensor:
        return self.weight * (self.student - self.targets[number]).square().flatten(1).mean(1)


def written_out(run: Run) -> list[Reference]:
    """Every step of the rollout by Eq. 7, with the noise of each sample's generator."""
    a, b, c, d = run.theta.tolist()
    slope = [c + GUIDANCE * (a - c), d + GUIDANCE * (b - d)]
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(run.noise))]
    x, steps = run.noise, []
    for s, t in zip(SIGMAS[:-1], SIGMAS[1:], strict=True):
        v, level = slope[0] * x + slope[1], run.noise_level
        rate = level**2 * s / (1 - (SIGMAS[1] if s == 1 else s))
        coefficient = (1 + rate * (1 - s) / (2 * s)) * (t - s)
        weight = coefficient**2 / (2 * rate * (s - t)) if level else (t - s) ** 2 / 2
        steps.append(Reference(x, v, [a_k * x + GUIDANCE * b_k for a_k, b_k in TARGETS], weight, s))
        x = (1 + rate / (2 * s) * (t - s)) * x + coefficient * v
        if level:
            noise = [torch.randn(x.shape[1:], generator=g, dtype=torch.float64) for g in generators]
            x = x + math.sqrt(rate * (s - t)) * torch.stack(noise)
    return steps


def by_theta(at: Reference, by_velocity: torch.Tensor) -> torch.Tensor:
    """The gradient with respect to the parameters, from that with respect to the guided velocity."""
    g, ones = GUIDANCE, torch.ones_like(at.state)
    parts = [g * at.state, g * ones, (1 - g) * at.state, (1 - g) * ones]
    return torch.stack([(by_velocity * part).sum() for part in parts])


ALL = dict.fromkeys(range(5), 1.0)
SOME = {1: 0.5, 3: 2.5}


@pytest.mark.parametrize("shape", [(3, 4), (1, 2, 3, 3), (2, 2, 3, 3, 3)], ids=["flat", "one", "video"])
@pytest.mark.parametrize("anchors", [(), (0.3, 2.0)])
@pytest.mark.parametrize("noise_level", [0.0, 0.7])
@pytest.mark.parametrize("queries", [ALL, SOME, {0: 1.0}, {4: 1.0}])
def test_losses_and_their_gradients_are_those_of_the_rollout(queries, noise_level, anchors, shape):
    run = Run(queries, noise_level=noise_level, anchors=anchors, shape=shape)
    factors, dims, expected = [1.0, *anchors], math.prod(shape[1:]), torch.zeros(4, dtype=torch.float64)
    references = [(queries[j], at) for j, at in enumerate(written_out(run)) if j in queries]
    handed_out = 0
    for (weight, at), loss in zip(references, KL().losses(run), strict=True):
        value = weight * sum(factor * at.divergence(k) for k, factor in enumerate(factors))
        torch.testing.assert_close(loss.value.detach(), value, rtol=1e-9, atol=0)
        torch.testing.assert_close(loss.metrics["kl"], at.divergence(), rtol=1e-9, atol=0)
        for k, factor in enumerate(factors):
            by_velocity = 2 * weight * factor * at.weight * (at.student - at.targets[k]) / dims
            expected += by_theta(at, by_velocity)
        loss.value.sum().backward()
        handed_out += 1
    assert handed_out == len(queries) == KL().num_losses(len(queries))
    torch.testing.assert_close(run.theta.grad, expected, rtol=1e-8, atol=1e-15)


def test_steps_that_are_not_queried_run_without_gradients_and_the_rollout_ends_after_the_last():
    run = Run(SOME)
    list(KL().losses(run))
    student = [call for call in run.calls if call[0] == "student"]
    assert student == [
        ("student", 1.0, False),
        ("student", 0.875, True),
        ("student", 0.75, False),
        ("student", 0.5, True),
    ]
    assert [sigma for name, sigma, _ in run.calls if name == "target 0"] == [0.875, 0.5]


def test_a_forward_is_followed_by_its_loss_and_no_target_is_asked_between():
    run = Run(ALL, anchors=(0.5, 0.5))
    order = []
    for _ in KL().losses(run):
        order.append([name for name, *_ in run.calls])
        run.calls.clear()
    assert order == [["target 0", "target 1", "target 2", "student"]] * 5


def test_an_anchor_is_the_mixture_of_both_targets_but_for_a_constant():
    """`D(v; T) + b D(v; A)` has the gradient of `(1 + b) D(v; (T + b A) / (1 + b))`."""
    run = Run({2: 1.0}, anchors=(0.3,))
    (loss,) = KL().losses(run)
    (gradient,) = torch.autograd.grad(loss.value.sum(), run.theta)
    at = written_out(run)[2]
    mixture = (at.targets[0] + 0.3 * at.targets[1]) / 1.3
    expected = by_theta(at, 1.3 * 2 * at.weight * (at.student - mixture) / 4)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=0)


OF_STEPS = [name for name, objective in OBJECTIVES.items() if issubclass(objective, StepObjective)]


@pytest.mark.parametrize("name", OF_STEPS)
def test_the_divergence_is_logged_whatever_the_loss_is(name):
    run = Run(SOME, noise_level=0.7, anchors=(0.3,))
    references = [at for j, at in enumerate(written_out(run)) if j in SOME]
    for at, loss in zip(references, make_objective(name).losses(run), strict=True):
        assert list(loss.metrics) == ["kl"] and not loss.metrics["kl"].requires_grad
        assert loss.value.shape == (3,) and loss.value.requires_grad
        torch.testing.assert_close(loss.metrics["kl"], at.divergence(), rtol=1e-9, atol=0)


def test_an_objective_sees_the_visit_whole():
    visits = []

    @dataclass
    class Seen(StepObjective):
        name = "seen"
        title = "seen"

        def loss(self, visit: Visit) -> torch.Tensor:
            visits.append(visit)
            return visit.student.velocity.flatten(1).mean(1)

    run = Run(ALL, noise_level=0.7, anchors=(0.5,))
    list(Seen().losses(run))
    references = written_out(run)
    assert len(visits) == 10
    for j, at in enumerate(references):
        for k, visit in enumerate(visits[2 * j : 2 * j + 2]):
            torch.testing.assert_close(visit.student.velocity.detach(), at.student, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(visit.target.velocity, at.targets[k], rtol=1e-9, atol=1e-12)
            assert visit.sigma == at.sigma and visit.guidance_scale == GUIDANCE
            assert not visit.next_sample.requires_grad and visit.transition.mean.requires_grad
            if j < 4:
                torch.testing.assert_close(visit.next_sample, references[j + 1].state, rtol=1e-9, atol=1e-12)
