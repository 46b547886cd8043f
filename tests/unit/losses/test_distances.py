# SPDX-License-Identifier: Apache-2.0
"""The distances of student and target, value and gradient, against their formulas written out in float64."""

import math

import pytest
import torch

from trl_diffusion_opd.losses.distances import FORMS, KL, BranchMatching, CleanMatching, MeanMatching, VelocityMatching
from trl_diffusion_opd.losses.objective import Course, Prediction, StepObjective, Visit
from trl_diffusion_opd.losses.policy_gradient import PolicyGradient
from trl_diffusion_opd.sampling.transitions import transition


SIGMAS = [1.0, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0.0]
STEPS = list(zip(SIGMAS[:-1], SIGMAS[1:], strict=True))
SHAPES = {"image": (3, 4, 5, 6), "one": (1, 4, 5, 6), "video": (2, 4, 3, 5, 6)}


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def visit_of(student, target, s: float, t: float, noise_level: float = 0.0, g: float = 4.5) -> Visit:
    """A visit with predictions, or velocities, in a step of the solver "flow"."""
    student, target = (p if isinstance(p, Prediction) else Prediction(p) for p in (student, target))
    x = torch.zeros_like(student.velocity)
    step = transition("flow", x, student.velocity, s, t, noise_level=noise_level, sigma_max=SIGMAS[1])
    return Visit(student, target, step, s, step.mean.detach(), g)


def guided(positive, negative, g: float) -> Prediction:
    return Prediction(negative + g * (positive - negative), positive, negative)


def variance_and_slope(s: float, t: float, noise_level: float) -> tuple[float, float]:
    """Variance of the step, and `d mean / d velocity`, from Eq. 7."""
    rate = noise_level**2 * s / (1 - (SIGMAS[1] if s == 1 else s))
    return rate * (s - t), (1 + rate * (1 - s) / (2 * s)) * (t - s)


def kl_weight(s: float, t: float, noise_level: float) -> float:
    variance, slope = variance_and_slope(s, t, noise_level)
    return slope**2 / (2 * variance) if noise_level else slope**2 / 2


WEIGHTS = {
    KL: kl_weight,
    MeanMatching: lambda s, t, noise_level: variance_and_slope(s, t, noise_level)[1] ** 2 / 2,
    VelocityMatching: lambda s, t, noise_level: 1.0,
    CleanMatching: lambda s, t, noise_level: s**2,
}


def shares(objective: StepObjective, noise_level: float = 0.0) -> list[float]:
    """Weights of the first nine steps in percent of their sum."""
    visits = [visit_of(draw(0, 1, 2), draw(1, 1, 2), s, t, noise_level) for s, t in STEPS[:9]]
    weights = [objective.weight(visit.transition, visit.sigma) for visit in visits]
    return [100 * weight / sum(weights) for weight in weights]


# --- Weighted distances of the velocities ------------------------------------------------------------------------


@pytest.mark.parametrize("noise_level", [0.0, 0.7])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("objective", WEIGHTS)
def test_value_and_gradient_are_those_of_the_formula(objective, shape, noise_level):
    dims = math.prod(shape[1:])
    for s, t in STEPS:
        student, target = draw(0, *shape).requires_grad_(), draw(1, *shape).requires_grad_()
        visit = visit_of(student, target, s, t, noise_level)
        loss = objective().loss(visit)
        (gradient,) = torch.autograd.grad(loss.sum(), student)

        weight = WEIGHTS[objective](s, t, noise_level)
        difference = (student - target).detach()
        expected = weight * (difference**2).reshape(shape[0], dims).sum(1) / dims
        torch.testing.assert_close(loss.detach(), expected, rtol=1e-9, atol=0)
        torch.testing.assert_close(gradient, 2 * weight * difference / dims, rtol=1e-9, atol=0)
        assert objective().weight(visit.transition, s) == pytest.approx(weight, rel=1e-9)


