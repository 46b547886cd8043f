# SPDX-License-Identifier: Apache-2.0
"""
Rules that score pictures of the Shapes world against their prompts.

Each of `REWARDS` takes a float tensor of pictures in [0, 1], batch x 3 x height x width, and the prompts, and returns
one score a picture. `geneval` and `ocr` give 0 or 1: everything asked for must be there and nothing else. `aesthetic`
lies in [0, 1]: colour and contrast, times how well the prompt's thing can be made out.

Everything is computed in float64, one picture after the other where sums are long: a score does not depend on the other
pictures of its batch, and on the machine only in the last digits.
"""

import colorsys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from .render import GLYPHS, scene_picture
from .world import COLOURS, LETTERS, NOUNS, SIZE, Counting, Scene, parse


try:
    from scipy import ndimage
except ImportError as error:
    raise ImportError("The rewards of the Shapes world need scipy. Install it with `pip install scipy`.") from error


def _to_numpy(images: Any) -> np.ndarray:
    """Pictures as float64, batch x height x width x RGB."""
    array = images.detach().cpu().double().numpy() if hasattr(images, "detach") else np.asarray(images, np.float64)
    if array.ndim != 4 or array.shape[1:] != (3, SIZE, SIZE):
        raise ValueError(f"`images` must have the shape (batch, 3, {SIZE}, {SIZE}) but has {array.shape}.")
    return np.ascontiguousarray(array.transpose(0, 2, 3, 1))


# Correlations
TIE = 1e-9  # correlations that differ by less are the same: rounding errors choose nothing


def _templates(pictures: list[np.ndarray]) -> np.ndarray:
    """Pictures (height x width x channels) as channels x height x width x number, without mean color, of unit length."""
    stack = np.stack(pictures, axis=-1)
    stack = (stack - stack.mean((0, 1))).transpose(2, 0, 1, 3)
    return stack / np.linalg.norm(stack.reshape(-1, len(pictures)), axis=0)


def _correlations(picture: np.ndarray, templates: np.ndarray, floor: float) -> np.ndarray:
    """
    Correlation of every template with a picture (height x width x channels) at every place: rows x columns x templates.
    `floor` is added to the norm of a window. The windows lose their mean before anything is squared, so that no
    digits cancel in one that is almost flat.
    """
    channels, height, width, number = templates.shape
    planes = np.ascontiguousarray(picture.transpose(2, 0, 1))
    windows = np.lib.stride_tricks.sliding_window_view(planes, (height, width), (1, 2))
    rows, columns = windows.shape[1:3]
    windows = windows.reshape(channels, rows * columns, height * width)
    windows -= windows.mean(-1, keepdims=True)
    products = (windows @ templates.reshape(channels, height * width, number)).sum(0)
    norms = np.sqrt(np.einsum("cij,cij->i", windows, windows))
    return (products / (norms + floor)[:, None]).reshape(rows, columns, number)


# Composition
MIN_CHROMA = 0.2  # a pixel belongs to an object if its largest and smallest channel differ by more
MIN_AREA = 9  # smaller specks are overlooked
MIN_OFFSET = 3  # pixels by which one object must be left of or above the other
HUES = {name: colorsys.rgb_to_hsv(*rgb)[0] for name, rgb in COLOURS.items()}


def _colour_name(rgb: np.ndarray) -> str:
    hue = colorsys.rgb_to_hsv(*rgb)[0]
    return min(HUES, key=lambda name: abs((hue - HUES[name] + 0.5) % 1 - 0.5))


