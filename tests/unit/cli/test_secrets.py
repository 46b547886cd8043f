# SPDX-License-Identifier: Apache-2.0
"""Messages name what is wrong without repeating what may be a secret."""

import pytest

from trl_diffusion_opd.cli.recipe import OPDScriptArguments, parse_recipe
from trl_diffusion_opd.hub.locations import parse_source
from trl_diffusion_opd.trainers.opd_config import DiffusionOPDConfig


SECRET = "S3cr3tPassw0rd"


@pytest.mark.parametrize("where", ["recipe", "options"])
def test_an_unknown_setting_is_named_without_its_value(tmp_path, where):
    recipe = tmp_path / "recipe.yaml"
    settings = "model_name_or_path: a/b\nteachers: {ocr: a/b}\ndatasets: {ocr: ['a']}\noutput_dir: out\n"
    recipe.write_text(settings + (f"hub_tokn: {SECRET}\n" if where == "recipe" else ""))
    argv = ["--config", str(recipe)] + ([f"--hub_tokn={SECRET}"] if where == "options" else [])
    with pytest.raises(ValueError, match="nknown .*--hub_tokn") as info:
        parse_recipe(argv, (OPDScriptArguments, DiffusionOPDConfig))
    assert SECRET not in str(info.value)


@pytest.mark.parametrize("address", [f"https://user:{SECRET}@host/a/b", f"https://host/a/b?token={SECRET}"])
def test_an_address_is_named_without_its_credentials(address):
    with pytest.raises(ValueError, match="not a URL, but is 'https://host/a/b'") as info:
        parse_source(address)
    assert SECRET not in str(info.value)
