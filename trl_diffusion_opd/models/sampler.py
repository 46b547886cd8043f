# SPDX-License-Identifier: Apache-2.0
"""Sample images of a policy."""

from dataclasses import dataclass

from .velocity import VelocityModel


@dataclass
class Policy:
    """
    A model that can be rolled out.

    Args:
        name (`str`):
            What tables and image grids call it.
        guidance_scale (`float`):
            Its classifier-free guidance.
        adapters (`tuple[str, ...]`, *optional*, defaults to `()`):
            Adapters of the shared backbone that are active, their updates added up; none for the base.
        model ([`VelocityModel`], *optional*):
            A model of its own instead of the shared backbone.
    """

    name: str
    guidance_scale: float
    adapters: tuple[str, ...] = ()
    model: VelocityModel | None = None
