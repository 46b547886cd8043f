# SPDX-License-Identifier: Apache-2.0
"""Checks of a recipe's file, whatever its settings are: it may come from a stranger."""

from pathlib import Path
from typing import Any

import yaml


_MOST_VALUES = 100_000  # with those that aliases repeat
_TAGS = {*yaml.SafeLoader.yaml_constructors, "tag:yaml.org,2002:merge"}  # the key `<<`


def check_recipe(recipe: Path) -> None:
    """
    Raises a `ValueError` if a YAML file is not a mapping of plain values: for tags that make objects, aliases that make
    it endless, a key that is there twice (of which YAML would drop the first silently), and variables of the process.

    Args:
        recipe (`Path`):
            The file.
    """
    with open(recipe, encoding="utf-8") as file:
        try:
            root = yaml.compose(file, yaml.SafeLoader)
            if not isinstance(root, yaml.MappingNode):
                raise ValueError(f"{recipe} must have settings, as in `max_steps: 100`, but has none.")
            _count(root, recipe, {})
            file.seek(0)
            settings = yaml.safe_load(file)
        except yaml.YAMLError as error:
            raise ValueError(f"{recipe} is no YAML: {error}") from error
        except RecursionError:
            raise ValueError(f"{recipe}: values are nested too deeply. Write them flat.") from None
    if "env" in settings:
        # TRL would set it, `LD_PRELOAD` and the address that tokens are sent to included.
        raise ValueError(
            f"{recipe}: a recipe may not set `env`, the variables of the process. Set them in the shell, as in "
            "`HF_HUB_OFFLINE=1 trl-diffusion-opd ...`."
        )


def _count(node: yaml.Node, recipe: Path, counted: dict[int, int]) -> int:
    """Number of values in a node, with those that aliases repeat. Each node is looked at once."""
    if id(node) in counted:
        return counted[id(node)]
    where = f"{recipe}, line {node.start_mark.line + 1}: "
    if node.tag not in _TAGS:
        raise ValueError(f"{where}the tag {node.tag!r} is not allowed in a recipe. Write plain values.")
    counted[id(node)] = _MOST_VALUES + 1  # in case it holds itself
    parts = node.value if isinstance(node, yaml.CollectionNode) else []
    if isinstance(node, yaml.MappingNode):
        if any(not isinstance(key, yaml.ScalarNode) for key, _ in parts):
            raise ValueError(f"{where}a key must be a word, not a list or a mapping. Write `name: value`.")
        unique_pairs([(key.value, None) for key, _ in parts], f"{recipe}: ")
        parts = [part for pair in parts for part in pair]
    total = 1 + sum(_count(part, recipe, counted) for part in parts)
    if total > _MOST_VALUES:
        raise ValueError(f"{where}there are more than {_MOST_VALUES} values, as aliases repeat them. Write them out.")
    counted[id(node)] = total
    return total


def unique_pairs(pairs: list[tuple[str, Any]], where: str = "") -> dict[str, Any]:
    """A mapping of these pairs. Raises a `ValueError` if a key is there twice."""
    mapping = {}
    for key, value in pairs:
        if key in mapping:
            raise ValueError(f"{where}the key {key!r} is there twice. Keep one of them.")
        mapping[key] = value
    return mapping
