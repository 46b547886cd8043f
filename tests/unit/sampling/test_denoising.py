# SPDX-License-Identifier: Apache-2.0
"""The denoising loop and its schedule: which states are visited, which noise is drawn, what is kept."""

import copy
import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from tests.support.tiny import tiny_inputs, tiny_transformer
from trl_diffusion_opd.models.sd3 import StableDiffusion3
from trl_diffusion_opd.models.velocity import VelocityModel
from trl_diffusion_opd.sampling.denoising import Schedule, denoise, make_schedule
from trl_diffusion_opd.sampling.transitions import SOLVERS, transition


STOCHASTIC_SOLVERS = ("flow", "dance", "cps", "ddim")


def scheduler(**kwargs) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **kwargs})


SCHEDULE = make_schedule(scheduler(), 10)


@pytest.fixture(scope="module")
def model() -> VelocityModel:
    return VelocityModel(tiny_transformer(num_layers=1), StableDiffusion3())


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    return tiny_inputs(batch_size=3)


def velocity_of(model, inputs, rows=slice(None)):
    prompt = {
        "prompt_embeds": inputs["encoder_hidden_states"][rows],
        "pooled_prompt_embeds": inputs["pooled_projections"][rows],
    }

    def velocity(sample, timestep):
        return model(sample, timestep, prompt, None, 1.0)

    return velocity


def roll_out(velocity, sample, schedule=SCHEDULE, **kwargs) -> torch.Tensor:
    """All states, of shape `[B, N + 1, ...]`."""
    with torch.no_grad():
        states = [sample, *(state.next_sample for state in denoise(velocity, sample, schedule, **kwargs))]
    return torch.stack(states, dim=1)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# --- Schedule ----------------------------------------------------------------------------------------------------


def test_schedule_of_sd35_is_shifted_twice():
    assert len(SCHEDULE) == 10
    published = [1.0, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0.0]
    assert SCHEDULE.sigmas.tolist() == pytest.approx(published, abs=5.1e-5)
    forty = make_schedule(scheduler(), 40)
    assert len(forty) == 40
    assert forty.sigmas[-5:].tolist() == pytest.approx([0.2062, 0.1465, 0.0810, 0.0089, 0.0], abs=5.1e-5)
    assert SCHEDULE.sigmas.dtype == torch.float32
    assert torch.equal(SCHEDULE.timesteps, 1000 * SCHEDULE.sigmas[:-1])


def test_schedule_repeats_the_formula_in_float64():
    def shift(sigma):
        return 3 * sigma / (1 + 2 * sigma)

    for num_steps in (2, 10, 28):
        even = torch.linspace(1, shift(0.001), num_steps, dtype=torch.float64)
        expected = torch.cat([shift(even), torch.zeros(1)])
        torch.testing.assert_close(make_schedule(scheduler(), num_steps).sigmas.double(), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("config", "arguments", "set_timesteps"),
    [
        ({}, {}, {}),
        ({"shift": 1.0}, {}, {}),
        ({}, {"sigmas": [1.0, 0.7, 0.2]}, {"sigmas": [1.0, 0.7, 0.2]}),
        ({"use_dynamic_shifting": True}, {"mu": 0.9}, {"mu": 0.9}),
        ({"use_dynamic_shifting": True}, {"mu": 0.0}, {"mu": 0.0}),
    ],
    ids=["default", "shift", "sigmas", "mu", "mu-zero"],
)
def test_schedule_is_the_schedulers_own(config, arguments, set_timesteps):
    num_steps = len(arguments.get("sigmas", range(7)))
    reference = scheduler(**config)
    reference.set_timesteps(num_steps, **set_timesteps)

    schedule = make_schedule(scheduler(**config), 7, **arguments)

    torch.testing.assert_close(schedule.sigmas, reference.sigmas, rtol=0, atol=1e-7)
    torch.testing.assert_close(schedule.timesteps, reference.timesteps, rtol=0, atol=1e-4)
    if config or arguments:
        assert schedule.sigmas.tolist() != make_schedule(scheduler(), num_steps).sigmas.tolist()


