# SPDX-License-Identifier: Apache-2.0
"""The table of solvers: what it says of a solver is what the solver does, and all else follows from the table."""

import math

import pytest
import torch

from trl_diffusion_opd.losses.grpo import step_weight
from trl_diffusion_opd.sampling.solvers import SOLVERS, Coefficients, Solver, check_solver
from trl_diffusion_opd.sampling.transitions import transition


SIGMAS = [1.0, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0.0]
STEPS = list(zip(SIGMAS[:-1], SIGMAS[1:], strict=True))


def coefficients(solver, s, t, noise_level=0.0, previous_step=None):
    return SOLVERS[solver].step(s, t, noise_level, SIGMAS[1], previous_step)


@pytest.mark.parametrize("solver", SOLVERS)
class TestFlags:
    def test_a_deterministic_solver_has_no_noise_and_the_others_have(self, solver):
        largest = min(SOLVERS[solver].max_noise_level, 1.0)
        noises = [coefficients(solver, s, t, largest).std for s, t in STEPS[:-1]]
        assert all(noise == 0 for noise in noises) if SOLVERS[solver].is_deterministic else min(noises) > 0

    def test_the_largest_noise_level_is_where_the_next_state_is_all_new_noise(self, solver):
        """Or there is none: the noise of an SDE grows without a bound."""
        s, t = STEPS[0]
        if math.isfinite(SOLVERS[solver].max_noise_level) and not SOLVERS[solver].is_deterministic:
            step = coefficients(solver, s, t, SOLVERS[solver].max_noise_level)
            assert step.std == pytest.approx(t) and step.sample == pytest.approx(1 - t, abs=1e-7)
        elif not SOLVERS[solver].is_deterministic:
            assert coefficients(solver, s, t, 100.0).std > 10

    def test_whether_the_last_step_is_noiseless(self, solver):
        largest = min(SOLVERS[solver].max_noise_level, 0.7)
        still = coefficients(solver, *STEPS[-1], largest).std == 0
        assert still == (SOLVERS[solver].last_step_is_noiseless or SOLVERS[solver].is_deterministic)

    def test_whether_it_is_euler_without_noise(self, solver):
        """At every step but the first, which has no step before it."""
        gaps = []
        for (s, t), (earlier, _) in zip(STEPS[2:], STEPS[1:], strict=False):
            before = math.log((1 - s) / s) - math.log((1 - earlier) / earlier)
            step = coefficients(solver, s, t, previous_step=before)
            gaps += [abs(step.sample - 1), abs(step.velocity - (t - s)), abs(step.previous)]
        assert (max(gaps) < 1e-12) == SOLVERS[solver].is_euler_without_noise

    def test_every_solver_keeps_a_constant_velocity_exact_without_noise(self, solver):
        """`A x + C v + D m` for `x = (1 - s) x_0 + s e`, where every clean estimate is `x_0`."""
        x_0, noise = 1.7, -0.4
        for s, t in STEPS:
            step = coefficients(solver, s, t, previous_step=0.3)
            x = (1 - s) * x_0 + s * noise
            reached = step.sample * x + step.velocity * (noise - x_0) + step.previous * x_0
            assert reached == pytest.approx((1 - t) * x_0 + t * noise, abs=1e-12)

    def test_grpo_guard_is_for_the_solvers_with_a_factor(self, solver):
        """The published one, over `-dt`."""
        s, t = 0.7, 0.4
        if SOLVERS[solver].guard_factor is None:
            with pytest.raises(
                ValueError, match=f"is defined for the solvers flow and dance, but `solver` is '{solver}'"
            ):
                step_weight(solver, s, t, 0.7, loss_type="grpo_guard")
        else:
            published = {"flow": 1.0, "dance": 1 + 0.49 * 0.3 / 1.4}[solver] / 0.3
            assert step_weight(solver, s, t, 0.7, loss_type="grpo_guard") == pytest.approx(published, rel=1e-12)
        assert step_weight(solver, s, t, 0.7, loss_type="grpo") == 1.0


def test_a_solver_is_one_entry(monkeypatch):
    """The clean estimate at once. All that asks for solvers knows it from the table."""

    def at_once(s, t, noise_level, sigma_max, previous_step):
        return Coefficients(sample=1.0, velocity=-s, std=noise_level * t)

    monkeypatch.setitem(SOLVERS, "at_once", Solver(at_once, max_noise_level=0.5, guard_factor=lambda s, a: 2.0))
    x, v = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    step = transition("at_once", x, v, 0.8, 0.5, noise_level=0.5, sigma_max=0.96)
    assert torch.equal(step.mean, x - 0.8 * v) and step.std == 0.25 and step.history is None
    assert step_weight("at_once", 0.8, 0.5, 0.5, loss_type="grpo_guard") == pytest.approx(2 / 0.3)
    with pytest.raises(ValueError, match="`noise_level` must be at most 0.5 for `solver='at_once'`"):
        check_solver("at_once", 0.6)
    with pytest.raises(ValueError, match="one of flow, dance, cps, ddim, dpm1, dpm2, at_once, but is 'euler'"):
        check_solver("euler", 0.0)
    with pytest.raises(ValueError, match="choose one of the solvers flow, dance, cps, ddim, at_once"):
        check_solver("dpm1", 0.1)
