# SPDX-License-Identifier: Apache-2.0
"""Edges of the sampling: schedulers that are refused, precision, devices, and sigmas next to 1."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

from trl_diffusion_opd.sampling.denoising import Trajectory, denoise, make_schedule
from trl_diffusion_opd.sampling.schedulers import check_scheduler
from trl_diffusion_opd.sampling.solvers import SOLVERS
from trl_diffusion_opd.sampling.transitions import History, draw_noise, transition


class Inherited(FlowMatchEulerDiscreteScheduler):
    """One of the user's own."""


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (
            FlowMatchHeunDiscreteScheduler(),
            "The scheduler must be a FlowMatchEulerDiscreteScheduler, but is a FlowMatchHeunDiscreteScheduler, whose own "
            "steps would be ignored. Set `pipe.scheduler` to one, and choose how to step by `solver`.",
        ),
        (
            Inherited(stochastic_sampling=True),
            "`stochastic_sampling=True` of the Inherited is not supported, for it would be ignored. Set it to False, and "
            "choose noise by `solver` and `noise_level`.",
        ),
        (
            Inherited(invert_sigmas=True),
            "`invert_sigmas=True` of the Inherited is not supported: the solvers go from sigma 1, noise, down to 0. Set "
            "it to False.",
        ),
    ],
    ids=["class", "stochastic", "inverted"],
)
def test_schedulers_that_cannot_be_followed_are_refused_by_name(scheduler, message):
    for refuse in (check_scheduler, lambda scheduler: make_schedule(scheduler, 4)):
        with pytest.raises(ValueError) as caught:
            refuse(scheduler)
        assert str(caught.value) == message


def test_others_are_taken():
    check_scheduler(Inherited(use_karras_sigmas=True, stochastic_sampling=False, invert_sigmas=False))


def test_log_probabilities_have_the_precision_of_the_mean():
    x = torch.ones(1, 4)
    step = transition("flow", x, x, 0.8, 0.7, noise_level=0.7, sigma_max=0.96)
    assert step.log_prob(torch.zeros(1, 4, dtype=torch.float64)).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_state_that_is_set_by_hand_does_not_change_the_precision(dtype):
    x, schedule = torch.ones(1, 2, 2, 2), make_schedule(FlowMatchEulerDiscreteScheduler(shift=3.0), 3)
    seen = []
    for step in denoise(lambda sample, index: torch.zeros_like(sample), x, schedule):
        seen.append(step.sample.dtype)
        step.next_sample = step.next_sample.to(dtype)
    assert seen == [torch.float32] * 3


def test_a_velocity_of_more_precision_does_not_change_that_of_the_states():
    schedule = make_schedule(FlowMatchEulerDiscreteScheduler(shift=3.0), 3)
    trajectory = Trajectory(torch.ones(1, 2, 2, 2), schedule)
    trajectory.step(torch.ones(1, 2, 2, 2, dtype=torch.float64))
    assert trajectory.sample.dtype == torch.float32


def test_timesteps_are_where_the_state_is():
    schedule = make_schedule(FlowMatchEulerDiscreteScheduler(shift=3.0), 3)
    assert Trajectory(torch.ones(1, 2, 2, 2, device="meta"), schedule).timestep.device.type == "meta"


def seeded(kind: str) -> torch.Generator | list[torch.Generator] | None:
    """A source of noise on the CPU: none, one for the batch, or one for each of two samples."""
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in (0, 1)]
    return {"none": None, "one": generators[0], "each": generators}[kind]


@pytest.mark.parametrize("kind", ["none", "one", "each"])
class TestNoise:
    def test_it_is_drawn_where_it_is_asked_for_whatever_the_default_device(self, kind):
        like = torch.ones(2, 3, device="cpu")
        with torch.device("meta"):
            noise = draw_noise(like, seeded(kind))
        assert noise.device.type == "cpu" and noise.std() > 0

    def test_it_goes_to_the_device_of_the_state(self, kind):
        """Drawn on the device of the generators, which a generator of another device would refuse."""
        assert draw_noise(torch.ones(2, 3, device="meta"), seeded(kind)).device.type == "meta"

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
    def test_it_has_the_precision_of_the_state(self, kind, dtype):
        assert draw_noise(torch.ones(2, 3, dtype=dtype), seeded(kind)).dtype == dtype


def test_what_is_remembered_does_not_change_the_precision():
    x = torch.ones(1, 4)
    history = History(torch.ones(1, 4, dtype=torch.float64), 0.5)
    step = transition("dpm2", x, 2 * x, 0.8, 0.7, noise_level=0.0, sigma_max=0.96, history=history)
    first = transition("dpm2", x, 2 * x, 0.8, 0.7, noise_level=0.0, sigma_max=0.96)
    assert step.mean.dtype == torch.float32 and not torch.equal(step.mean, first.mean)


def test_a_sigma_may_be_above_1_by_rounding():
    x = torch.ones(1, 4)
    transition("dance", x, x, 1.0 + 1e-6, 0.9, noise_level=0.0, sigma_max=0.9)
    with pytest.raises(ValueError, match="`sigma` must fall from at most 1 to at least 0"):
        transition("dance", x, x, 1.0 + 2e-6, 0.9, noise_level=0.0, sigma_max=0.9)


@pytest.mark.parametrize("solver", ["flow", "ddim"])
def test_a_sigma_that_differs_from_1_by_rounding_counts_as_1(solver):
    """Schedules are computed in float32."""
    noises = []
    for s in (1.0, 1.0 - 1e-6, 1.0 - 2e-6):
        std = SOLVERS[solver].step(s, 0.9999, 0.7, 0.9999, None).std
        noises.append(std / math.sqrt(s - 0.9999) if solver == "flow" else std)  # flow's grows with the step
    assert noises[0] == pytest.approx(noises[1], rel=1e-5) and noises[2] != pytest.approx(noises[0], rel=1e-5)
