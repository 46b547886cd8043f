# SPDX-License-Identifier: Apache-2.0
"""Finding what a recipe names: local paths, built-in rewards, and functions of one's own."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from .registry import REWARDS


def locate(value: Any, recipe: Path | None) -> Any:
    """A local path as seen from the current folder or else from the recipe's; anything else as it is."""
    if not isinstance(value, str) or recipe is None or Path(value).exists():
        return value
    found = (recipe.parent / value).resolve()
    return str(found) if found.exists() else value


def locate_function(spec: str, recipe: Path | None) -> str:
    """`file.py:function` with the file as [`locate`] finds it; any other reward as it is."""
    module, separator, name = spec.rpartition(":")
    return f"{locate(module, recipe)}{separator}{name}"


def find_reward(spec: str, recipe: Path | None = None) -> Callable | str:
    """The function that a recipe names, or the name of a built-in reward."""
    if not isinstance(spec, str):
        raise ValueError(
            f"A reward is the name of a built-in one or of a function, as `module:function`, but is {spec!r}."
        )
    return spec if spec in REWARDS else load_function(locate_function(spec, recipe))


def load_function(spec: str) -> Callable:
    """The function that `package.module:function` or `path/to/file.py:function` names."""
    module_name, separator, name = spec.rpartition(":")
    if not separator:
        raise ValueError(
            f"There is no reward {spec!r}. The built-in ones are {', '.join(REWARDS)}; a function is named as "
            "`module:function` or `file.py:function`."
        )
    try:
        module = _import_file(module_name) if module_name.endswith(".py") else importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{spec!r}: {error}. Install it, or name a file as `file.py:function`.") from error
    if not hasattr(module, name):
        raise ValueError(f"{spec!r}: the module has no {name!r}.")
    return getattr(module, name)


def _import_file(name: str) -> ModuleType:
    file = Path(name).resolve()
    if not file.is_file():
        raise ValueError(f"There is no file {name!r}. Check its spelling.")
    package, folder = [], file.parent
    while (folder / "__init__.py").is_file():
        package, folder = [folder.name, *package], folder.parent
    if package:  # the file may import its neighbors
        sys.path.insert(0, str(folder))
        return importlib.import_module(".".join([*package, file.stem]))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
