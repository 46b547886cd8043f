# SPDX-License-Identifier: Apache-2.0
"""
The per-step objective of on-policy distillation, in closed form.

Student and teacher take the step with the same solver, schedule and noise, so their transitions share the standard
deviation and differ in the mean alone, by `coefficient * (v_student - v_teacher)` (see [`transitions`]).
"""

import torch

from ..sampling.transitions import Transition


def step_divergence(
    student_velocity: torch.Tensor, teacher_velocity: torch.Tensor, transition: Transition
) -> torch.Tensor:
    """
    Divergence of the student's transition from the teacher's, per sample.

    With `std > 0` this is the KL divergence of two Gaussians of the same covariance (Eq. 11 and 14 of the paper),
    `||mean_S - mean_T||^2 / (2 std^2)`, where `std` is the step's own and holds `sqrt(-dt)`. With `std = 0` it is the
    mean matching of Eq. 12, `||mean_S - mean_T||^2 / 2`. Which of the two it is depends on nothing but `std`.

    The paper sums over the latent dimensions (and, outside this function, over the steps of the trajectory); here the
    mean is taken, which is the paper's value divided by the number of dimensions: the scale that the published
    learning rate and gradient clipping were chosen for.

    Args:
        student_velocity (`torch.Tensor`):
            Student's velocity at the visited state, of shape `[B, ...]`. Gradients flow to it.
        teacher_velocity (`torch.Tensor`):
            Teacher's velocity at the same state, of the same shape. Treated as a constant.
        transition ([`Transition`]):
            The student's transition, of which `std` and `coefficient` are used.

    Returns:
        `torch.Tensor` of shape `[B]`, in float32 or float64. Exactly 0 where the velocities are equal.

    Raises:
        `ValueError`: the two velocities differ in shape.
    """
    return divergence_weight(transition) * mean_square(student_velocity, teacher_velocity)


def mean_square(student_velocity: torch.Tensor, teacher_velocity: torch.Tensor) -> torch.Tensor:
    """
    `mean_d (v_S - v_T)^2`, of shape `[B]`, in float32 or float64. The teacher's is treated as a constant.

    Raises:
        `ValueError`: the two velocities differ in shape.
    """
    if student_velocity.shape != teacher_velocity.shape:
        raise ValueError(
            f"Student and teacher must predict velocities of one shape, but got {tuple(student_velocity.shape)} and "
            f"{tuple(teacher_velocity.shape)}. They must share the latent space."
        )
    # The difference shrinks as training goes on: take it before anything is squared or scaled, never in half precision.
    dtype = torch.promote_types(student_velocity.dtype, torch.float32)
    difference = student_velocity.to(dtype) - teacher_velocity.detach().to(dtype)
    return difference.square().flatten(1).mean(1)


def divergence_weight(transition: Transition) -> torch.Tensor:
    """`w` in `divergence = w * mean_d (v_S - v_T)^2`: `C^2 / (2 std^2)` (Eq. 11), or `C^2 / 2` where std is 0 (Eq. 12)."""
    variance = torch.where(transition.std > 0, transition.std.square(), 1.0)
    return transition.coefficient.square() / (2 * variance)
