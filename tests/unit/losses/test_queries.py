# SPDX-License-Identifier: Apache-2.0
"""Where the target is asked: the probabilities of the steps, how they are drawn, and what the weights make of a loss."""

import math

import numpy as np
import pytest

from trl_diffusion_opd.losses.queries import BETAS, DISTRIBUTIONS, draw_queries, query_probabilities


WEIGHTS = [0.09, 0.18, 0.5, 1.0, 2.0, 4.0, 8.3, 19.7, 64.1]  # of Eq. 11 at noise level 0.7, in percent
LOSSES = np.array([2.0, 3.0, 2.5, 4.0, 3.5, 5.0, 7.0, 6.0, 8.0])
SEEDS = 4000


def probabilities_of(distribution: str, num_steps: int = 10, num_trained: int = 9) -> np.ndarray:
    return query_probabilities(distribution, num_steps, num_trained, WEIGHTS)


def times_of(queries: dict[int, float], count: int, probabilities: np.ndarray | None = None) -> dict[int, float]:
    """How often each step was drawn, from the weights."""
    return {
        index: weight
        * count
        / len(queries)
        * (1 if probabilities is None else len(probabilities) * probabilities[index])
        for index, weight in queries.items()
    }


# --- Probabilities -----------------------------------------------------------------------------------------------


def test_late_queries_of_ten_steps_are_those_of_danceopd():
    percent = 100 * query_probabilities("late", 10, 10, None)
    assert percent == pytest.approx([0, 0.2, 0.9, 3.0, 6.8, 12.4, 18.7, 23.5, 23.0, 11.4], abs=0.051)


@pytest.mark.parametrize(("name", "a", "b"), [("late", 5, 2), ("early", 2, 5), ("middle", 5, 5)])
@pytest.mark.parametrize(("num_steps", "num_trained"), [(10, 10), (10, 9), (40, 39), (4, 1), (1, 1)])
def test_probabilities_are_integrals_of_the_density(name, a, b, num_steps, num_trained):
    """The density `u^(a-1) (1-u)^(b-1)` over the course of a rollout, by Simpson's rule, exact enough for polynomials."""
    assert BETAS[name] == (a, b)
    u = np.linspace(0, num_trained / num_steps, 200 * num_trained + 1).reshape(-1)
    density = u ** (a - 1) * (1 - u) ** (b - 1)
    simpson = density[:-1:2] + 4 * density[1::2] + density[2::2]
    expected = simpson.reshape(num_trained, 100).sum(1)
    probabilities = query_probabilities(name, num_steps, num_trained, None)
    np.testing.assert_allclose(probabilities, expected / expected.sum(), rtol=1e-6, atol=1e-10)


def test_uniform_and_importance():
    assert probabilities_of("uniform").tolist() == pytest.approx([1 / 9] * 9, rel=1e-15)
    expected = [weight / sum(WEIGHTS) for weight in WEIGHTS]
    assert probabilities_of("importance").tolist() == pytest.approx(expected, rel=1e-12)


def test_early_is_late_the_other_way_round():
    early, late = (query_probabilities(name, 10, 10, None) for name in ("early", "late"))
    np.testing.assert_allclose(early, late[::-1], rtol=1e-9)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_probabilities_sum_to_one_and_none_is_negative(distribution):
    probabilities = probabilities_of(distribution)
    assert probabilities.shape == (9,) and probabilities.dtype == np.float64
    assert probabilities.sum() == pytest.approx(1, rel=1e-12) and probabilities.min() > 0


# --- Draws -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unbiased", [False, True])
def test_without_a_count_all_steps_are_queried_with_a_weight_of_exactly_one(unbiased):
    for distribution in DISTRIBUTIONS:
        queries = draw_queries(None, probabilities_of(distribution), [0], unbiased=unbiased)
        assert list(queries.items()) == [(index, 1.0) for index in range(9)]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_no_step_is_drawn_more_than_once_more_or_less_than_on_average(distribution, count):
    probabilities, unbiased = probabilities_of(distribution), distribution == "importance"
    for seed in range(100):
        queries = draw_queries(count, probabilities, [seed], unbiased=unbiased)
        times = times_of(queries, count, probabilities if unbiased else None)
        assert list(queries) == sorted(queries) and set(queries) <= set(range(9))
        assert sum(times.values()) == pytest.approx(count, rel=1e-9)
        for index, probability in enumerate(probabilities):
            drawn = times.get(index, 0.0)
            assert drawn == pytest.approx(round(drawn), abs=1e-9)
            assert abs(round(drawn) - count * probability) < 1