@pytest.mark.parametrize("objective", WEIGHTS)
def test_no_gradient_goes_to_the_target(objective):
    student, target = draw(0, 2, 8).requires_grad_(), draw(1, 2, 8).requires_grad_()
    objective().loss(visit_of(student, target, *STEPS[3], 0.7)).sum().backward()
    assert target.grad is None and student.grad.abs().min() > 0


def test_mean_matching_is_the_kl_times_the_variance_of_the_step():
    student, target = draw(0, 2, 8), draw(1, 2, 8)
    for s, t in STEPS:
        visit = visit_of(student, target, s, t, 0.7)
        variance, _ = variance_and_slope(s, t, 0.7)
        torch.testing.assert_close(MeanMatching().loss(visit), KL().loss(visit) * variance, rtol=1e-9, atol=0)


def test_clean_matching_is_the_distance_of_the_clean_estimates():
    state, student, target = (draw(seed, 2, 8) for seed in range(3))
    for s, t in STEPS:
        expected = ((state - s * student) - (state - s * target)).square().mean(1)
        loss = CleanMatching().loss(visit_of(student, target, s, t))
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)


def test_shares_of_the_steps_are_those_of_the_tables():
    assert shares(MeanMatching()) == pytest.approx([1.0, 1.4, 2.0, 2.9, 4.4, 7.1, 12.1, 22.5, 46.6], abs=0.1)
    assert shares(VelocityMatching(), 0.7) == pytest.approx([100 / 9] * 9, rel=1e-12)
    assert shares(CleanMatching(), 0.7) == pytest.approx([19.0, 17.5, 15.8, 14, 11.8, 9.5, 6.9, 4.1, 1.5], abs=0.06)
    assert shares(KL(), 0.7) == pytest.approx([0.09, 0.18, 0.5, 1.0, 2.0, 4.0, 8.3, 19.7, 64.1], abs=0.1)


# --- Both branches of guidance -----------------------------------------------------------------------------------


def branches_of(shape: tuple[int, ...], g: float, *, seed: int = 0) -> tuple[Prediction, Prediction]:
    student = [draw(seed + i, *shape).requires_grad_() for i in range(2)]
    target = [draw(seed + i, *shape).requires_grad_() for i in (2, 3)]
    return guided(*student, g), guided(*target, g)


@pytest.mark.parametrize("noise_level", [0.0, 0.7])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_branches_are_matched_by_the_formula_of_their_form(form, shape, noise_level):
    g, share, dims = 4.5, 0.3, math.prod(shape[1:])
    student, target = branches_of(shape, g)
    loss = BranchMatching(form, share).loss(visit_of(student, target, *STEPS[4], noise_level, g))
    gradients = torch.autograd.grad(loss.sum(), (student.positive, student.negative), retain_graph=True)

    w = kl_weight(*STEPS[4], noise_level)
    e_c = (target.positive - student.positive).detach()
    e_u = (target.negative - student.negative).detach()
    value, by_c, by_u = {
        "split": (e_c**2 + e_u**2, -2 * e_c, -2 * e_u),
        "guided": (g**2 * e_c**2 + (g - 1) ** 2 * e_u**2, -2 * g**2 * e_c, -2 * (g - 1) ** 2 * e_u),
        "difference": (
            e_c**2 + share * (e_c - e_u) ** 2,
            -2 * e_c - 2 * share * (e_c - e_u),
            2 * share * (e_c - e_u),
        ),
    }[form]
    torch.testing.assert_close(loss.detach(), w * value.flatten(1).sum(1) / dims, rtol=1e-9, atol=0)
    for gradient, expected in zip(gradients, (by_c, by_u), strict=True):
        torch.testing.assert_close(gradient, w * expected / dims, rtol=1e-9, atol=1e-15)
    loss.sum().backward()
    assert target.positive.grad is None and target.negative.grad is None


