# SPDX-License-Identifier: Apache-2.0
"""What an installed package holds beside its modules."""

import tomllib
from pathlib import Path, PurePosixPath


ROOT = Path(__file__).parents[2]


def test_every_file_of_the_package_is_installed():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    named = [f"{package.replace('.', '/')}/{pattern}" for package, own in patterns.items() for pattern in own]
    files = [file.relative_to(ROOT).as_posix() for file in (ROOT / "trl_diffusion_opd").rglob("*") if file.is_file()]
    data = [file for file in files if not file.endswith((".py", ".pyc"))]
    assert {"benchmarks.yaml", "table1.json", "page.html", "py.typed"} <= {Path(file).name for file in data}
    assert [file for file in data if not any(PurePosixPath(file).match(pattern) for pattern in named)] == []
