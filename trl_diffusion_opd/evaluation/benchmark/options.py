# SPDX-License-Identifier: Apache-2.0
"""From the words of the command line, or the mappings of a recipe, to mappings by name."""

import math
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import yaml


def parse_loras(value: Any) -> dict[str, str]:
    """LoRAs by name: `name=source`, or a source, whose last part is the name."""
    if isinstance(value, Mapping):
        return _texts("lora", value)
    loras = {}
    for word in parse_words("lora", value):
        name, equals, source = word.partition("=")
        if not equals:
            name, source = PurePath(word.partition("@")[0]).name, word
        if name in loras:
            raise ValueError(f"Two LoRAs are called {name!r}. Name them as `--lora one={loras[name]} two={source}`.")
        loras[name] = source
    return loras


def parse_prompts(value: Any) -> dict[str, str]:
    """Sources of prompts by benchmark."""
    if isinstance(value, Mapping):
        return _texts("prompts", value)
    sources = group(parse_words("prompts", value))
    if None in sources:
        raise ValueError(f"`--prompts {sources[None][0]}` does not say of what. Write `--prompts NAME=SOURCE`.")
    if twice := [name for name, own in sources.items() if len(own) > 1]:
        raise ValueError(f"`--prompts` has two sources for {twice[0]!r}. Keep one of them.")
    return {name: own[0] for name, own in sources.items()}


def parse_rewards(value: Any) -> dict[str | None, list[str]]:
    """Rewards by benchmark, those of all others under `None`."""
    if isinstance(value, Mapping):
        return {name: parse_words("rewards", own) for name, own in value.items()}
    return group(parse_words("rewards", value))


def parse_guidance(value: Any) -> dict[str | None, list[float]]:
    """Guidance scales by model, those of all others under `None`; nothing stands for the base's own."""
    if value is None:
        return {}
    if isinstance(value, Mapping):
        scales = {name: own if isinstance(own, (list, tuple)) else [own] for name, own in value.items()}
    else:
        words = value if isinstance(value, (list, tuple)) else [value]
        scales = group([str(word) for word in words])
    try:
        parsed = {name: [float(scale) for scale in own] for name, own in scales.items()}
        if all(math.isfinite(scale) for own in parsed.values() for scale in own):
            return parsed
    except (TypeError, ValueError):
        pass
    shown = " ".join(map(str, value)) if isinstance(value, list) else value
    raise ValueError(f"`--guidance_scale {shown}` must be finite numbers, or NAME=NUMBER for one of the models.")


def parse_reward_options(value: Any) -> dict[str, dict[str, Any]]:
    """Options of rewards by reward."""
    if isinstance(value, Mapping):
        if wrong := [name for name, own in value.items() if not isinstance(own, Mapping)]:
            raise ValueError(f"`reward_options` of {wrong[0]!r} must be a mapping, as `{{dtype: float32}}`.")
        return {name: dict(own) for name, own in value.items()}
    options: dict[str, dict[str, Any]] = {}
    for word in parse_words("reward_options", value):
        key, _, text = word.partition("=")
        reward, dot, option = key.partition(".")
        if not (dot and option and text):
            raise ValueError(f"`--reward_options {word}` must be REWARD.OPTION=VALUE.")
        try:
            options.setdefault(reward, {})[option] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(
                f"`--reward_options {word}`: {text!r} is no value in YAML. Put quotes around it."
            ) from error
    return options


def parse_words(name: str, value: Any) -> list[str]:
    """A list of words; one word is a list of one, nothing an empty one."""
    words = [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
    if wrong := [word for word in words if not isinstance(word, str) or not word]:
        raise ValueError(f"`--{name}` takes text, but got {wrong[0]!r}. Put quotes around it, or leave it out.")
    return words


def group(words: Sequence[str]) -> dict[str | None, list[str]]:
    """What stands behind `NAME=`, by name; under `None` what has no name."""
    groups: dict[str | None, list[str]] = {}
    for word in words:
        name, equals, rest = word.partition("=")
        groups.setdefault(name if equals else None, []).append(rest if equals else word)
    return groups


def _texts(name: str, mapping: Mapping[Any, Any]) -> dict[str, str]:
    """A mapping of names to paths or other text."""
    for key, value in mapping.items():
        if not isinstance(key, str) or not (isinstance(value, (str, PurePath)) and str(value)):
            raise ValueError(f"`--{name}` must map names to text, but has {value!r} under {key!r}.")
    return {key: str(value) for key, value in mapping.items()}
