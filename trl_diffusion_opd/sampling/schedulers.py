# SPDX-License-Identifier: Apache-2.0
"""Which schedulers of diffusers give a schedule that the solvers can follow."""

from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin


def check_scheduler(scheduler: SchedulerMixin) -> None:
    """
    Refuses schedulers whose steps are not what the solvers take between the same sigmas.

    Of a [`~diffusers.FlowMatchEulerDiscreteScheduler`] all options that shape the sigmas are followed, because the
    schedule is asked of the scheduler itself.

    Raises:
        `ValueError`: another class of scheduler, `stochastic_sampling` or `invert_sigmas`.
    """
    name = type(scheduler).__name__
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        raise ValueError(
            f"The scheduler must be a FlowMatchEulerDiscreteScheduler, but is a {name}, whose own steps would be ignored. "
            "Set `pipe.scheduler` to one, and choose how to step by `solver`."
        )
    if scheduler.config.get("stochastic_sampling"):
        raise ValueError(
            f"`stochastic_sampling=True` of the {name} is not supported, for it would be ignored. Set it to False, and "
            "choose noise by `solver` and `noise_level`."
        )
    if scheduler.config.get("invert_sigmas"):
        raise ValueError(
            f"`invert_sigmas=True` of the {name} is not supported: the solvers go from sigma 1, noise, down to 0. Set it "
            "to False."
        )
