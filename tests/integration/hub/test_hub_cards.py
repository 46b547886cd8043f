# SPDX-License-Identifier: Apache-2.0
"""The rules for cards that the loopback Hub checks."""

import re

import pytest

from tests.support.hub_cards import validate_card


GOOD_CARD = """---
license: other
license_name: a-community-license
license_link: https://example.com/license
base_model: [owner/base]
base_model_relation: adapter
tags: [lora]
datasets: [owner/prompts]
widget:
- text: a cat
  output: {url: images/0.png}
model-index:
- name: x
  results:
  - task: {type: text-to-image}
    dataset: {type: owner/prompts, name: Prompts}
    metrics: [{type: accuracy, value: 0.5}]
---
A card
"""


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("tags: [lora]", "tags: lora", '"tags" must be an array'),
        ("tags: [lora]", "tags: [1]", r'"tags\[0\]" must be a string'),
        ("tags: [lora]", "tags: [lora", "Invalid YAML"),
        ("[owner/prompts]", "[/home/me/prompts]", '"datasets.*is not valid'),
        ("[owner/base]", "/home/me/base", '"base_model" with value "/home/me/base" is not valid'),
        ("adapter", "lora", '"base_model_relation" must be one of'),
        ("license: other", "license: sd", '"license" must be one of .* but is .sd'),
        ("license_name: a-community-license\n", "", '"license_name" is required'),
        ("- text: a cat", "- prompt: a cat", r'"widget\[0\].text"'),
        ("{url: images/0.png}", "images/0.png", r'"widget\[0\].output.url"'),
        ("{type: accuracy, value: 0.5}", "{type: accuracy}", r"results\[0\].metrics\[0\].value. is required"),
        ("task: {type: text-to-image}", "x: y", r"results\[0\].task.type. is required"),
    ],
)
def test_card_rules(old, new, error):
    assert validate_card(GOOD_CARD, "model") == ([], [])
    assert GOOD_CARD.count(old) == 1
    errors, _ = validate_card(GOOD_CARD.replace(old, new), "model")
    assert len(errors) == 1 and re.search(error, errors[0]), errors


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("sdk: gradle", '"sdk" must be'),
        ("sdk_version: newest", '"sdk_version"'),
        ("colorFrom: orange", '"colorFrom"'),
        ("emoji: smile", '"emoji"'),
        (f"short_description: {'x' * 61}", '"short_description"'),
        ("pinned: maybe", '"pinned"'),
        ("python_version: '2.7'", '"python_version"'),
    ],
)
def test_space_card_rules(line, error):
    good = {"sdk": "gradio", "sdk_version": "6.0.1", "colorFrom": "red", "emoji": "🎨", "short_description": "x" * 60}
    name, value = line.split(": ")
    text = "---\n" + "".join(f"{key}: {item}\n" for key, item in good.items()) + "---\n"
    assert validate_card(text, "space") == ([], [])
    bad = "---\n" + "".join(f"{key}: {item}\n" for key, item in {**good, name: value}.items()) + "---\n"
    (message,) = validate_card(bad, "space")[0]
    assert message.startswith(error)


def test_card_without_front_matter():
    assert validate_card("# Hello", "model") == ([], ["empty or missing yaml metadata in repo card"])
