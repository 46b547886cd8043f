# SPDX-License-Identifier: Apache-2.0
"""What a student is to predict: sums of models, and every word of what is refused."""

import math
import re

import pytest

from trl_diffusion_opd.losses.targets import Term, check_models, describe, make_targets


TEACHERS = ["ocr", "pick"]


def weights(target) -> dict[str, float]:
    assert len({term.model for term in target}) == len(target)  # each model once
    return {term.model: term.weight for term in target}


def refused(message: str):
    """The whole message, but for what it ends with."""
    return pytest.raises(ValueError, match=f"^{re.escape(message)}")


# --- Identities --------------------------------------------------------------------------------------------------


def test_by_default_each_task_follows_its_teacher():
    assert make_targets(TEACHERS, TEACHERS) == {task: (Term(1.0, task),) for task in TEACHERS}


def test_tasks_and_teachers_may_be_given_once_only():
    mixtures = {"pick": {"ocr": 1.0}}
    assert make_targets(iter(TEACHERS), iter(TEACHERS), mixtures) == {
        "ocr": (Term(1.0, "ocr"),),
        "pick": (Term(1.0, "ocr"),),
    }


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.25, 2.0, 3])
@pytest.mark.parametrize("reference", ["base", "average", "pick"])
def test_extrapolation_goes_from_the_reference_through_the_teacher(strength, reference):
    target = make_targets(["ocr"], TEACHERS, None, strength, reference)["ocr"]
    expected = {"ocr": strength, reference: 1 - strength}
    assert weights(target) == {model: weight for model, weight in expected.items() if weight}


def test_extrapolation_of_a_mixture_is_that_of_its_sum():
    mixtures = {"ocr": {"ocr": 0.5, "pick": 0.25, "base": 0.25}}
    targets = make_targets(TEACHERS, TEACHERS, mixtures, 2.0)
    assert weights(targets["ocr"]) == {"ocr": 1.0, "pick": 0.5, "base": -0.5}  # 2 (0.25) - 1
    assert weights(targets["pick"]) == {"pick": 2.0, "base": -1.0}


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0, 1.25, 7.7])
@pytest.mark.parametrize(
    "mixture", [{"ocr": 1.0}, {"ocr": 1 / 3, "pick": 2 / 3}, {"ocr": 1.5, "base": -0.5}, {"average": 0.9, "pick": 0.1}]
)
def test_the_weights_of_a_target_sum_to_one_and_its_velocity_is_the_formula(strength, mixture):
    velocities = {"ocr": 1.7, "pick": -0.4, "base": 0.6, "average": 2.2}
    target = make_targets(["ocr"], TEACHERS, {"ocr": mixture}, strength)["ocr"]
    assert math.fsum(term.weight for term in target) == pytest.approx(1, rel=1e-12)
    mixed = sum(weight * velocities[model] for model, weight in mixture.items())
    expected = strength * mixed + (1 - strength) * velocities["base"]
    assert sum(term.weight * velocities[term.model] for term in target) == pytest.approx(expected, rel=1e-12)


def test_models_without_weight_are_left_out():
    targets = make_targets(TEACHERS, TEACHERS, {"ocr": {"ocr": 1, "pick": 0.0}, "pick": {"pick": 0.5, "base": 0.5}}, 2)
    assert weights(targets["ocr"]) == {"ocr": 2, "base": -1}
    assert weights(targets["pick"]) == {"pick": 1}  # 2 (0.5) - 1 = 0 of the base


def test_tasks_may_have_no_teacher_if_they_have_a_mixture():
    targets = make_targets(["ocr", "rest"], ["ocr"], {"rest": {"base": 1.0}})
    assert targets == {"ocr": (Term(1.0, "ocr"),), "rest": (Term(1.0, "base"),)}


def test_sums_that_are_rounded_are_sums():
    mixture = {"ocr": 0.1, "pick": 0.2, "base": 0.7 + 5e-7}
    assert len(make_targets(["ocr"], TEACHERS, {"ocr": mixture})["ocr"]) == 3


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ((Term(1.0, "ocr"),), "ocr"),
        ((Term(1.25, "ocr"), Term(-0.25, "base")), "1.25 ocr - 0.25 base"),
        ((Term(1 / 3, "ocr"), Term(2 / 3, "pick")), "0.333333 ocr + 0.666667 pick"),
        ((Term(-1, "base"), Term(1, "ocr"), Term(1, "pick")), "-1 base + 1 ocr + 1 pick"),
    ],
)
def test_targets_in_words(target, words):
    assert describe(target) == words


