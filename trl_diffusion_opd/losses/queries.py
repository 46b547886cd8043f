# SPDX-License-Identifier: Apache-2.0
"""At which steps of a rollout the target is asked: at all of them, or at a few that are drawn."""

from collections import Counter
from math import comb

import numpy as np


# Densities over the course of a rollout, 0 at pure noise: Beta(a, b) with whole a and b.
BETAS = {"late": (5, 2), "early": (2, 5), "middle": (5, 5)}
DISTRIBUTIONS = ("uniform", "importance", *BETAS)


def query_probabilities(
    distribution: str, num_steps: int, num_trained: int, weights: list[float] | None
) -> np.ndarray:
    """
    How probably each of the trained steps is queried.

    Args:
        distribution (`str`):
            `"uniform"`; `"importance"`, in proportion to `weights`; or the density of the course of a rollout:
            `"late"`, Beta(5, 2), as DanceOPD, `"early"`, Beta(2, 5), `"middle"`, Beta(5, 5).
        num_steps (`int`), num_trained (`int`):
            Steps of the schedule, and how many of them are trained, from the first.
        weights (`list[float]`, *optional*):
            Weight of the loss of each trained step, for `"importance"`.

    Returns:
        `numpy.ndarray` of shape `[num_trained]`, whose sum is 1.
    """
    if distribution == "uniform":
        probabilities = np.ones(num_trained)
    elif distribution == "importance":
        probabilities = np.asarray(weights, np.float64)
    else:
        below = [_beta_below(index / num_steps, *BETAS[distribution]) for index in range(num_trained + 1)]
        probabilities = np.diff(below)
    return probabilities / probabilities.sum()


def draw_queries(
    count: int | None, probabilities: np.ndarray, seed: list[int], *, unbiased: bool = False
) -> dict[int, float]:
    """
    The steps at which the target is asked, in order, each with the weight of its loss. The weights are such that their
    mean over the queries is that of the losses, so that a query counts as a step does.

    The draws are systematic: each step is queried `count * p` times on average, and never more than one time more or
    less.

    Args:
        count (`int`, *optional*):
            How many; `None` for all steps with equal weights.
        probabilities (`numpy.ndarray`):
            Of each step.
        seed (`list[int]`):
            What the draw depends on, and nothing else: it is equal in all processes.
        unbiased (`bool`, *optional*, defaults to `False`):
            Whether to weigh by `1 / (n p)`, so that the expected loss is that of all steps. Else the distribution weighs
            the steps.

    Returns:
        `dict[int, float]`: step to weight, divided by the mean weight of one query: with equal weights, all are 1.
    """
    steps = len(probabilities)
    if count is None:
        return dict.fromkeys(range(steps), 1.0)
    places = (np.random.default_rng(seed).random() + np.arange(count)) / count
    drawn = Counter(np.searchsorted(np.cumsum(probabilities)[:-1], places, side="right").tolist())
    scale = len(drawn) / count  # the losses are averaged over the distinct steps
    return {
        index: times * scale * (1 / (steps * probabilities[index]) if unbiased else 1.0)
        for index, times in sorted(drawn.items())
    }


def _beta_below(x: float, a: int, b: int) -> float:
    """Distribution function of Beta(a, b) for whole numbers: the tail of a binomial distribution."""
    n = a + b - 1
    return sum(comb(n, i) * x**i * (1 - x) ** (n - i) for i in range(a, n + 1))
