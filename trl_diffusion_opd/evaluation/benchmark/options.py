# SPDX-License-Identifier: Apache-2.0
"""From the words of the command line to the arguments of `evaluate`."""

from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

import yaml


def parse_options(arguments: dict[str, Any]) -> dict[str, Any]:
    """
    The arguments of [`~benchmark.run.evaluate`] from those of the command line.

    Raises:
        `ValueError`: one cannot be understood.
    """
    parsers = {
        "lora": ("loras", parse_loras),
        "prompts": ("prompts", parse_prompts),
        "rewards": ("rewards", group),
        "reward_options": ("reward_options", parse_reward_options),
        "guidance_scale": ("guidance_scale", parse_guidance),
    }
    parsed = {}
    for name, value in arguments.items():
        key, parse = parsers.get(name, (name, lambda value: value))
        parsed[key] = parse(value)
    return parsed


def parse_loras(words: Sequence[str]) -> dict[str, str]:
    """LoRAs by name: `name=source`, or a source, whose last part is the name."""
    loras = {}
    for word in words:
        name, equals, source = word.partition("=")
        if not equals:
            name, source = PurePath(word.partition("@")[0]).name, word
        if name in loras:
            raise ValueError(f"Two LoRAs are called {name!r}. Name them as `--lora one={loras[name]} two={source}`.")
        loras[name] = source
    return loras


def parse_prompts(words: Sequence[str]) -> dict[str, str]:
    """Sources of prompts by benchmark."""
    sources = group(words)
    if None in sources:
        raise ValueError(f"`--prompts {sources[None][0]}` does not say of what. Write `--prompts NAME=SOURCE`.")
    if twice := [name for name, own in sources.items() if len(own) > 1]:
        raise ValueError(f"`--prompts` has two sources for {twice[0]!r}. Keep one of them.")
    return {name: own[0] for name, own in sources.items()}


def parse_guidance(words: Sequence[str]) -> dict[str | None, list[float]]:
    """Guidance scales by model, those of all others under `None`."""
    try:
        return {name: [float(word) for word in words] for name, words in group(words).items()}
    except ValueError as error:
        raise ValueError(
            f"`--guidance_scale {' '.join(words)}` must be numbers, or NAME=NUMBER for one of the models."
        ) from error


def parse_reward_options(words: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Options of rewards by reward."""
    options: dict[str, dict[str, Any]] = {}
    for word in words:
        key, _, value = word.partition("=")
        reward, dot, option = key.partition(".")
        if not (dot and option and value):
            raise ValueError(f"`--reward_options {word}` must be REWARD.OPTION=VALUE.")
        try:
            options.setdefault(reward, {})[option] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(
                f"`--reward_options {word}`: {value!r} is no value in YAML. Put quotes around it."
            ) from error
    return options


def group(words: Sequence[str]) -> dict[str | None, list[str]]:
    """What stands behind `NAME=`, by name; under `None` what has no name."""
    groups: dict[str | None, list[str]] = {}
    for word in words:
        name, equals, rest = word.partition("=")
        groups.setdefault(name if equals else None, []).append(rest if equals else word)
    return groups
