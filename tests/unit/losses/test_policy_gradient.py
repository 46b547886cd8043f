# SPDX-License-Identifier: Apache-2.0
"""The policy gradient against Eq. 11: its expected gradient, its noise, and each gradient by itself, in float64."""

import math

import pytest
import torch

from trl_diffusion_opd.losses.objective import Course, Prediction, Visit
from trl_diffusion_opd.losses.policy_gradient import ADVANTAGES, REDUCTIONS, PolicyGradient
from trl_diffusion_opd.sampling.transitions import Transition, transition


KINDS = [(advantage, reduction) for advantage in ADVANTAGES for reduction in REDUCTIONS]
A, S, T = 0.7, 0.6022, 0.4649  # a step of the schedule with 10 steps
RATE = A**2 * S / (1 - S)  # the paper's sigma_t^2
STD = math.sqrt(RATE * (S - T))  # of the whole step
SLOPE = (1 + RATE * (1 - S) / (2 * S)) * (T - S)  # d mean / d velocity, Eq. 7
DRAWS = 200_000


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def step_of(x: torch.Tensor, velocity: torch.Tensor) -> Transition:
    return transition("flow", x, velocity, S, T, noise_level=A, sigma_max=0.9601)


def visit_of(x: torch.Tensor, student: torch.Tensor, target: torch.Tensor, eps: torch.Tensor) -> Visit:
    """The visit of a state from which the noise `eps` was drawn."""
    step = step_of(x, student)
    return Visit(Prediction(student), Prediction(target), step, S, (step.mean + STD * eps).detach(), 4.5)


# --- In expectation ----------------------------------------------------------------------------------------------


class Toy:
    """One state, a velocity `a x + b sin x + c` of three parameters, and a target; what Eq. 11 says of them."""

    def __init__(self):
        self.x, self.theta = draw(0, 5), torch.tensor([0.4, -0.8, 0.3], dtype=torch.float64)
        self.jacobian = torch.stack([self.x, self.x.sin(), torch.ones(5, dtype=torch.float64)], 1)
        self.velocity = self.jacobian @ self.theta
        self.target = self.velocity + 0.8 * self.x + 0.5
        shift = SLOPE * (self.velocity - self.target)  # mean_S - mean_T
        self.divergence = (shift @ shift).item() / (2 * STD**2) / 5
        self.gradient = SLOPE * shift @ self.jacobian / STD**2 / 5
        self.score = SLOPE * self.jacobian / STD  # `eps @ score` is the gradient of log p of what was drawn
        self.u = -shift / STD  # (mean_T - mean_S) / s

    def gradients(self, advantage: str, reduction: str) -> torch.Tensor:
        """The gradient of each of many drawn steps, `[DRAWS, 3]`."""
        theta = self.theta.repeat(DRAWS, 1).requires_grad_()
        student = theta @ self.jacobian.T
        step, target = step_of(self.x.expand(DRAWS, 5), student), self.target.expand(DRAWS, 5)
        drawn = step.sample(torch.Generator().manual_seed(7)).detach()
        visit = Visit(Prediction(student), Prediction(target), step, S, drawn, 4.5)
        loss = PolicyGradient(advantage, reduction).loss(visit)
        return torch.autograd.grad(loss.sum(), theta)[0]

    def variance(self, advantage: str, reduction: str) -> torch.Tensor:
        """Of the gradient of a drawn step, for each parameter."""
        u, w, scale = self.u, self.score, (1.0 if reduction == "sum" else 1 / 5)
        if advantage == "kl":  # D eps w
            return (scale * self.divergence) ** 2 * w.square().sum(0)
        # (eps u - u^2 / 2) (eps w) / 5, by the fourth moments of the normal distribution
        squared = u @ u
        return (scale / 5) ** 2 * (squared * w.square().sum(0) * (1 + squared / 4) + (u @ w).square())


@pytest.fixture(scope="module")
def toy() -> Toy:
    return Toy()


