# SPDX-License-Identifier: Apache-2.0
"""Each solver's step against formulas written out in float64, other libraries, and exact solutions."""

import math

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from trl_diffusion_opd.sampling.transitions import SOLVERS, History, Transition, draw_noise, transition


STOCHASTIC_SOLVERS = ("flow", "dance", "cps", "ddim")
DETERMINISTIC_SOLVERS = ("dpm1", "dpm2")


def shift(sigma: float) -> float:
    return 3 * sigma / (1 + 2 * sigma)


def sd3_sigmas(num_steps: int) -> list[float]:
    """SD3.5's schedule in float64: evenly spaced from 1 to the shifted 1/1000, and all of it shifted once more."""
    last = shift(0.001)
    return [*(shift(1 + (last - 1) * j / (num_steps - 1)) for j in range(num_steps)), 0.0]


SIGMAS = sd3_sigmas(10)
STEPS = list(zip(SIGMAS[:-1], SIGMAS[1:], strict=True))
STEP_IDS = [f"step{j}" for j in range(len(STEPS))]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def step(solver: str, x, v, s: float, t: float, noise_level: float = 0.0, **kwargs) -> Transition:
    return transition(
        solver, x, v, s, t, noise_level=noise_level, sigma_max=kwargs.pop("sigma_max", SIGMAS[1]), **kwargs
    )


