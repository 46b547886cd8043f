# SPDX-License-Identifier: Apache-2.0
"""What is public stays where it was: names that moved are found with a warning."""

import importlib

import pytest

import trl_diffusion_opd


@pytest.mark.parametrize("name, path", trl_diffusion_opd._MOVED.items())
def test_what_moved_is_found_under_its_old_name_with_a_warning(name, path):
    module, _, renamed = path.partition(":")
    with pytest.warns(FutureWarning, match=f"`trl_diffusion_opd.{name}` is `trl_diffusion_opd.{module}"):
        found = getattr(trl_diffusion_opd, name)
    expected = importlib.import_module(f"trl_diffusion_opd.{module}")
    assert found is (getattr(expected, renamed) if renamed else expected)


def test_public_names_are_found_without_a_warning(recwarn):
    for name in trl_diffusion_opd.__all__:
        getattr(trl_diffusion_opd, name)
    assert not [warning for warning in recwarn if issubclass(warning.category, FutureWarning)]