def _shape_name(coverage: np.ndarray) -> str:
    """Tell a shape by how much of its bounding box it fills, and by how wide its top and its bottom are."""
    widths = coverage.sum(1)
    fill = widths.sum() / (widths.max() * coverage.sum(0).max())
    third = max(1, len(widths) // 3)
    if fill < 0.8 and widths[:third].mean() < 0.62 * widths[-third:].mean():
        return "triangle"
    return "square" if fill > 0.89 else "circle"


def find_objects(picture: np.ndarray) -> list[tuple[str, str, float, float]]:
    """Colour, shape, and centre (x, y) of every coloured object on a neutral ground."""
    chroma = picture.max(-1) - picture.min(-1)
    labels, _ = ndimage.label(chroma > MIN_CHROMA)
    found = []
    for index, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        mask = labels[rows, columns] == index
        if mask.sum() < MIN_AREA:
            continue
        inside = chroma[rows, columns] * mask
        coverage = np.clip(inside / np.percentile(inside[mask], 75), 0, 1)
        ys, xs = np.nonzero(mask)
        colour = _colour_name(picture[rows, columns][mask].mean(0))
        found.append((colour, _shape_name(coverage), columns.start + xs.mean(), rows.start + ys.mean()))
    return found


def geneval(images: Any, prompts: list[str], **columns: Any) -> list[float]:
    """1 for a picture with exactly the objects asked for, in the places asked for."""
    return [float(score == 1) for score in geneval_partial(images, prompts)]


def geneval_partial(images: Any, prompts: list[str], **columns: Any) -> list[float]:
    """The share of what was asked for that is there, to train on: 1 where `geneval` is 1."""
    return [_share(picture, prompt) for picture, prompt in zip(_to_numpy(images), prompts, strict=True)]


def _share(picture: np.ndarray, prompt: str) -> float:
    """Right objects among those asked for, or among those found if these are more; and the relation is one thing more."""
    subject, objects = parse(prompt), find_objects(picture)
    if isinstance(subject, Counting):
        right = sum(found[:2] == (subject.colour, subject.shape) for found in objects)
        return min(right, subject.count) / max(len(objects), subject.count)
    wanted = [(subject.colour, subject.shape), (subject.other_colour, subject.other_shape)]
    places = [[found[2:] for found in objects if found[:2] == thing] for thing in wanted]
    right = sum(map(bool, places))
    if [len(place) for place in places] == [1, 1]:
        axis = 0 if subject.relation == "left of" else 1
        right += bool(places[1][0][axis] - places[0][0][axis] > MIN_OFFSET)
    return right / (max(len(objects), 2) + 1)


# Text
MIN_MATCH = 0.55  # correlation with a glyph below which nothing can be read
READING_FLOOR = 1.0  # added to the norm of a window, so that faint marks do not count as letters
_glyphs = _templates([GLYPHS[letter][..., None] for letter in LETTERS])


def read_text(pictures: np.ndarray) -> list[str]:
    """The dark letter in the left and the one in the right half of every picture; "?" where there is none."""
    return ["".join(map(_letter, _halves(1 - picture.mean(-1, keepdims=True)))) for picture in pictures]


def _halves(darkness: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How well each letter fits the left and the right half of a picture."""
    match = _correlations(darkness, _glyphs, READING_FLOOR)
    middle = match.shape[1] // 2
    return match[:, :middle].max((0, 1)), match[:, middle + 1 :].max((0, 1))


def _letter(match: np.ndarray) -> str:
    best = match.max()
    return LETTERS[(match > best - TIE).argmax()] if best > MIN_MATCH else "?"


def ocr(images: Any, prompts: list[str], **columns: Any) -> list[float]:
    """1 for a picture in which both letters are the right ones."""
    wanted = ["".join(parse(prompt)) for prompt in prompts]
    return [float(text == letters) for text, letters in zip(read_text(_to_numpy(images)), wanted, strict=True)]


# Beauty
FULL_COLOUR, FULL_CONTRAST = 0.46, 0.28  # colourfulness and contrast that earn all points
NO_LIKENESS, FULL_LIKENESS = 0.35, 0.75  # correlations at which a thing cannot, and can perfectly, be made out
VIEW_FLOOR = 0.1  # added to the norm of a view, so that an empty picture is like nothing
VIEW = (22, 17)  # height and width of the view on a thing: it begins 18 rows above the horizon


@lru_cache
def _views(time: str) -> np.ndarray:
    """What the things look like at one time of day."""
    x, horizon = SIZE / 2, 24.0
    top, left = round(horizon) - 18, round(x) - VIEW[1] // 2
    pictures = [scene_picture(Scene(noun, time), x, horizon) for noun in NOUNS]
    return _templates([picture[top : top + VIEW[0], left : left + VIEW[1]] for picture in pictures])


def likeness(pictures: np.ndarray, time: str) -> np.ndarray:
    """Best correlation of every picture (rows) with every noun (columns) over the places where a thing can stand."""
    match = np.empty((len(pictures), len(NOUNS)))
    for row, picture in enumerate(pictures):
        places = picture[3 : 8 + VIEW[0], 2 : 15 + VIEW[1]]
        match[row] = _correlations(places, _views(time), VIEW_FLOOR).max((0, 1))
    return match


def colour_and_contrast(pictures: np.ndarray) -> np.ndarray:
    """Half a point for colourfulness (Hasler and Suesstrunk, 2003), half a point for contrast."""
    red, green, blue = np.moveaxis(pictures, -1, 0).reshape(3, len(pictures), -1)
    red_green, yellow_blue = red - green, (red + green) / 2 - blue
    spread = np.hypot(red_green.std(-1), yellow_blue.std(-1))
    colourfulness = spread + 0.3 * np.hypot(red_green.mean(-1), yellow_blue.mean(-1))
    contrast = pictures.mean(-1).std((1, 2))
    return np.minimum(colourfulness / FULL_COLOUR, 1) / 2 + np.minimum(contrast / FULL_CONTRAST, 1) / 2


def aesthetic(images: Any, prompts: list[str], **columns: Any) -> list[float]:
    """Colour and contrast, times how clearly the thing stands out; halved if it looks more like another thing."""
    pictures, scenes = _to_numpy(images), [parse(prompt) for prompt in prompts]
    scores = colour_and_contrast(pictures)
    for time in {scene.time for scene in scenes}:
        rows = [index for index, scene in enumerate(scenes) if scene.time == time]
        wanted = [NOUNS.index(scenes[index].noun) for index in rows]
        match = likeness(pictures[rows], time)
        own = match[range(len(rows)), wanted]
        clarity = (own - NO_LIKENESS) / (FULL_LIKENESS - NO_LIKENESS)
        scores[rows] *= np.clip(clarity, 0, 1) * np.where(own > match.max(1) - TIE, 1.0, 0.5)
    return scores.tolist()


REWARDS: dict[str, Callable[..., list[float]]] = {"geneval": geneval, "ocr": ocr, "aesthetic": aesthetic}
