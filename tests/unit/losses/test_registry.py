# SPDX-License-Identifier: Apache-2.0
"""Objectives by their names, and what is refused."""

from dataclasses import dataclass

import pytest
import torch

from trl_diffusion_opd.losses.distances import BranchMatching, VelocityMatching
from trl_diffusion_opd.losses.objective import Course, Objective, StepObjective, Visit
from trl_diffusion_opd.losses.policy_gradient import PolicyGradient
from trl_diffusion_opd.losses.registry import OBJECTIVES, make_objective
from trl_diffusion_opd.losses.supervised import SFT


class NotAnObjective:
    pass


@dataclass
class Doubled(VelocityMatching):
    name = "doubled"
    title = "twice the distance"
    factor: float = 2.0

    def loss(self, visit: Visit) -> torch.Tensor:
        return self.factor * super().loss(visit)


def test_every_objective_has_its_name_a_title_and_defaults():
    assert list(OBJECTIVES) == ["kl", "mean", "velocity", "x0", "branches", "policy_gradient", "dmd", "tdm", "sft"]
    for name, objective in OBJECTIVES.items():
        made = make_objective(name)
        assert type(made) is objective and isinstance(made, Objective) and made.name == name and made.title
        assert made.needs_fake == (name in ("dmd", "tdm")) and made.needs_branches == (name == "branches")
        assert made.visits == isinstance(made, StepObjective)
        assert made.num_losses(7) == (1 if made.needs_fake else 7)
    for name in ("kl", "mean", "velocity", "x0"):
        make_objective(name).check(Course("dpm2", 0.0, 1.0, has_branches=False))


def test_settings_are_passed_on():
    assert make_objective("branches", {"form": "guided"}) == BranchMatching("guided", 1.0)
    assert make_objective("policy_gradient", {"reduction": "sum"}) == PolicyGradient("kl", "sum", 1e-4)
    assert make_objective("sft", {}) == make_objective("sft") == SFT()


def test_objectives_of_other_packages_are_imported():
    made = make_objective(f"{__name__}:Doubled", {"factor": 3.0})
    assert made == Doubled(3.0)


@pytest.mark.parametrize(
    "name", ["KL", "", ":", "kl:", ":KL", ".x:KL", None, 5, f"{__name__}:NotAnObjective", "math:pi"]
)
def test_what_names_no_objective_is_refused(name):
    with pytest.raises(
        ValueError, match=r"`objective` must be one of kl, mean, .*, sft, or 'package.module:Class' of an"
    ):
        make_objective(name)


@pytest.mark.parametrize("name", ["no_such_package:KL", "math:KL", "trl_diffusion_opd.losses.nothing:KL"])
def test_what_cannot_be_imported_is_refused_with_the_reason(name):
    with pytest.raises(ValueError, match=f"`objective` '{name}' cannot be imported: .*(No module|no attribute)"):
        make_objective(name)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("kl", {"x": 1}, "has x, but the objective 'kl' has no settings"),
        (
            "sft",
            {"z": 1, "y": 1, "guided": True},
            "has y, z, but the objective 'sft' has only num_inference_steps, guided",
        ),
        ("dmd", {"name": "tdm"}, "has name, but the objective 'dmd' has only fake_updates, fake_learning_rate"),
    ],
)
def test_unknown_settings_are_refused(name, settings, message):
    with pytest.raises(ValueError, match=f"`objective_kwargs` {message}"):
        make_objective(name, settings)
