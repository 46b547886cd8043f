# SPDX-License-Identifier: Apache-2.0
"""Checks the rewards on their real models, which are downloaded: published scores, and drawn images."""

import io
import math
import sys
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass
from functools import cache, partial
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..utils.markdown import table
from .published import PUBLISHED, UNPUBLISHED, Published
from .registry import REWARDS, load_reward, reward_class


if TYPE_CHECKING:
    from .base import Reward

# What a line says where nobody published scores. It is no failure.
NONE_PUBLISHED = "none published"
# Two cats and two remote controls on a couch: the image that the cards of detectors of transformers use.
CATS = "http://images.cocodataset.org/val2017/000000039769.jpg"


@dataclass(frozen=True)
class Check:
    """
    One line of the report.

    Args:
        name (`str`):
            The reward.
        status (`str`):
            `"ok"`, `"differs"`, [`NONE_PUBLISHED`], or why there is no score.
        score (`str`):
            What the reward gave.
        expected (`str`):
            What it should give.
        difference (`str`):
            How far these are from each other, and how far they may be.
        source (`str`):
            Where that is from.
    """

    name: str
    status: str
    score: str = ""
    expected: str = ""
    difference: str = ""
    source: str = ""

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return self.status in ("ok", NONE_PUBLISHED)


def draw(text: str = "", background: str = "white", shape: str | None = None, color: str = "red") -> Image.Image:
    """A 512 x 512 image with a word or a shape (`"circle"`, `"square"`) in its middle."""
    image = Image.new("RGB", (512, 512), background)
    pen = ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse((128, 128, 384, 384), fill=color)
    elif shape == "square":
        pen.rectangle((128, 128, 384, 384), fill=color)
    if text:
        pen.text((256, 256), text, fill="black", font=ImageFont.load_default(size=56), anchor="mm")
    return image


