# SPDX-License-Identifier: Apache-2.0
"""JSON without the paths of this machine."""

import json
from pathlib import Path
from typing import Any


def is_absolute(value: Any) -> bool:
    """Whether a value is the path of a place on this machine, which names the machine or its user."""
    return isinstance(value, str) and (Path(value).is_absolute() or value.startswith("~"))


def without_paths(content: Any) -> Any:
    """JSON-like content with the last part alone of every absolute path, which would name a machine or a user."""
    if isinstance(content, dict):
        return {key: without_paths(value) for key, value in content.items()}
    if isinstance(content, list):
        return [without_paths(value) for value in content]
    return Path(content).name if is_absolute(content) else content


def dump_json(content: Any) -> str:
    return json.dumps(content, indent=2, sort_keys=True, default=str) + "\n"