def test_schedule_leaves_the_scheduler_as_it_was():
    used = scheduler()
    used.set_timesteps(4)
    used.step(torch.zeros(1, 2), used.timesteps[0], torch.zeros(1, 2))
    before = copy.deepcopy(vars(used))
    config = dict(used.config)

    assert torch.equal(make_schedule(used, 10).sigmas, SCHEDULE.sigmas)

    assert dict(used.config) == config
    assert vars(used).keys() == before.keys()
    for name, value in vars(used).items():
        same = torch.equal(value, before[name]) if isinstance(value, torch.Tensor) else value == before[name]
        assert same, name
    assert used.step_index == 1


# --- States ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
def test_without_noise_first_order_solvers_walk_eulers_path(solver, model, inputs):
    velocity, x = velocity_of(model, inputs), inputs["hidden_states"]
    states = roll_out(velocity, x, solver=solver)

    expected = [x]
    with torch.no_grad():
        for j in range(10):
            dt = SCHEDULE.sigmas[j + 1] - SCHEDULE.sigmas[j]
            expected.append(expected[-1] + dt * velocity(expected[-1], SCHEDULE.timesteps[j]))
    expected = torch.stack(expected, dim=1)

    if solver == "flow":
        assert torch.equal(states, expected)
    elif solver == "dpm2":
        # Its first two steps are almost of first order (the first one's log-SNR step is some 70); the rest is not.
        torch.testing.assert_close(states[:, :2], expected[:, :2], rtol=0, atol=1e-5)
        assert (states - expected).abs().max() > 1e-2
    else:
        torch.testing.assert_close(states, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("solver", "noise_level"), [*((s, 0.7) for s in STOCHASTIC_SOLVERS), ("dpm1", 0.0), ("dpm2", 0.0)]
)
def test_every_step_is_the_solvers_transition_from_the_state_before(solver, noise_level, model, inputs):
    velocity, x = velocity_of(model, inputs), inputs["hidden_states"]
    sigmas = SCHEDULE.sigmas.tolist()
    generator, ours = generators(0, 0)
    history = None
    with torch.no_grad():
        for j, state in enumerate(
            denoise(velocity, x, SCHEDULE, solver=solver, noise_level=noise_level, generator=ours)
        ):
            predicted = velocity(x, SCHEDULE.timesteps[j])
            expected = transition(
                solver,
                x,
                predicted,
                sigmas[j],
                sigmas[j + 1],
                noise_level=noise_level,
                sigma_max=sigmas[1],
                history=history,
            )
            noise = torch.randn(x.shape, generator=generator) if expected.std > 0 else 0.0
            assert state.index == j
            assert torch.equal(state.sample, x)
            assert torch.equal(state.velocity, predicted)
            assert torch.equal(state.transition.mean, expected.mean)
            assert torch.equal(state.transition.std, expected.std)
            assert torch.equal(state.transition.coefficient, expected.coefficient)
            x, history = expected.mean + expected.std * noise, expected.history
            assert torch.equal(state.next_sample, x.float())
    assert j == 9


def test_dpm2_uses_what_the_step_before_saw(model, inputs):
    # The second-order term of the third step, by hand in float64.
    velocity, x = velocity_of(model, inputs), inputs["hidden_states"]
    with torch.no_grad():
        before, now = list(denoise(velocity, x, SCHEDULE, solver="dpm2", num_steps=3))[1:]
    r, s, t = SCHEDULE.sigmas[1:4].double().tolist()

    def log_snr(sigma):
        return math.log((1 - sigma) / sigma)

    m0 = now.sample.double() - s * now.velocity.double()
    m1 = before.sample.double() - r * before.velocity.double()
    h, h_before = log_snr(t) - log_snr(s), log_snr(s) - log_snr(r)
    estimate = m0 + (m0 - m1) / (2 * h_before / h)
    expected = t / s * now.sample.double() - (1 - t) * (math.exp(-h) - 1) * estimate
    torch.testing.assert_close(now.next_sample.double(), expected, rtol=0, atol=1e-6)
    first_order = now.sample.double() + (t - s) * now.velocity.double()
    assert (expected - first_order).abs().max() > 1e-3


