# SPDX-License-Identifier: Apache-2.0
"""Names of teachers that lead out of their repository, and teachers that are broken, before anything is loaded."""

import re

import pytest

from tests.support.lora_files import diffusers_lora, peft_lora
from trl_diffusion_opd.hub.locations import Source, parse_source
from trl_diffusion_opd.models.sd3 import StableDiffusion3
from trl_diffusion_opd.teachers.config import TeacherConfig, normalize_teachers
from trl_diffusion_opd.teachers.loading import fetch_teachers


@pytest.mark.parametrize(
    "text",
    ["owner/repo/../../x", "owner/repo/..", "owner/..", "owner/repo/./x", "owner/repo/a/../b@main", "owner/../x/y"],
)
def test_a_location_that_leads_out_of_its_repository(text):
    location = text.partition("@")[0]
    with pytest.raises(
        ValueError, match=rf"^A LoRA location on the Hub must not have .* but is {re.escape(repr(location))}"
    ):
        parse_source(text)
    with pytest.raises(ValueError, match="^A prompt set location on the Hub must not have"):
        parse_source(text, kind="prompt set", repo_type="dataset")


@pytest.mark.parametrize("field", ["subfolder", "weight_name"])
def test_a_field_that_leads_out_of_its_repository(field):
    with pytest.raises(ValueError, match=r"^A teacher's location on the Hub must not have .* but is '\.\./\.\./x'"):
        TeacherConfig("owner/repo", **{field: "../../x"})


def test_dots_in_names_and_on_this_machine_are_no_matter(tmp_path):
    assert parse_source("owner/re..po/v1.0/...") == Source("owner/re..po", "v1.0/...")
    (tmp_path / "a" / "b").mkdir(parents=True)
    inside = tmp_path / "a" / "b" / ".." / "b"
    assert parse_source(str(inside)) == Source(path=inside)
    assert TeacherConfig(tmp_path / "a", subfolder="../a").source().path.samefile(tmp_path / "a")


@pytest.mark.parametrize("write", [peft_lora, diffusers_lora])
def test_a_broken_teacher_is_told_before_anything_is_loaded(tmp_path, write):
    write(tmp_path / "right")
    write(tmp_path / "broken", {"r": "4"})
    teachers = normalize_teachers({"a": str(tmp_path / "right"), "b": str(tmp_path / "broken")})
    with pytest.raises(ValueError, match=r"^teacher 'b' \(.*broken\): .* has `r='4'`, but it must be a whole number"):
        fetch_teachers(teachers, StableDiffusion3())
    assert fetch_teachers({"a": teachers["a"]}, StableDiffusion3())["a"].lora.path == tmp_path / "right"
