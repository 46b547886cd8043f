# SPDX-License-Identifier: Apache-2.0
"""DMD and TDM against their formulas written out in float64: what is asked where, and the student's gradient."""

import itertools
import math

import pytest
import torch

from trl_diffusion_opd.losses.distribution_matching import DMD, TDM
from trl_diffusion_opd.losses.objective import Course, Prediction
from trl_diffusion_opd.sampling.denoising import Schedule, Trajectory


SIGMAS = [1.0, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0.0]
SHAPES = {"image": (3, 2, 3, 4), "one": (1, 2, 3, 4), "video": (2, 2, 2, 3, 4)}
BOTH = pytest.mark.parametrize("objective", [DMD, TDM])


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Run:
    """A batch of a toy, whose student, target and fake score are linear in the state; it keeps what was asked."""

    def __init__(self, shape=(3, 4), *, draw_of=0, fake=(-0.4, 0.3), num_steps=9, jitter=0.0, dtype=torch.float64):
        sigmas = torch.tensor(SIGMAS)
        self.schedule, self.num_steps = Schedule(sigmas, 1000 * sigmas[:-1]), num_steps
        self.queries, self.guidance_scale, self.targets = dict.fromkeys(range(num_steps), 1.0), 4.5, [1.0]
        # Generators as those of a rollout, of each sample; one for all is quicker where there are thousands.
        one = [torch.Generator().manual_seed(0)] * shape[0]
        self.generators = one if shape[0] > 100 else [torch.Generator().manual_seed(i) for i in range(shape[0])]
        self.draw, self.noise, self.dtype = [draw_of], draw(9, *shape), dtype
        self.theta = torch.tensor([0.4, -0.3], dtype=torch.float64, requires_grad=True)
        self.fake_line, self.jitter, self.calls, self.lessons = fake, jitter, [], []

    def trajectory(self) -> Trajectory:
        return Trajectory(self.noise, self.schedule)

    def _asked(self, name: str, sample: torch.Tensor, timestep: torch.Tensor) -> None:
        assert not sample.requires_grad and not timestep.requires_grad
        self.calls.append((name, sample, timestep / 1000))

    def student(self, sample: torch.Tensor, timestep: torch.Tensor) -> Prediction:
        self._asked("graded" if torch.is_grad_enabled() else "student", sample, timestep)
        error = self.jitter * draw(len(self.calls), *sample.shape)  # kernels that do not repeat themselves
        return Prediction((self.theta[0] * sample + self.theta[1] + error).to(self.dtype))

    def target(self, sample: torch.Tensor, timestep: torch.Tensor, index: int = 0) -> Prediction:
        self._asked("target", sample, timestep)
        return Prediction((-0.7 * sample + 0.9).to(self.dtype))

    def fake(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        self._asked("fake", sample, timestep)
        return (self.fake_line[0] * sample + self.fake_line[1]).to(self.dtype)

    def train_fake(self, sample, timestep, velocity, weight) -> None:
        self._asked("lesson", sample, timestep)
        self.lessons.append((sample, timestep / 1000, velocity, weight))

    def one(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        ((sample, t),) = [call[1:] for call in self.calls if call[0] == name]
        return sample, t


def wide(t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return t.reshape(-1, *[1] * (like.ndim - 1))


def mean(values: torch.Tensor) -> torch.Tensor:
    return values.flatten(1).sum(1) / values[0].numel()


def state_of(run: Run) -> int:
    """The step of the rollout that was trained."""
    return min(range(10), key=lambda j: abs(SIGMAS[j] - run.one("graded")[1].item()))


def clean_of(run: Run) -> tuple[torch.Tensor, torch.Tensor]:
    """The student's state and clean estimate."""
    x, s = run.one("graded")
    return x, (x - s * (run.theta[0] * x + run.theta[1])).detach()


def is_standard_normal(values: torch.Tensor) -> bool:
    error = 1 / math.sqrt(values.numel())
    fourth = (values**4).mean().item()
    return abs(values.mean()) < 5 * error and abs(values.var() - 1) < 7.1 * error and abs(fourth - 3) < 50 * error


# --- The student -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("draw_of", range(4))
@BOTH
def test_the_student_is_moved_along_the_difference_of_the_clean_estimates(objective, draw_of, shape):
    run, dims = Run(shape, draw_of=draw_of), math.prod(shape[1:])
    (loss,) = objective().losses(run)
    (gradient,) = torch.autograd.grad(loss.value.sum(), run.theta)

    (x, s), (noisy, t) = run.one("graded"), run.one("target")
    for name in ("target", "fake"):
        assert torch.equal(run.one(name)[0], noisy) and torch.equal(run.one(name)[1], t)
    _, clean = clean_of(run)
    x0_target = noisy - wide(t, x) * (-0.7 * noisy + 0.9)
    x0_fake = noisy - wide(t, x) * (-0.4 * noisy + 0.3)
    d, gap = x0_fake - x0_target, mean((clean - x0_target).abs())
    if objective is DMD:
        value, by_clean = mean((d / wide(gap, x)) ** 2) / 2, d / wide(gap, x) / dims
    else:
        value, by_clean = mean(d**2) / gap, 2 * d / wide(gap, x) / dims
    torch.testing.assert_close(loss.value.detach(), value, rtol=1e-9, atol=0)
    # x_0 = x - s (a x + b)
    expected = torch.stack([-(s * x * by_clean).sum(), -(s * by_clean).sum()])
    torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=0)
    torch.testing.assert_close(loss.metrics["fake_gap"], mean(d.abs()), rtol=1e-9, atol=0)
    torch.testing.assert_close(loss.metrics["target_gap"], gap, rtol=1e-9, atol=0)
    assert loss.value.shape == (shape[0],) and not any(metric.requires_grad for metric in loss.metrics.values())


@pytest.mark.parametrize("jitter", [0.0, 1e-2])
@BOTH
def test_the_gradient_is_exactly_zero_where_the_fake_score_is_the_target(objective, jitter):
    run = Run(fake=(-0.7, 0.9), jitter=jitter)
    (loss,) = objective().losses(run)
    (gradient,) = torch.autograd.grad(loss.value.sum(), run.theta)
    assert loss.value.abs().max() == 0 and gradient.abs().max() == 0


@pytest.mark.parametrize("updates", [1, 3])
@BOTH
def test_the_fake_score_comes_first_and_nothing_between_the_graded_forward_and_its_loss(objective, updates):
    run = Run()
    (_,) = objective(fake_updates=updates).losses(run)
    names = [call[0] for call in run.calls]
    rolled = state_of(run) + 1
    assert names == ["student"] * rolled + ["lesson"] * updates + ["target", "fake", "graded"]
    assert objective().num_losses(9) == 1 and (DMD().fake_updates, TDM().fake_updates) == (5, 1)


@BOTH
def test_any_state_of_the_rollout_is_trained_but_for_a_last_tiny_sigma(objective):
    counts = [0] * 10
    for draw_of in range(450):
        run = Run((1, 1), draw_of=draw_of, num_steps=10)
        (_,) = objective(fake_updates=1).losses(run)
        counts[state_of(run)] += 1
        x = run.noise  # Euler's rollout of the student
        for s, t in zip(SIGMAS, SIGMAS[1 : state_of(run) + 1], strict=False):
            x = x + (t - s) * (0.4 * x - 0.3)
        torch.testing.assert_close(run.one("graded")[0], x, rtol=1e-6, atol=1e-7)
    assert counts[9] == 0 and all(abs(count - 50) < 5 * math.sqrt(50) for count in counts[:9])


@BOTH
def test_all_samples_and_processes_train_the_same_state(objective):
    runs = [Run((size, 4), draw_of=3) for size in (1, 5)]
    for run in runs:
        run.noise = draw(9, 5, 4)[: len(run.noise)]
        (_,) = objective().losses(run)
    assert state_of(runs[0]) == state_of(runs[1])
    for name in ("target", "lesson", "graded"):  # a sample's noise does not depend on the others
        pairs = zip(*([call for call in run.calls if call[0] == name] for run in runs), strict=True)
        assert all(torch.equal(one[1][0], other[1][0]) for one, other in pairs)
    _, t = runs[1].one("target")
    assert len(set(t.tolist())) == 5


# --- Where, and what the fake score learns ------------------------------------------------------------------------


def test_dmd_noises_the_clean_estimate_anew():
    run = Run((4000, 8), draw_of=1)
    (_,) = DMD(fake_updates=2).losses(run)
    _, clean = clean_of(run)
    asked = [(*run.one("target"), 0.02, 0.98), *((noisy, t, 0.0, 1.0) for noisy, t, *_ in run.lessons)]
    noises = []
    for noisy, t, low, high in asked:
        assert low <= t.min() < low + 0.01 and high - 0.01 < t.max() < high
        assert abs(t.mean().item() - 0.5) < 5 * (high - low) / math.sqrt(12 * 4000)
        assert abs(t.var().item() / ((high - low) ** 2 / 12) - 1) < 0.1  # uniform
        noises.append((noisy - (1 - wide(t, clean)) * clean) / wide(t, clean))
        assert is_standard_normal(noises[-1][t > 0.01])
    for one, other in itertools.combinations(noises, 2):
        assert abs((one * other).mean().item()) < 5 / math.sqrt(32_000)
    for (_, t, velocity, weight), eps in zip(run.lessons, noises[1:], strict=True):
        torch.testing.assert_close(velocity, eps - clean, rtol=1e-6, atol=1e-6)
        assert torch.equal(weight, torch.ones_like(t))


@pytest.mark.parametrize("state", [0, 4, 8])
def test_tdm_keeps_the_marginals_of_the_forward_process(state):
    """`x_u = (1 - u) x_0 + u e` becomes `(1 - t) x_0 + t z` with `z` standard normal, that has `(a_t / a_u) u / t` of `e`."""
    s, u = SIGMAS[state : state + 2]
    x0, e = draw(1, 1, 20), draw(2, 4000, 20)
    run = Run((4000, 20))
    noisy, t = TDM().comparison(run, (1 - s) * x0 + s * e, x0.expand(4000, 20), s, u)
    low, span, time = max(u, 0.02), s - max(u, 0.02), t[:, None]
    assert low <= t.min() < low + 0.01 * span and s - 0.01 * span < t.max() <= s
    assert abs((t.mean().item() - low) / span - 0.5) < 5 / math.sqrt(12 * 4000)
    z, kept = (noisy - (1 - time) * x0) / time, (1 - time) / (1 - u) * u / time
    for part in ((t - low) / span < 0.5, (t - low) / span >= 0.5):
        assert is_standard_normal(z[part])
    assert abs((z * e - kept).mean().item()) < 5 * math.sqrt(2) / math.sqrt(80_000)
    # What is added is the noise of the variance t^2 - (a_t u / a_u)^2.
    added = (noisy - (1 - time) * x0 - kept * time * e) / (time**2 - (kept * time) ** 2).sqrt()
    assert is_standard_normal(added)
    assert abs((added * e).mean().item()) < 5 / math.sqrt(80_000)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_tdm_teaches_the_clean_estimate_with_the_weights_of_the_formula(shape):
    states, capped = set(), set()
    for draw_of in range(30):
        run = Run(shape, draw_of=draw_of)
        (_,) = TDM(fake_updates=2).losses(run)
        (x, clean), state = clean_of(run), state_of(run)
        s, u = SIGMAS[state : state + 2]
        reached = x + (u - s) * (run.theta[0] * x + run.theta[1]).detach()
        for noisy, t, velocity, weight in run.lessons:
            assert (t >= max(u, 0.02) - 1e-6).all() and (t <= s + 1e-6).all() and weight.shape == (shape[0],)
            time = wide(t, x)
            torch.testing.assert_close(noisy - time * velocity, clean, rtol=1e-9, atol=1e-12)
            kept = (1 - time) / (1 - u)
            eps = (noisy - kept * reached) / (time**2 - (kept * u) ** 2).sqrt()
            mixed = (noisy - (1 - time) * clean) / time
            importance = (-mean(mixed**2) / 2).exp() / (-mean(eps**2) / 2).exp()
            snr = ((1 - t) / t) ** 2
            # The distance of clean estimates is t^2 times that of the velocities.
            expected = torch.where(snr > 5, 5.0, snr) * importance * t**2
            torch.testing.assert_close(weight, expected, rtol=1e-4, atol=0)
            assert not any(value.requires_grad for value in (noisy, t, velocity, weight))
            capped |= set((snr > 5).tolist())
        states.add(state)
    assert len(states) > 6 and capped == {True, False}


# --- Edges -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@BOTH
def test_half_precision_velocities_are_left_before_anything_is_subtracted(objective, dtype):
    run = Run((2, 64), dtype=dtype)
    run.noise = run.noise.float()
    (loss,) = objective().losses(run)
    assert loss.value.dtype == torch.float32
    assert all(sample.dtype == torch.float32 for _, sample, _ in run.calls)
    noisy, t = run.one("target")
    target, fake = ((a * noisy + b).to(dtype).double() for a, b in ((-0.7, 0.9), (-0.4, 0.3)))
    expected = mean((t.double()[:, None] * (target - fake)).abs())
    torch.testing.assert_close(loss.metrics["fake_gap"].double(), expected, rtol=1e-6, atol=0)


@BOTH
def test_a_student_that_draws_what_the_target_sees_has_a_finite_loss(objective):
    """`mean |x_0 - x_0,target|` of zero: all velocities and states are zero."""
    run = Run((2, 4), fake=(0.0, 0.0))
    run.target = lambda sample, timestep: Prediction(sample / (timestep / 1000)[:, None])
    run.fake, run.noise = (lambda sample, timestep: sample / (timestep / 1000)[:, None]), torch.zeros(2, 4)
    run.theta.data.zero_()
    (loss,) = objective().losses(run)
    (gradient,) = torch.autograd.grad(loss.value.sum(), run.theta)
    assert loss.value.tolist() == [0, 0] and gradient.abs().max() == 0


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@BOTH
def test_a_broken_sample_is_told_and_stays_alone(objective, broken):
    run = Run((3, 4))
    run.noise[1, 2] = broken
    (loss,) = objective().losses(run)
    assert loss.value.isfinite().tolist() == [True, False, True]


@BOTH
def test_courses_and_settings_are_checked(objective):
    name = objective.name
    objective(fake_learning_rate=1e-4).check(Course("dpm2", 0.0, 4.5, has_branches=True))
    with pytest.raises(ValueError, match=f"'{name}'` rolls the student out along its ODE, but `noise_level` is 0.7"):
        objective().check(Course("flow", 0.7, 4.5, has_branches=True))
    for value in (0, -1, 1.5, True, "5", None):
        with pytest.raises(ValueError, match=f"`fake_updates` of the objective '{name}' must be a whole number of at"):
            objective(fake_updates=value)
    for value in (0.0, -1e-4, math.nan, math.inf, True, "1e-4"):
        with pytest.raises(ValueError, match=f"`fake_learning_rate` of the objective '{name}' must be positive and"):
            objective(fake_learning_rate=value)