def test_first_std_is_that_of_the_schedule_in_use(model, inputs):
    x = inputs["hidden_states"]
    for num_steps in (4, 10, 40):
        schedule = make_schedule(scheduler(), num_steps)
        velocity = velocity_of(model, inputs)
        with torch.no_grad():
            first = next(denoise(velocity, x, schedule, noise_level=0.7, generator=torch.Generator().manual_seed(0)))
        # With `sigmas[1]` in the denominator the step size cancels.
        assert first.transition.std.item() == pytest.approx(0.7, rel=1e-5)


def test_states_are_detached_and_each_step_has_a_graph_of_its_own(model, inputs):
    x = inputs["hidden_states"].clone().requires_grad_()
    generator = torch.Generator().manual_seed(0)
    weight = model.transformer.proj_out.weight
    for noise_level in (0.0, 0.7):
        gradients = []
        for state in denoise(
            velocity_of(model, inputs), x, SCHEDULE, noise_level=noise_level, generator=generator, num_steps=3
        ):
            assert not state.sample.requires_grad
            assert not state.next_sample.requires_grad
            assert state.velocity.requires_grad and state.transition.mean.requires_grad
            # A step's backward frees its own graph and needs no other.
            gradients.append(torch.autograd.grad(state.transition.mean.square().mean(), weight)[0])
        assert len(gradients) == 3
        assert all(gradient.abs().max() > 0 for gradient in gradients)
    assert x.grad is None


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_states_are_kept_in_float32_at_least(dtype, kept):
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)).to(dtype)

    def velocity(sample, index):
        assert sample.dtype == kept
        return (sample * 0.3).to(dtype)

    generator = torch.Generator().manual_seed(0)
    for state in denoise(velocity, x, SCHEDULE, noise_level=0.7, generator=generator):
        assert state.sample.dtype == state.next_sample.dtype == state.transition.mean.dtype == kept
        if dtype != kept:
            assert not torch.equal(state.next_sample.to(dtype).to(kept), state.next_sample)


