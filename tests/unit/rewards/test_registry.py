# SPDX-License-Identifier: Apache-2.0
"""The modules of the rewards and the arrows between them."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import trl_diffusion_opd.rewards


FOLDER = Path(trl_diffusion_opd.rewards.__file__).parent


def neighbors(file: Path) -> set[str]:
    """The modules of the package that a module imports, those imported for types and inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {name if (FOLDER / f"{name}.py").is_file() else "__init__" for name in names}
    return found


def test_no_module_of_the_rewards_is_imported_by_what_it_imports():
    arrows = {file.stem: neighbors(file) for file in FOLDER.glob("*.py")}
    assert arrows["sums"] == {"base", "registry"} and "registry" in arrows["__init__"]
    order = list(TopologicalSorter(arrows).static_order())  # raises where there is a circle
    assert order.index("base") < order.index("registry") < order.index("__init__")


def test_the_package_offers_what_it_names():
    for name in trl_diffusion_opd.rewards.__all__:
        assert getattr(trl_diffusion_opd.rewards, name) is not None
