# SPDX-License-Identifier: Apache-2.0
"""Settings of which only the base model's family knows what they are, and whether they are right."""

from ..models.family import Defaults, ModelFamily
from .base_config import DiffusionConfig


def resolve_family_settings(args: DiffusionConfig, family: ModelFamily, defaults: Defaults) -> None:
    """
    Sets what is not set to what the base is made for, and checks it. The base need not be loaded.

    Args:
        args ([`DiffusionConfig`]):
            Settings of the run, which are changed.
        family ([`ModelFamily`]), defaults ([`Defaults`]):
            Of the base.

    Raises:
        `ValueError`: no step is left to train, or a prompt is longer than the model takes.
    """
    settings = defaults.of_a_run()
    if not args.uses_guidance and family.needs_negative(defaults.guidance_scale):
        settings["guidance_scale"] = 1.0
    for name, value in settings.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("num_inference_steps", "eval_num_inference_steps"):
        steps = getattr(args, name)
        if steps is not None and steps <= args.skip_last_steps:
            raise ValueError(
                f"`{name}` must be more than skip_last_steps = {args.skip_last_steps}, so that a step is left to train, "
                f"but is {steps}. Raise it, or set `skip_last_steps=0`."
            )
    family.check_length(args.max_sequence_length)