def field(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """A velocity that depends on the state and on the time, and on neither linearly."""
    return torch.tanh(x.flip(-1) + sigma) - x * (0.3 + sigma)


# --- Means and standard deviations -------------------------------------------------------------------------------


def eq_7(x, v, s, t, noise_level, sigma_max):
    """Eq. 5-7: drift of the SDE in terms of the score, `sigma_t = a sqrt(t / (1 - t))`."""
    sigma_t = noise_level * math.sqrt(s / (1 - (sigma_max if s == 1 else s)))
    drift = v + sigma_t**2 / (2 * s) * (x + (1 - s) * v)
    return x + drift * (t - s), sigma_t * math.sqrt(s - t)


def dance(x, v, s, t, noise_level, sigma_max):
    """Reverse SDE with a constant diffusion coefficient, by the score `-(x - (1 - s) x_0) / s^2`."""
    score = -(x - (1 - s) * (x - s * v)) / s**2
    return x + (v - noise_level**2 / 2 * score) * (t - s), noise_level * math.sqrt(s - t)


def ddim(x, v, s, t, noise_level, sigma_max):
    """DDIM as published, for a variance-preserving process: `x / sqrt((1-s)^2 + s^2)` is one."""
    norm_s, norm_t = (1 - s) ** 2 + s**2, (1 - t) ** 2 + t**2
    alpha_s, alpha_t = (1 - s) ** 2 / norm_s, (1 - t) ** 2 / norm_t
    std = noise_level * math.sqrt((1 - alpha_t) / (1 - alpha_s) * (1 - alpha_s / alpha_t))
    x0, eps = x - s * v, x + (1 - s) * v
    mean = math.sqrt(alpha_t) * x0 + math.sqrt(max(1 - alpha_t - std**2, 0.0)) * eps
    return math.sqrt(norm_t) * mean, math.sqrt(norm_t) * std


def cps(x, v, s, t, noise_level, sigma_max):
    """The noise of the next state is split between the predicted and fresh noise by an angle."""
    angle = noise_level * math.pi / 2
    return (1 - t) * (x - s * v) + t * math.cos(angle) * (x + (1 - s) * v), t * math.sin(angle)


def constant_x0(x, v, s, t, noise_level, sigma_max):
    """The straight line from x through the predicted clean sample: exact if that prediction never changes."""
    x0 = x - s * v
    return (1 - t) * x0 + t * (x - (1 - s) * x0) / s, 0.0


REFERENCES = {"flow": eq_7, "dance": dance, "cps": cps, "ddim": ddim, "dpm1": constant_x0, "dpm2": constant_x0}
CASES = [(solver, a) for solver in STOCHASTIC_SOLVERS for a in (0.0, 0.3, 0.7, 1.0)] + [("dpm1", 0.0), ("dpm2", 0.0)]


@pytest.mark.parametrize(("solver", "noise_level"), CASES)
@pytest.mark.parametrize(("s", "t"), STEPS, ids=STEP_IDS)
def test_every_step_has_the_mean_and_std_of_its_formula(solver, noise_level, s, t):
    x, v = draw(2, 4, 8, 8), draw(2, 4, 8, 8, seed=1)
    mean, std = REFERENCES[solver](x, v, s, t, noise_level, SIGMAS[1])

    result = step(solver, x, v, s, t, noise_level)

    assert result.mean.dtype == torch.float64
    torch.testing.assert_close(result.mean, mean, rtol=0, atol=1e-12)
    assert result.std.item() == pytest.approx(std, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(("s", "t"), STEPS, ids=STEP_IDS)
def test_eq_7_in_float32_is_accurate_to_float32(s, t):
    x, v = draw(2, 4, 8, 8, dtype=torch.float32), draw(2, 4, 8, 8, seed=1, dtype=torch.float32)
    mean, std = eq_7(x.double(), v.double(), s, t, 0.7, SIGMAS[1])

    result = step("flow", x, v, s, t, 0.7)

    assert result.mean.dtype == torch.float32
    torch.testing.assert_close(result.mean.double(), mean, rtol=0, atol=1e-6)
    assert result.std.item() == pytest.approx(std, rel=1e-12)


def test_std_of_each_step_of_the_papers_setting():
    stds = [step("flow", draw(1, 4), draw(1, 4), s, t, 0.7).std.item() for s, t in STEPS]

    published = [0.700, 0.743, 0.536, 0.446, 0.392, 0.353, 0.319, 0.282, 0.225]
    assert stds[:-1] == pytest.approx(published, abs=6e-4)
    assert stds[-1] == pytest.approx(0.0063, abs=6e-5)


def test_first_step_of_flow_takes_the_schedules_second_sigma_for_the_denominator():
    # sigma_t = 0.7 sqrt(1 / (1 - .9601)) = 3.506 before the step size.
    std = step("flow", draw(1, 4), draw(1, 4), 1.0, SIGMAS[1], 0.7).std.item()
    assert std / math.sqrt(1 - SIGMAS[1]) == pytest.approx(3.506, abs=1e-3)
    # The substitute makes the first std the noise level itself, whatever the schedule.
    for num_steps in (4, 10, 40):
        second = sd3_sigmas(num_steps)[1]
        first = step("flow", draw(1, 4), draw(1, 4), 1.0, second, 0.7, sigma_max=second)
        assert first.std.item() == pytest.approx(0.7, rel=1e-12)
    # A single step has no sigma between 1 and 0.
    assert step("flow", draw(1, 4), draw(1, 4), 1.0, 0.0, 0.7, sigma_max=0.0).std.item() == pytest.approx(0.7)


@pytest.mark.parametrize("solver", SOLVERS)
def test_sigma_max_matters_at_sigma_one_only(solver):
    noise_level = 0.7 if solver in STOCHASTIC_SOLVERS else 0.0
    x, v = draw(2, 4), draw(2, 4, seed=1)
    for s, t in STEPS:
        one, other = (step(solver, x, v, s, t, noise_level, sigma_max=m) for m in (0.9, 0.99))
        same = torch.equal(one.mean, other.mean) and torch.equal(one.std, other.std)
        assert same == (solver != "flow" or s < 1)


@pytest.mark.parametrize("solver", STOCHASTIC_SOLVERS)
def test_a_sigma_that_float32_rounded_below_one_counts_as_one(solver):
    x, v = draw(2, 4), draw(2, 4, seed=1)
    exact, rounded = (step(solver, x, v, s, SIGMAS[1], 0.7) for s in (1.0, 1.0 - 2.0**-24))
    torch.testing.assert_close(rounded.mean, exact.mean, rtol=0, atol=1e-6)
    assert rounded.std.item() == pytest.approx(exact.std.item(), rel=1e-6)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_nothing_is_infinite_at_either_end_of_the_schedule(solver, dtype):
    x, v = draw(2, 4, 8, 8, dtype=dtype), draw(2, 4, 8, 8, seed=1, dtype=dtype)
    for noise_level in (0.0, 0.7, 1.0) if solver in STOCHASTIC_SOLVERS else (0.0,):
        for s, t in (STEPS[0], STEPS[-1], (1.0, 0.0)):
            result = step(solver, x, v, s, t, noise_level, sigma_max=SIGMAS[1] if t else 0.5)
            drawn = result.sample(torch.Generator().manual_seed(0))
            for tensor in (result.mean, result.std, result.coefficient, drawn, result.log_prob(drawn)):
                assert tensor.isfinite().all()


@pytest.mark.parametrize("solver", ["ddim", "cps"])
def test_ddim_and_cps_end_without_noise_on_the_predicted_clean_sample(solver):
    x, v, s = draw(2, 4), draw(2, 4, seed=1), SIGMAS[-2]
    last = step(solver, x, v, s, 0.0, 0.7)
    assert last.std.item() == 0.0
    torch.testing.assert_close(last.mean, x - s * v, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("s", "t"), STEPS[1:], ids=STEP_IDS[1:])
def test_dance_is_flow_with_a_constant_noise(s, t):
    x, v = draw(2, 4), draw(2, 4, seed=1)
    one = step("dance", x, v, s, t, 0.7)
    other = step("flow", x, v, s, t, 0.7 / math.sqrt(s / (1 - s)))
    torch.testing.assert_close(one.mean, other.mean, rtol=0, atol=1e-12)
    assert one.std.item() == pytest.approx(other.std.item(), rel=1e-12)


# --- ODE ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["flow", "dance", "cps", "ddim", "dpm1"])
def test_without_noise_a_whole_rollout_is_eulers(solver):
    x = expected = draw(2, 4, 8, 8)
    for s, t in STEPS:
        expected = expected + (t - s) * field(expected, s)
        result = step(solver, x, field(x, s), s, t)
        x = result.sample()
        assert result.std.item() == 0.0
        torch.testing.assert_close(x, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver", ["flow", "dance"])
def test_without_noise_float32_steps_are_eulers_to_the_bit(solver):
    sigmas = torch.tensor(SIGMAS, dtype=torch.float32)
    x, v = draw(2, 4, 8, 8, dtype=torch.float32), draw(2, 4, 8, 8, seed=1, dtype=torch.float32)
    for s, t in zip(sigmas[:-1], sigmas[1:], strict=True):
        assert torch.equal(step(solver, x, v, s, t).mean, x + (t - s) * v)


def rollout(solver: str, x: torch.Tensor, sigmas: list[float], velocity=field) -> torch.Tensor:
    history = None
    for s, t in zip(sigmas[:-1], sigmas[1:], strict=True):
        result = step(solver, x, velocity(x, s), s, t, history=history)
        x, history = result.mean, result.history
    return x


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("num_steps", [3, 10])
def test_dpm2_is_diffusers_second_order_multistep_solver(num_steps):
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True,
        flow_shift=3.0,
        prediction_type="flow_prediction",
        solver_order=2,
        algorithm_type="dpmsolver++",
        solver_type="midpoint",
        final_sigmas_type="zero",
        lower_order_final=True,
    )
    scheduler.set_timesteps(num_steps)
    sigmas = scheduler.sigmas.tolist()
    assert sigmas[0] < 1  # diffusers has no step from 1
    x = expected = draw(2, 4, 8, 8, dtype=torch.float32)

    for s, timestep in zip(sigmas, scheduler.timesteps, strict=False):
        expected = scheduler.step(field(expected, s), timestep, expected, return_dict=False)[0]

    torch.testing.assert_close(rollout("dpm2", x, sigmas), expected, rtol=0, atol=5e-6)
    assert (rollout("dpm1", x, sigmas) - expected).abs().max() > 1e-2


def test_dpm2_follows_its_formula_from_sigma_one_to_zero():
    def log_snr(sigma):
        return math.log(max(1 - sigma, 1e-30) / max(sigma, 1e-30))

    x = draw(2, 4, 8, 8)
    expected, before, h_before = x, None, None
    for s, t in STEPS:
        x0 = expected - s * field(expected, s)
        h = log_snr(t) - log_snr(s)
        slope = 0.0 if before is None or t == 0 else (x0 - before) / (2 * h_before / h)
        expected = t / s * expected - (1 - t) * (math.exp(-h) - 1) * (x0 + slope)
        before, h_before = x0, h

    torch.testing.assert_close(rollout("dpm2", x, SIGMAS), expected, rtol=0, atol=1e-11)


def test_dpm2_without_history_and_at_the_last_step_is_first_order():
    x, v = draw(2, 4), draw(2, 4, seed=1)
    history = History(denoised=draw(2, 4, seed=2), log_snr_step=0.5)
    for s, t in STEPS:
        first_order = step("dpm1", x, v, s, t)
        assert torch.equal(step("dpm2", x, v, s, t).mean, first_order.mean)
        assert torch.equal(step("dpm2", x, v, s, t, history=history).mean, first_order.mean) == (t == 0)


def test_only_dpm2_hands_on_a_history_and_it_holds_no_graph():
    x, v = draw(2, 4), draw(2, 4, seed=1).requires_grad_()
    s, t = STEPS[3]
    for solver in SOLVERS:
        history = step(solver, x, v, s, t).history
        assert (history is not None) == (solver == "dpm2")
    history = step("dpm2", x, v, s, t).history
    torch.testing.assert_close(history.denoised, x - s * v.detach(), rtol=0, atol=1e-14)
    assert not history.denoised.requires_grad
    assert history.log_snr_step == pytest.approx(math.log((1 - t) / t * s / (1 - s)), rel=1e-12)


# --- Exact solutions for Gaussian data ---------------------------------------------------------------------------

# If x_0 ~ N(MEAN, SPREAD^2), everything is known: x_sigma ~ N((1 - sigma) MEAN, spread(sigma)^2).
MEAN, SPREAD = 1.5, 0.4


def spread(sigma: float) -> float:
    return math.sqrt(((1 - sigma) * SPREAD) ** 2 + sigma**2)


def gaussian_velocity(x: torch.Tensor, sigma: float) -> torch.Tensor:
    score = -(x - (1 - sigma) * MEAN) / spread(sigma) ** 2
    eps = -sigma * score
    x0 = MEAN + (1 - sigma) * SPREAD**2 / spread(sigma) ** 2 * (x - (1 - sigma) * MEAN)
    return eps - x0


def test_dpm2_converges_faster_than_first_order():
    x = draw(1, 64)
    start, end = 0.95, 0.05  # stop before 0, where any solver returns the last clean estimate
    exact = (1 - end) * MEAN + spread(end) / spread(start) * (x - (1 - start) * MEAN)
    errors = {}
    for solver in DETERMINISTIC_SOLVERS:
        for num_steps in (16, 32):
            sigmas = [start + (end - start) * j / num_steps for j in range(num_steps + 1)]
            errors[solver, num_steps] = (rollout(solver, x, sigmas, gaussian_velocity) - exact).abs().max().item()
    assert 1.6 < errors["dpm1", 16] / errors["dpm1", 32] < 2.4
    assert 3.2 < errors["dpm2", 16] / errors["dpm2", 32] < 4.8
    assert errors["dpm2", 32] < errors["dpm1", 32] / 4


# Not cps: it replaces the same share of the noise however short the step, which has no limit.
@pytest.mark.parametrize(("solver", "noise_level"), [("flow", 0.0), ("flow", 0.7), ("dance", 0.7), ("ddim", 0.7)])
def test_every_noise_keeps_the_distribution_of_the_data(solver, noise_level):
    # Each step is affine in x here, so that mean and variance of the state are carried along exactly.
    num_steps = 400
    sigmas = sd3_sigmas(num_steps)
    probes = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    mean, variance = 0.0, 1.0
    for s, t in zip(sigmas[:-1], sigmas[1:], strict=True):
        result = step(solver, probes, gaussian_velocity(probes, s), s, t, noise_level, sigma_max=sigmas[1])
        at_zero, at_one = result.mean.flatten().tolist()
        mean = at_zero + (at_one - at_zero) * mean
        variance = (at_one - at_zero) ** 2 * variance + result.std.item() ** 2
    assert mean == pytest.approx(MEAN, abs=0.02)
    assert math.sqrt(variance) == pytest.approx(SPREAD, abs=0.02)


# --- d mean / d velocity -----------------------------------------------------------------------------------------


def expected_coefficient(solver: str, s: float, t: float, a: float) -> float:
    if solver == "flow":
        return t - s if s == 1 else (1 + a**2 / 2) * (t - s)
    if solver == "dance":
        return (1 + a**2 * (1 - s) / (2 * s)) * (t - s)
    if solver in ("ddim", "cps"):
        if solver == "cps":
            std = t * math.sin(a * math.pi / 2)
        else:
            std = a * t * math.sqrt(1 - (t * (1 - s) / (s * (1 - t))) ** 2)
        return -(1 - t) * s + (1 - s) * math.sqrt(t**2 - std**2)
    return t - s


@pytest.mark.parametrize(("solver", "noise_level"), CASES)
@pytest.mark.parametrize(("s", "t"), STEPS, ids=STEP_IDS)
def test_coefficient_is_the_closed_form_and_the_gradient_of_the_mean(solver, noise_level, s, t):
    x, student, teacher = (draw(2, 4, 3, 3, seed=seed) for seed in range(3))
    student.requires_grad_()

    result = step(solver, x, student, s, t, noise_level)
    (gradient,) = torch.autograd.grad(result.mean.sum(), student)
    difference = result.mean - step(solver, x, teacher, s, t, noise_level).mean

    assert result.coefficient.item() == pytest.approx(expected_coefficient(solver, s, t, noise_level), rel=1e-9)
    torch.testing.assert_close(gradient, torch.full_like(gradient, result.coefficient.item()), rtol=1e-9, atol=0)
    torch.testing.assert_close(difference, result.coefficient * (student - teacher), rtol=0, atol=1e-12)


def test_coefficient_of_a_second_order_step_is_the_gradient_of_its_mean():
    x, v = draw(2, 4), draw(2, 4, seed=1).requires_grad_()
    history = History(denoised=draw(2, 4, seed=2), log_snr_step=0.5)
    for s, t in STEPS[1:-1]:
        result = step("dpm2", x, v, s, t, history=history)
        (gradient,) = torch.autograd.grad(result.mean.sum(), v)
        torch.testing.assert_close(gradient, torch.full_like(gradient, result.coefficient.item()), rtol=1e-9, atol=0)
        assert abs(result.coefficient.item() - (t - s)) > 1e-3  # it is not first order


# --- Types, shapes, state ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_stepped_in_float32(solver, dtype):
    noise_level = 0.7 if solver in STOCHASTIC_SOLVERS else 0.0
    x, v = draw(2, 4, 8, 8, dtype=dtype), draw(2, 4, 8, 8, seed=1, dtype=dtype)
    history = History(denoised=draw(2, 4, 8, 8, seed=2, dtype=dtype), log_snr_step=0.5)
    s, t = STEPS[4]

    for sample, velocity in ((x, v), (x.float(), v), (x, v.float())):
        half = step(solver, sample, velocity, s, t, noise_level, history=history)
        full = step(solver, x.float(), v.float(), s, t, noise_level, history=history)
        exact = step(solver, x.double(), v.double(), s, t, noise_level, history=history)
        assert half.mean.dtype == torch.float32
        assert torch.equal(half.mean, full.mean)
        torch.testing.assert_close(half.mean.double(), exact.mean, rtol=0, atol=1e-6)
        drawn = half.sample(torch.Generator().manual_seed(0))
        assert drawn.dtype == half.log_prob(drawn.to(dtype)).dtype == torch.float32


@pytest.mark.parametrize("solver", SOLVERS)
def test_float64_of_either_input_is_kept(solver):
    s, t = STEPS[4]
    for dtypes in ((torch.float64, torch.float32), (torch.float32, torch.float64)):
        result = step(solver, draw(2, 4, dtype=dtypes[0]), draw(2, 4, seed=1, dtype=dtypes[1]), s, t)
        assert result.mean.dtype == result.sample().dtype == torch.float64


@pytest.mark.parametrize("solver", SOLVERS)
def test_scalars_are_float64_on_the_cpu_without_a_graph(solver):
    v = draw(2, 4, dtype=torch.float32).requires_grad_()
    result = step(solver, draw(2, 4, dtype=torch.float32), v, *STEPS[4])
    for scalar in (result.std, result.coefficient):
        assert (scalar.dtype, scalar.shape, scalar.device.type) == (torch.float64, (), "cpu")
        assert not scalar.requires_grad


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shape", [(16,), (4, 3, 5), (4, 2, 3, 5)], ids=["flat", "image", "video"])
def test_any_trailing_shape_gives_what_its_flattened_samples_give(solver, shape):
    noise_level = 0.7 if solver in STOCHASTIC_SOLVERS else 0.0
    x, v, m = (draw(3, *shape, seed=seed, dtype=torch.float32) for seed in range(3))
    s, t = STEPS[4]

    result = step(solver, x, v, s, t, noise_level, history=History(m, 0.5))
    drawn = result.sample(torch.Generator().manual_seed(0))
    log_prob = result.log_prob(drawn)

    assert result.mean.shape == drawn.shape == x.shape
    assert log_prob.shape == (3,)
    for i in range(3):
        history = History(m[i].reshape(1, -1), 0.5)
        alone = step(solver, x[i].reshape(1, -1), v[i].reshape(1, -1), s, t, noise_level, history=history)
        assert torch.equal(alone.mean, result.mean[i].reshape(1, -1))
        torch.testing.assert_close(alone.log_prob(drawn[i].reshape(1, -1)), log_prob[i : i + 1])


@pytest.mark.parametrize("solver", SOLVERS)
def test_sigmas_may_be_tensors_and_nothing_is_remembered_or_changed(solver):
    noise_level = 0.7 if solver in STOCHASTIC_SOLVERS else 0.0
    x, v = draw(2, 4, dtype=torch.float32), draw(2, 4, seed=1, dtype=torch.float32)
    copies = x.clone(), v.clone()
    sigmas = torch.tensor(SIGMAS, dtype=torch.float32)
    first = step(solver, x, v, sigmas[4], sigmas[5], noise_level, sigma_max=sigmas[1])
    for s, t in STEPS:
        step(solver, x, v, s, t, noise_level).sample(torch.Generator().manual_seed(0))
    again = step(solver, x, v, sigmas[4].item(), sigmas[5].item(), noise_level, sigma_max=sigmas[1].item())
    assert torch.equal(first.mean, again.mean)
    assert torch.equal(first.std, again.std)
    assert torch.equal(x, copies[0]) and torch.equal(v, copies[1])


# --- Sampling and densities --------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", STOCHASTIC_SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_prob_is_the_gaussian_density_averaged_over_the_dimensions(solver, dtype):
    x, v = draw(3, 4, 8, 8, dtype=dtype), draw(3, 4, 8, 8, seed=1, dtype=dtype)
    for s, t in STEPS:
        result = step(solver, x, v, s, t, 0.7)
        if result.std == 0:
            continue
        # Samples of very different density, so that a mixed-up batch would show.
        scales = torch.tensor([0.0, 1.0, 3.0]).view(3, 1, 1, 1)
        point = result.mean + result.std * scales * draw(3, 4, 8, 8, seed=2, dtype=dtype)
        normal = torch.distributions.Normal(result.mean.double(), result.std)
        expected = normal.log_prob(point.double()).flatten(1).mean(1)
        log_prob = result.log_prob(point)
        assert log_prob.dtype == dtype
        assert log_prob[0] > log_prob[1] > log_prob[2]
        torch.testing.assert_close(log_prob.double(), expected, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize(("solver", "step_index", "noise_level"), [*((s, 4, 0.0) for s in SOLVERS), ("ddim", 9, 0.7)])
def test_log_prob_of_a_deterministic_step_is_zero(solver, step_index, noise_level):
    x, v = draw(3, 4, 8, 8, dtype=torch.float32), draw(3, 4, 8, 8, seed=1, dtype=torch.float32)
    result = step(solver, x, v, *STEPS[step_index], noise_level)
    for point in (result.mean, x):
        assert torch.equal(result.log_prob(point), torch.zeros(3))


def test_log_prob_has_the_gradient_of_the_gaussian():
    x, v = draw(2, 4), draw(2, 4, seed=1).requires_grad_()
    result = step("flow", x, v, *STEPS[4], 0.7)
    point = result.sample(torch.Generator().manual_seed(0)).detach()
    (gradient,) = torch.autograd.grad(result.log_prob(point).sum(), v)
    expected = (point - result.mean) / result.std**2 * result.coefficient / 4  # a mean over 4 dimensions
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("solver", STOCHASTIC_SOLVERS)
def test_samples_have_the_mean_and_std_of_the_step(solver):
    count = 40_000
    x, v = torch.tensor([[0.7], [-1.3]]), torch.tensor([[-0.4], [2.1]])
    result = step(solver, x.expand(2, count), v.expand(2, count), *STEPS[5], 0.7)
    drawn = result.sample(torch.Generator().manual_seed(0))
    std = result.std.item()
    assert std > 0.05
    # Five standard errors.
    assert drawn.mean(1).tolist() == pytest.approx(result.mean[:, 0].tolist(), abs=5 * std / math.sqrt(count))
    assert drawn.std(1).tolist() == pytest.approx([std, std], rel=5 / math.sqrt(2 * count))
    assert torch.corrcoef(drawn)[0, 1].abs() < 5 / math.sqrt(count)


def test_a_generator_draws_the_noise_and_only_if_there_is_some():
    x, v = draw(2, 4, dtype=torch.float32), draw(2, 4, seed=1, dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    fresh = generator.get_state()

    noisy = step("flow", x, v, *STEPS[4], 0.7)
    expected = noisy.mean + noisy.std * torch.randn(2, 4, generator=torch.Generator().manual_seed(3))
    assert torch.equal(noisy.sample(generator), expected)
    assert not torch.equal(noisy.sample(generator), expected)

    generator.set_state(fresh)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    for still in (step("flow", x, v, *STEPS[4]), step("dpm2", x, v, *STEPS[4]), step("ddim", x, v, *STEPS[-1], 0.7)):
        assert torch.equal(still.sample(generator), still.mean)
        assert torch.equal(still.sample(), still.mean)
    assert torch.equal(generator.get_state(), fresh)
    assert torch.equal(torch.get_rng_state(), state)


def test_one_generator_for_each_sample_makes_its_noise_its_own():
    like = torch.zeros(3, 4, 2)
    together = draw_noise(like, [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)])
    for i, seed in enumerate((5, 6, 7)):
        assert torch.equal(together[i : i + 1], draw_noise(like[:1], torch.Generator().manual_seed(seed)))
    with pytest.raises(ValueError, match="Got 2 generators for a batch of 3. Pass one for each sample"):
        draw_noise(like, [torch.Generator(), torch.Generator()])


# --- Errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("solver", "noise_level", "message"),
    [
        ("euler", 0.0, "`solver` must be one of flow, dance, cps, ddim, dpm1, dpm2, but is 'euler'"),
        ("flow", -0.1, "`noise_level` must be a finite number >= 0, but is -0.1"),
        ("flow", math.nan, "`noise_level` must be a finite number >= 0, but is nan"),
        ("flow", math.inf, "`noise_level` must be a finite number >= 0, but is inf"),
        ("dpm1", 0.7, "`solver='dpm1'` is deterministic and takes no noise, but `noise_level` is 0.7"),
        ("dpm2", 0.7, "`solver='dpm2'` is deterministic and takes no noise, but `noise_level` is 0.7"),
        ("ddim", 1.1, "`noise_level` must be at most 1 for `solver='ddim'`"),
        ("cps", 1.1, "`noise_level` must be at most 1 for `solver='cps'`"),
    ],
)
def test_impossible_solvers_and_noise_levels_are_refused(solver, noise_level, message):
    with pytest.raises(ValueError, match=message):
        step(solver, draw(1, 4), draw(1, 4), *STEPS[4], noise_level)


@pytest.mark.parametrize(
    ("s", "t"), [(0.3, 0.5), (0.5, 0.5), (1.2, 0.5), (0.5, -0.1), (math.nan, 0.5), (0.5, math.nan)]
)
def test_sigmas_that_do_not_fall_from_one_to_zero_are_refused(s, t):
    with pytest.raises(ValueError, match="`sigma` must fall from at most 1 to at least 0"):
        step("flow", draw(1, 4), draw(1, 4), s, t)