@pytest.mark.parametrize(("advantage", "reduction"), KINDS)
def test_expected_gradient_is_that_of_the_closed_form_and_its_noise_the_predicted_one(toy, advantage, reduction):
    gradients = toy.gradients(advantage, reduction)
    # With means in the ratio, the gradient of `log_ratio` is a fifth of it: there are five dimensions.
    expected = toy.gradient / (5 if (advantage, reduction) == ("log_ratio", "mean") else 1)
    standard_error = gradients.std(0) / math.sqrt(DRAWS)
    assert (5 * standard_error < 0.1 * expected.abs()).all()  # or the next line would hold for anything
    assert ((gradients.mean(0) - expected).abs() < 5 * standard_error).all()
    torch.testing.assert_close(gradients.var(0), toy.variance(advantage, reduction), rtol=0.03, atol=0)


def test_sums_in_the_ratio_have_as_many_times_the_standard_deviation_as_there_are_dimensions(toy):
    mean, total = (toy.variance("kl", reduction) for reduction in REDUCTIONS)
    torch.testing.assert_close(total, 25 * mean, rtol=1e-12, atol=0)
    assert (mean > 0).all() and (toy.variance("log_ratio", "sum") > total).all()


def test_with_a_detached_divergence_nothing_but_noise_would_be_left(toy):
    """Why the advantage is differentiated: `r sg(D)`, written out."""
    eps = draw(3, DRAWS, 5)
    for scale in (1.0, 1 / 5):
        detached = scale * toy.divergence * eps @ toy.score
        standard_error = detached.std(0) / math.sqrt(DRAWS)
        assert (detached.mean(0).abs() < 5 * standard_error).all()
        assert (5 * standard_error < 0.1 * toy.gradient.abs()).all()


# --- Step by step ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (1, 4, 5, 6), (2, 4, 3, 5, 6)], ids=["image", "one", "video"])
@pytest.mark.parametrize(("advantage", "reduction"), KINDS)
def test_value_and_gradient_of_a_drawn_step(advantage, reduction, shape):
    dims, per_sample = math.prod(shape[1:]), (-1, *[1] * (len(shape) - 1))
    x, target, eps = (draw(seed, *shape) for seed in (0, 2, 3))
    student = draw(1, *shape).requires_grad_()
    loss = PolicyGradient(advantage, reduction).loss(visit_of(x, student, target, eps))
    (gradient,) = torch.autograd.grad(loss.sum(), student)

    shift = SLOPE * (student - target).detach()
    divergence = (shift**2).flatten(1).sum(1) / (2 * STD**2) / dims
    scale = SLOPE * eps / STD / (dims if reduction == "mean" else 1)  # the gradient of the ratio
    if advantage == "kl":
        value = divergence
        expected = SLOPE * shift / STD**2 / dims + divergence.reshape(per_sample) * scale
    else:
        # -(log p_T - log p_S) of x' = mean_S + s eps, without what the two have in common
        value = (((STD * eps + shift) ** 2 - (STD * eps) ** 2) / (2 * STD**2)).flatten(1).sum(1) / dims
        expected = value.reshape(per_sample) * scale
    torch.testing.assert_close(loss.detach(), value, rtol=1e-9, atol=0)
    torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-14)


@pytest.mark.parametrize(("advantage", "reduction"), KINDS)
def test_within_a_round_nothing_is_clipped(advantage, reduction):
    x, student, target, eps = (draw(seed, 4, 8) for seed in range(4))
    student.requires_grad_()
    losses = [PolicyGradient(advantage, reduction, e).loss(visit_of(x, student, target, eps)) for e in (1e-9, 0.5)]
    assert torch.equal(*losses)
    gradients = [torch.autograd.grad(loss.sum(), student, retain_graph=True)[0] for loss in losses]
    assert torch.equal(*gradients) and gradients[0].abs().min() > 0