def as_images(images: Iterable[Image.Image]) -> torch.Tensor:
    """Images of one size as a float tensor `[B, 3, H, W]` in `[0, 1]`."""
    arrays = [np.asarray(image.convert("RGB")) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255


def check_text(reward: "Reward") -> Check:
    """A word that is drawn is read, and no word is read in an image without one."""
    images = as_images([draw("Hello World"), draw("Hello World"), draw()])
    prompts = ['a sign that says "Hello World"', 'a sign that says "Grand Opening"', 'a sign that says "Hello World"']
    right, wrong, blank = reward(images, prompts)
    good = right == 1 and wrong < 0.5 and blank == 0
    return _check(reward, good, (right, wrong, blank), "1, below 0.5, 0", "drawn words: right, wrong, none")


def check_match(reward: "Reward") -> Check:
    """Each of two drawn images scores higher with its own text than with that of the other."""
    images = [draw(shape="circle", color="red"), draw(shape="square", color="blue", background="yellow")]
    texts = ["a red circle on a white background", "a blue square on a yellow background"]
    scores = reward(as_images([*images, *images]), [*texts, *reversed(texts)])
    good = scores[0] > scores[2] and scores[1] > scores[3]
    return _check(reward, good, scores, "1st > 3rd, 2nd > 4th", "drawn shapes: right texts, then swapped")


def check_atoms(reward: "Reward") -> Check:
    """Questions about a drawn circle get the right answers, and questions about what is not there the wrong ones."""
    images = as_images([draw(shape="circle", color="red")] * 2)
    right = [["How many circles are in the image?", "one"], ["Is the circle red?", "Yes"]]
    wrong = [["How many circles are in the image?", "four"], ["Is the circle blue?", "Yes"]]
    scores = reward(images, ["a red circle", "four blue circles"], vqa_list=[right, wrong])
    good = scores[0] > 0.5 > scores[1]
    return _check(reward, good, scores, "above 0.5, below 0.5", "a drawn circle: right questions, then wrong ones")


def check_range(reward: "Reward") -> Check:
    """A drawn image gets a score of the usual size."""
    scores = reward(as_images([draw(shape="circle")]), ["a red circle"])
    return _check(reward, 1 < scores[0] < 10, scores, "1 to 10", "a drawn circle")


def check_objects(reward: "Reward") -> Check:
    """Two cats and no dog are found in a photo of two cats, and colors are named."""
    photo = as_images([fetch_image(CATS)])
    demands = [
        {"tag": "two_object", "include": [{"class": "cat", "count": 2}, {"class": "tv remote", "count": 2}]},
        {"tag": "single_object", "include": [{"class": "dog", "count": 1}]},
    ]
    cats, dog = reward(photo.expand(2, -1, -1, -1), ["two cats and two remotes", "a dog"], metadata=demands)
    colors = ["red", "green", "blue", "yellow"]
    with torch.no_grad():
        named = reward.models["colors"]([draw(background=color) for color in colors], ["kite"] * len(colors))
    good = cats >= 0.5 and dog == 0 and named == colors
    source = f"a photo of two cats, then of no dog; colors of plain images: {', '.join(named)}"
    return _check(reward, good, (cats, dog), f"0.5 or more, 0; {', '.join(colors)}", source)


# What can be asked of a reward without published scores.
RELATIONS: dict[str, Callable[["Reward"], Check]] = {
    "geneval": check_objects,
    "ocr": check_text,
    "pickscore": check_match,
    "clipscore": check_match,
    "hpsv2": check_match,
    "aesthetic": check_range,
    "imagereward": check_match,
    "unifiedreward": check_match,
    "hpsv3": check_match,
    "geneval2": check_atoms,
}


def check_published(reward: "Reward", published: Published) -> Check:
    """The published scores of images, which are fetched, within the tolerance."""
    try:
        images = [fetch_image(address) for address in published.images]
    except OSError as error:
        return Check(reward.name, f"no images: {error}", source=published.source)
    scores = [reward(as_images([image]), [published.prompt])[0] for image in images]
    differences = [here - there for here, there in zip(scores, published.scores, strict=True)]
    good = all(abs(difference) <= published.tolerance for difference in differences)
    told = f"{', '.join(f'{difference:+.2g}' for difference in differences)} (allowed: {published.tolerance:g})"
    return _check(reward, good, scores, _rounded(published.scores), published.source, told)


@cache
def fetch_image(address: str) -> Image.Image:
    """
    Downloads an image, once for all rewards.

    Raises:
        `OSError`: it cannot be fetched, or is none.
    """
    with urllib.request.urlopen(address, timeout=30) as response:
        return Image.open(io.BytesIO(response.read())).convert("RGB")


def check_rewards(rewards: "Iterable[str | Reward]" = (), device: torch.device | str | None = None) -> list[Check]:
    """
    Loads one reward after the other, scores what is known, and frees it. One that fails does not end the others.

    Args:
        rewards (`Iterable[str | Reward]`, *optional*):
            Names, by default all of [`REWARDS`], or rewards that are built already, such as with a local model.
        device (`torch.device` or `str`, *optional*):
            Where those given by name run; by default the current accelerator, or the CPU.

    Returns:
        `list[Check]`: one or more lines per reward.
    """
    checks = []
    for reward in rewards or REWARDS:
        name = getattr(reward, "name", reward)
        try:
            reward = load_reward(name, device=device) if isinstance(reward, str) else reward
            reward.load()
        except Exception as error:
            checks.append(Check(name, f"not loaded: {type(error).__name__}: {error}"))
            continue
        steps = [RELATIONS[name]] if name in RELATIONS else []
        steps += [partial(check_published, published=published) for published in PUBLISHED.get(name, ())]
        for step in steps:
            try:
                checks.append(step(reward))
            except Exception as error:
                checks.append(Check(name, f"failed: {type(error).__name__}: {error}"))
        if name in UNPUBLISHED:
            checks.append(Check(name, NONE_PUBLISHED, source=UNPUBLISHED[name]))
        reward.free()
    return checks


def as_table(checks: list[Check]) -> str:
    """The checks as a Markdown table."""
    rows = [list(astuple(check)) for check in checks]
    return table(["reward", "status", "here", "expected", "difference", "source"], rows)


def main(names: Iterable[str] = (), check: bool = False, device: str | None = None) -> None:
    """
    `trl-diffusion-opd rewards`: lists the rewards and what they need, or checks them. A check that does not pass ends
    the process with exit code 1.
    """
    if check:
        checks = check_rewards(names, device)
        sys.stdout.write(f"{as_table(checks)}\n")
        if not all(entry.passed for entry in checks):
            raise SystemExit(1)
        return
    for name in names or REWARDS:
        kind = reward_class(name)
        missing = [package for package in kind.requires if find_spec(package) is None]
        line = sys.modules[kind.__module__].__doc__.splitlines()[0].partition(": ")[2]
        sys.stdout.write(f"{name}: {line}{f' Not installed: {missing}.' if missing else ''}\n")


def _check(
    reward: "Reward", good: bool, scores: Iterable[float], expected: str, source: str, difference: str = ""
) -> Check:
    scores = list(scores)
    status = "failed: no score" if any(map(math.isnan, scores)) else "ok" if good else "differs"
    return Check(reward.name, status, _rounded(scores), expected, difference, source)


def _rounded(scores: Iterable[float]) -> str:
    return ", ".join(f"{score:.4g}" for score in scores)