def test_the_callers_sample_is_not_written_to(model, inputs):
    x = inputs["hidden_states"].clone()
    roll_out(velocity_of(model, inputs), x, noise_level=0.7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(x, inputs["hidden_states"])


# --- Steps -------------------------------------------------------------------------------------------------------


def test_the_model_is_called_once_for_each_next(model, inputs):
    calls = []

    def velocity(sample, timestep):
        calls.append(timestep)
        return -sample

    steps = denoise(velocity, inputs["hidden_states"], SCHEDULE)
    assert calls == []
    for j in range(10):
        assert next(steps).index == j
        assert torch.equal(torch.stack(calls), SCHEDULE.timesteps[: j + 1])
    with pytest.raises(StopIteration):
        next(steps)
    assert len(calls) == 10


@pytest.mark.parametrize("num_steps", [0, 1, 9])
def test_num_steps_stops_early_on_the_same_path(num_steps, model, inputs):
    x, calls = inputs["hidden_states"], []
    base = velocity_of(model, inputs)

    def velocity(sample, timestep):
        calls.append(timestep)
        return base(sample, timestep)

    whole = roll_out(base, x, noise_level=0.7, generator=torch.Generator().manual_seed(0))
    part = roll_out(velocity, x, noise_level=0.7, generator=torch.Generator().manual_seed(0), num_steps=num_steps)
    assert calls == list(SCHEDULE.timesteps[:num_steps])
    assert torch.equal(part, whole[:, : num_steps + 1])


def test_next_sample_can_be_replaced(model, inputs):
    velocity, x = velocity_of(model, inputs), inputs["hidden_states"]
    other = torch.randn(x.shape, generator=torch.Generator().manual_seed(9))
    seen = []
    with torch.no_grad():
        for state in denoise(velocity, x, SCHEDULE):
            seen.append(state.sample)
            if state.index == 4:
                state.next_sample = other
    assert torch.equal(seen[5], other)
    # From there on, the path is the one that leaves from the replacement.
    rest = Schedule(SCHEDULE.sigmas[5:], SCHEDULE.timesteps[5:])
    expected = roll_out(velocity_of(model, inputs), other, rest)
    assert torch.equal(torch.stack(seen[5:], dim=1), expected[:, :-1])


@pytest.mark.parametrize("noise_level", [0.0, 0.7])
def test_changing_next_sample_in_place_leaves_the_transition_alone(noise_level, model, inputs):
    velocity, x = velocity_of(model, inputs), inputs["hidden_states"]
    with torch.no_grad():
        state = next(
            denoise(velocity, x, SCHEDULE, noise_level=noise_level, generator=torch.Generator().manual_seed(0))
        )
        mean = state.transition.mean.clone()
        state.next_sample.mul_(0.5)
    assert torch.equal(state.transition.mean, mean)


# --- Generators --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", STOCHASTIC_SOLVERS)
def test_the_generator_decides_the_noise(solver, model, inputs):
    velocity, x = velocity_of(model, inputs), inputs["hidden_states"]
    paths = [
        roll_out(velocity, x, solver=solver, noise_level=0.7, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(paths[0], paths[1])
    assert (paths[0] - paths[2])[:, 1:].abs().flatten(2).amax(2).min() > 1e-2


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_rollout_without_noise_draws_nothing(solver, model, inputs):
    one, per_sample = torch.Generator().manual_seed(0), generators(0, 1, 2)
    before = torch.get_rng_state(), one.get_state(), [g.get_state() for g in per_sample]
    velocity, x = velocity_of(model, inputs), inputs["hidden_states"]
    paths = [roll_out(velocity, x, solver=solver, generator=g) for g in (one, per_sample, None)]
    assert torch.equal(paths[0], paths[1]) and torch.equal(paths[0], paths[2])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.equal(one.get_state(), before[1])
    assert all(torch.equal(g.get_state(), state) for g, state in zip(per_sample, before[2], strict=True))


def test_with_its_own_generator_a_sample_walks_the_same_path_in_any_batch(model, inputs):
    x = inputs["hidden_states"]
    together = roll_out(velocity_of(model, inputs), x, noise_level=0.7, generator=generators(5, 6, 7))
    for rows, seeds in (([0], (5,)), ([1], (6,)), ([2], (7,)), ([2, 0], (7, 5))):
        apart = roll_out(velocity_of(model, inputs, rows), x[rows], noise_level=0.7, generator=generators(*seeds))
        torch.testing.assert_close(apart, together[rows], rtol=0, atol=1e-4)  # sums in another order
    shared = roll_out(velocity_of(model, inputs), x, noise_level=0.7, generator=torch.Generator().manual_seed(5))
    assert (shared - together)[1:].abs().max() > 0.1


def test_a_wrong_number_of_generators_is_refused(model, inputs):
    steps = denoise(
        velocity_of(model, inputs), inputs["hidden_states"], SCHEDULE, noise_level=0.7, generator=generators(0, 1)
    )
    with pytest.raises(ValueError, match="Got 2 generators for a batch of 3. Pass one for each sample"):
        next(steps)


@pytest.mark.parametrize(
    ("solver", "noise_level", "message"),
    [
        ("euler", 0.0, "`solver` must be one of"),
        ("dpm2", 0.7, "is deterministic"),
        ("flow", -1.0, "finite number >= 0"),
    ],
)
def test_an_impossible_solver_is_refused(solver, noise_level, message, model, inputs):
    steps = denoise(
        velocity_of(model, inputs), inputs["hidden_states"], SCHEDULE, solver=solver, noise_level=noise_level
    )
    with pytest.raises(ValueError, match=message):
        next(steps)