# --- What is refused ---------------------------------------------------------------------------------------------


def test_mixtures_of_tasks_without_prompts():
    with refused("`targets` names tasks without prompts: ['else', 'other']."):
        make_targets(["ocr"], TEACHERS, {"other": {"base": 1.0}, "else": {"base": 1.0}})


def test_tasks_without_a_target():
    with refused(
        "Task 'rest' has prompts but no teacher and no entry of `targets`. Add one, or leave the prompts out."
    ):
        make_targets(["ocr", "rest"], TEACHERS)


@pytest.mark.parametrize("mixture", [None, {}, 1.0, "ocr", [("ocr", 1.0)]])
def test_mixtures_that_are_none(mixture):
    with refused("`targets['ocr']` must map models to weights, as in {'base': 1.0}, but is "):
        make_targets(["ocr"], TEACHERS, {"ocr": mixture})


def test_mixtures_of_unknown_models():
    with refused("`targets['ocr']` names unknown models ['orc', 'x']. There are: ocr, pick, base, average."):
        make_targets(["ocr"], TEACHERS, {"ocr": {"orc": 0.5, "x": 0.5}})


@pytest.mark.parametrize("weight", [math.nan, math.inf, True, "1", None, [1]])
def test_weights_that_are_no_numbers(weight):
    with refused(f"`targets['ocr']['pick']` must be a finite number, but is {weight!r}."):
        make_targets(["ocr"], TEACHERS, {"ocr": {"ocr": 1.0, "pick": weight}})


@pytest.mark.parametrize(("mixture", "total"), [({"ocr": 0.5}, "0.5"), ({"ocr": 1, "pick": 0.25}, "1.25")])
def test_weights_of_another_sum(mixture, total):
    with refused(f"The weights of `targets['ocr']` must sum to 1, but sum to {total}. Else the target would be"):
        make_targets(["ocr"], TEACHERS, {"ocr": mixture})


@pytest.mark.parametrize("mixture", [None, {"ocr": {"ocr": 1.0}}, {"ocr": {"ocr": 1.0, "pick": 0.0}}])
def test_extrapolation_from_a_model_to_itself(mixture):
    assert make_targets(["ocr"], TEACHERS, mixture, 1.0, "ocr")["ocr"] == (Term(1.0, "ocr"),)
    with refused("`teacher_extrapolation` of task 'ocr' would go from 'ocr' to itself. Choose another "):
        make_targets(["ocr"], TEACHERS, mixture, 1.25, "ocr")


@pytest.mark.parametrize("strength", [1.0, 1.25])
def test_extrapolation_from_an_unknown_model(strength):
    with refused("`extrapolation_reference` must be one of ocr, pick, base, average, but is 'orc'."):
        make_targets(["ocr"], TEACHERS, None, strength, "orc")


def test_teachers_that_nothing_follows():
    check_models(TEACHERS, ["ocr", "pick", None], None)
    check_models(TEACHERS, iter(["ocr", "pick", "base"]), "base")
    with refused("There are teachers that no task follows: ['pick']. Give them prompts, or leave them out."):
        check_models(TEACHERS, {"ocr", "base", None}, None)


@pytest.mark.parametrize("anchor", ["ocr", "pick", "base", "average"])
def test_anchors_are_models(anchor):
    check_models(iter(TEACHERS), [*TEACHERS, anchor], anchor)
    with refused("`anchor` must be one of ocr, pick, base, average, but is 'orc'."):
        check_models(TEACHERS, [*TEACHERS, "orc"], "orc")


@pytest.mark.parametrize("name", ["base", "average"])
@pytest.mark.parametrize("others", [[], ["ocr"], ["base", "average"]])
def test_teachers_with_the_name_of_another_model(name, others):
    """Whatever else is used: the name would stand for the other model, and the teacher not be followed."""
    with refused(f"A teacher is called '{name}', which is the name of another model here. Rename its task."):
        check_models([name], [name, None, *others], None)