@pytest.mark.parametrize("count", [4])
@pytest.mark.parametrize("distribution", ["importance", "late", "middle"])
def test_steps_are_drawn_as_often_as_their_probabilities_say(distribution, count):
    probabilities = probabilities_of(distribution)
    times = np.zeros(9)
    for seed in range(SEEDS):
        for index, drawn in times_of(draw_queries(count, probabilities, [1, seed]), count).items():
            times[index] += drawn
    # The number of one draw is the floor of its mean or one more.
    rest = (count * probabilities) % 1
    standard_error = np.sqrt(rest * (1 - rest) / SEEDS)
    assert (np.abs(times / SEEDS - count * probabilities) <= 5 * standard_error + 1e-9).all()


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_expected_loss_is_that_of_all_steps_or_of_the_distribution(distribution, count):
    """The trainer divides the sum of the weighted losses by their number."""
    probabilities, unbiased = probabilities_of(distribution), distribution == "importance"
    losses = LOSSES * np.array(WEIGHTS) if unbiased else LOSSES
    values = []
    for seed in range(SEEDS):
        queries = draw_queries(count, probabilities, [seed], unbiased=unbiased)
        values.append(sum(weight * losses[index] for index, weight in queries.items()) / len(queries))
    expected = losses.mean() if distribution in ("uniform", "importance") else (probabilities * losses).sum()
    standard_error = np.std(values) / math.sqrt(SEEDS)
    assert 5 * standard_error < 0.1 * abs(expected)  # or the next line would hold for anything
    assert np.mean(values) == pytest.approx(expected, abs=5 * standard_error + 1e-12)


def test_importance_sampling_of_the_loss_it_was_made_for_has_no_noise():
    """`w_j` times the same distance at every step."""
    probabilities, losses = probabilities_of("importance"), 7.0 * np.array(WEIGHTS)
    for count in (1, 3):
        for seed in range(50):
            queries = draw_queries(count, probabilities, [seed], unbiased=True)
            value = sum(weight * losses[index] for index, weight in queries.items()) / len(queries)
            assert value == pytest.approx(losses.mean(), rel=1e-9)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_weights_have_a_mean_of_one_but_for_importance_sampling_where_it_is_expected(distribution):
    probabilities, unbiased = probabilities_of(distribution), distribution == "importance"
    means = [np.mean([*draw_queries(4, probabilities, [seed], unbiased=unbiased).values()]) for seed in range(2000)]
    if not unbiased:
        assert means == pytest.approx([1.0] * 2000, rel=1e-12)
    assert np.mean(means) == pytest.approx(1, abs=5 * np.std(means) / math.sqrt(2000) + 1e-12)


def test_as_many_uniform_queries_as_steps_are_all_steps():
    for seed in range(200):
        assert draw_queries(9, probabilities_of("uniform"), [seed]) == dict.fromkeys(range(9), 1.0)


def test_steps_of_probability_zero_are_never_drawn():
    probabilities = query_probabilities("importance", 4, 4, [0.0, 1.0, 0.0, 2.0])
    drawn = [draw_queries(2, probabilities, [seed], unbiased=True) for seed in range(300)]
    assert set().union(*drawn) == {1, 3}
    assert all(math.isfinite(weight) for queries in drawn for weight in queries.values())


def test_equal_seeds_draw_equal_queries_and_others_other_ones():
    probabilities = probabilities_of("uniform")
    seeds = [[42, round_number, 0, task] for round_number in range(20) for task in range(3)]
    drawn = [draw_queries(1, probabilities, seed) for seed in seeds]
    assert drawn == [draw_queries(1, probabilities, seed) for seed in seeds]
    counts = [sum(index in queries for queries in drawn) for index in range(9)]
    assert len(drawn) == 60 and all(counts) and max(counts) < 20


def test_one_step_is_always_drawn_if_there_is_but_one():
    for distribution in DISTRIBUTIONS:
        probabilities = query_probabilities(distribution, 1, 1, [0.3])
        for count in (None, 1):
            assert draw_queries(count, probabilities, [0], unbiased=True) == {0: 1.0}