@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_no_gradient_goes_to_the_target_or_the_drawn_state(advantage):
    x, student, target, eps = (draw(seed, 2, 8).requires_grad_() for seed in range(4))
    PolicyGradient(advantage).loss(visit_of(x, student, target, eps)).sum().backward()
    assert student.grad.abs().min() > 0
    assert x.grad is None or x.grad.abs().max() == 0
    assert target.grad is None and eps.grad is None


@pytest.mark.parametrize(("advantage", "reduction"), KINDS)
def test_a_student_that_is_its_target_has_neither_loss_nor_gradient(advantage, reduction):
    x, student, eps = (draw(seed, 2, 8) for seed in range(3))
    student.requires_grad_()
    loss = PolicyGradient(advantage, reduction).loss(visit_of(x, student, student.detach().clone(), eps))
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert loss.abs().max() == 0 and gradient.abs().max() == 0


@pytest.mark.parametrize(("advantage", "reduction"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_velocities_are_compared_in_float32(advantage, reduction, dtype):
    x, eps = (draw(seed, 2, 64, dtype=torch.float32) for seed in (0, 3))
    student, target = draw(1, 2, 64, dtype=dtype).requires_grad_(), draw(2, 2, 64, dtype=dtype)
    objective = PolicyGradient(advantage, reduction)
    loss = objective.loss(visit_of(x, student, target, eps))
    expected = objective.loss(visit_of(x.double(), student.detach().double(), target.double(), eps.double()))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.detach().double(), expected, rtol=1e-4, atol=1e-6)
    assert torch.autograd.grad(loss.sum(), student)[0].isfinite().all()


@pytest.mark.parametrize(("advantage", "reduction"), KINDS)
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_broken_sample_is_told_and_stays_alone(advantage, reduction, broken):
    x, student, target, eps = (draw(seed, 3, 8) for seed in range(4))
    target[1, 4] = broken
    loss = PolicyGradient(advantage, reduction).loss(visit_of(x, student, target, eps))
    assert loss.isfinite().tolist() == [True, False, True]


# --- What is refused ---------------------------------------------------------------------------------------------


def test_steps_that_are_not_drawn_are_refused_with_the_reason():
    PolicyGradient().check(Course("flow", 0.7, 4.5, has_branches=True))
    with pytest.raises(
        ValueError, match="at `noise_level` 0 the step is a function of the state: there is no density"
    ):
        PolicyGradient().check(Course("flow", 0.0, 4.5, has_branches=True))


@pytest.mark.parametrize("solver", ["ddim", "cps"])
@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_a_last_step_without_noise_is_refused(solver, advantage):
    x, student, target = (draw(seed, 2, 8) for seed in range(3))
    step = transition(solver, x, student, 0.0089, 0.0, noise_level=0.7, sigma_max=0.9601)
    visit = Visit(Prediction(student), Prediction(target), step, 0.0089, step.sample(), 4.5)
    with pytest.raises(ValueError, match=r"step from sigma 0\.0089 has no noise.*`skip_last_steps`"):
        PolicyGradient(advantage).loss(visit)


def test_velocities_of_different_shapes_are_refused():
    x, student, eps = (draw(seed, 2, 8) for seed in range(3))
    for advantage in ADVANTAGES:
        with pytest.raises(ValueError, match="must predict velocities of one shape"):
            PolicyGradient(advantage).loss(visit_of(x, student, draw(3, 1, 8), eps))


@pytest.mark.parametrize("value", ["ppo", None, True])
@pytest.mark.parametrize("name", ["advantage", "reduction"])
def test_unknown_forms_are_refused(name, value):
    with pytest.raises(ValueError, match=f"`{name}` of the objective 'policy_gradient' must be '.*' or '.*', but is"):
        PolicyGradient(**{name: value})


@pytest.mark.parametrize("value", [0.0, 1.0, -1e-4, math.nan, math.inf, True, "1e-4", None])
def test_clip_ranges_out_of_range_are_refused(value):
    with pytest.raises(ValueError, match="must be above 0 and below 1"):
        PolicyGradient(clip_range=value)
