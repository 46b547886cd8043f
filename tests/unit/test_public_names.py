# SPDX-License-Identifier: Apache-2.0
"""What is public stays where it was: names that moved are found with a warning."""

import importlib
import subprocess
import sys

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


def test_what_moved_is_imported_from_its_old_module():
    code = (
        "import warnings; warnings.simplefilter('error', DeprecationWarning)\n"
        "from trl_diffusion_opd.transitions import transition\n"
        "import trl_diffusion_opd.objectives as old, trl_diffusion_opd.losses.opd as new\n"
        "import trl_diffusion_opd.sampling.transitions as there\n"
        "assert transition is there.transition and old is new and there.__name__.endswith('sampling.transitions')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("FutureWarning: `trl_diffusion_opd.transitions` is") == 1
    for name in ("RewardTrainer", "nothing"):
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(f"trl_diffusion_opd.{name}")
