# SPDX-License-Identifier: Apache-2.0
"""Old names of modules and classes, found for one more version with a warning."""

import importlib
import importlib.abc
import importlib.util
import sys
import warnings
from collections.abc import Mapping
from types import ModuleType
from typing import Any


def find_moved(package: str, name: str, moved: Mapping[str, str]) -> Any:
    """
    What `package.name` is called now.

    Args:
        package (`str`):
            Name of the package.
        name (`str`):
            An old name in it.
        moved (`Mapping[str, str]`):
            New names, `module` or `module:name`, by old ones.
    """
    module, _, renamed = moved[name].partition(":")
    path = f"{package}.{module}" + (f".{renamed}" if renamed else "")
    message = f"`{package}.{name}` is `{path}` now, and will not be found under its old name from 0.3 on."
    warnings.warn(message, FutureWarning, stacklevel=3)
    found = importlib.import_module(f"{package}.{module}")
    return getattr(found, renamed) if renamed else found


class MovedModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """
    Lets `import package.old` and `from package.old import name` find modules that have moved.

    Args:
        package (`str`), moved (`Mapping[str, str]`):
            As of [`find_moved`].
    """

    def __init__(self, package: str, moved: Mapping[str, str]):
        self.package, self.moved = package, moved

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        package, _, name = fullname.rpartition(".")
        if package != self.package or ":" in self.moved.get(name, ":"):
            return None
        return importlib.util.spec_from_loader(fullname, self)

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__.rpartition(".")[2]
        sys.modules[module.__name__] = find_moved(self.package, name, self.moved)  # which the import then takes
