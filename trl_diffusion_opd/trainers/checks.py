# SPDX-License-Identifier: Apache-2.0
"""Settings of which only the base model's family knows whether they are right."""

from ..models.family import ModelFamily
from .base_config import DiffusionConfig


def check_family_settings(args: DiffusionConfig, family: ModelFamily) -> int:
    """
    Checks settings against the family of the base, which need not be loaded.

    Returns:
        `int`: the number of steps at the end of a rollout that are not trained, by default the family's.

    Raises:
        `ValueError`: no step is left to train, or a prompt is longer than the model takes.
    """
    skipped = family.skip_last_steps if args.skip_last_steps is None else args.skip_last_steps
    for name in ("num_inference_steps", "eval_num_inference_steps"):
        steps = getattr(args, name)
        if steps is not None and steps <= skipped:
            raise ValueError(
                f"`{name}` must be more than skip_last_steps = {skipped}, so that a step is left to train, but is "
                f"{steps}. Raise it, or set `skip_last_steps=0`."
            )
    if args.max_sequence_length > family.longest_prompt:
        raise ValueError(
            f"`max_sequence_length` must be at most {family.longest_prompt} for this model, but is "
            f"{args.max_sequence_length}."
        )
    return skipped