def test_the_guided_form_is_the_guided_loss_without_what_the_errors_have_in_common():
    """The average over both signs of one of the errors, which cancels the cross term."""
    g = 3.0
    student, target = branches_of((2, 8), g)
    flipped = guided(target.positive, 2 * student.negative - target.negative, g)  # `e_u` changes its sign
    guided_losses = [KL().loss(visit_of(student, other, *STEPS[5], 0.7, g)) for other in (target, flipped)]
    loss = BranchMatching("guided").loss(visit_of(student, target, *STEPS[5], 0.7, g))
    torch.testing.assert_close(loss, sum(guided_losses) / 2, rtol=1e-9, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_errors_that_cancel_in_the_guided_sum_are_seen(form):
    g, error = 4.5, draw(9, 2, 8)
    student, _ = branches_of((2, 8), g)
    target = guided(student.positive + (g - 1) / g * error, student.negative + error, g)
    visit = visit_of(student, target, *STEPS[5], 0.7, g)
    assert KL().loss(visit).abs().max() < 1e-25
    assert BranchMatching(form).loss(visit).min() > 1e-3


def test_branches_are_subtracted_in_float32():
    student, target = (Prediction(*(draw(seed + i, 2, 64, dtype=torch.bfloat16) for i in range(3))) for seed in (0, 3))
    assert ((target.positive - target.negative).double() != target.positive.double() - target.negative.double()).any()
    for form in FORMS:
        loss = BranchMatching(form).loss(visit_of(student, target, *STEPS[5]))
        precise = [
            Prediction(p.velocity.double(), p.positive.double(), p.negative.double()) for p in (student, target)
        ]
        expected = BranchMatching(form).loss(visit_of(*precise, *STEPS[5]))
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)


def test_branches_need_guidance_that_is_made_of_two():
    BranchMatching().check(Course("flow", 0.0, 4.5, has_branches=True))
    with pytest.raises(ValueError, match="at `guidance_scale` 1 the student has one. Raise it above 1"):
        BranchMatching().check(Course("flow", 0.0, 1.0, has_branches=False))


# --- Edges -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_left_before_anything_is_subtracted(objective, dtype):
    student, target = draw(0, 2, 64, dtype=dtype).requires_grad_(), draw(1, 2, 64, dtype=dtype)
    loss = objective().loss(visit_of(student, target, *STEPS[7], 0.7))
    expected = objective().loss(visit_of(student.detach().double(), target.double(), *STEPS[7], 0.7))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.detach().double(), expected, rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert gradient.isfinite().all() and gradient.abs().max() > 0


@pytest.mark.parametrize("objective", WEIGHTS)
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_broken_sample_is_told_and_stays_alone(objective, broken):
    target = draw(1, 3, 8)
    target[1, 4] = broken
    loss = objective().loss(visit_of(draw(0, 3, 8), target, *STEPS[3]))
    assert loss.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("objective", [*WEIGHTS, BranchMatching])
def test_velocities_of_different_shapes_are_refused(objective):
    student, target = branches_of((2, 8), 2.0)[0], branches_of((1, 8), 2.0)[1]
    with pytest.raises(ValueError, match="must predict velocities of one shape"):
        objective().loss(visit_of(student, target, *STEPS[3]))


@pytest.mark.parametrize("objective", [BranchMatching(), PolicyGradient()])
def test_steps_cannot_be_importance_sampled_for_what_is_no_weighted_distance(objective):
    with pytest.raises(ValueError, match=f"weighted distance of velocities, but '{objective.name}' is none"):
        objective.weight(visit_of(draw(0, 1, 2), draw(1, 1, 2), *STEPS[3]).transition, STEPS[3][0])


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, True, "1", None])
def test_weights_of_the_difference_that_are_no_weights_are_refused(value):
    with pytest.raises(ValueError, match="`difference_weight` of the objective 'branches' must be a finite number"):
        BranchMatching(difference_weight=value)


@pytest.mark.parametrize("value", ["sum", None, 1])
def test_unknown_forms_are_refused(value):
    with pytest.raises(ValueError, match="must be one of split, guided, difference, but is"):
        BranchMatching(form=value)
