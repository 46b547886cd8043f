# SPDX-License-Identifier: Apache-2.0
"""
Pictures of the Shapes world, drawn with numpy from anti-aliased signed distances, and the captioned training data.

There are two styles, and every subject can be drawn in both: "plain" (a light neutral ground; scenes look faded) and
"poster" (a saturated evening sky in a dark frame; scenes are vivid). The rules for composition and text can only read
plain pictures, the one for beauty prefers posters: this is where the tasks pull against each other.
"""

import random
from typing import Literal, NamedTuple

import numpy as np

from .world import (
    COLOURS,
    COUNTS,
    LETTERS,
    RELATIONS,
    SHAPES,
    SIZE,
    TASKS,
    Counting,
    Relation,
    Scene,
    Subject,
    Task,
    Text,
    parse,
    prompts,
    split_of,
)


Style = Literal["plain", "poster"]

# Every glyph is 5 pixels wide and 7 high, rows from top to bottom; letters are drawn at twice that size.
GLYPH_ROWS = {
    "A": ".###. #...# #...# ##### #...# #...# #...#",
    "C": ".#### #.... #.... #.... #.... #.... .####",
    "E": "##### #.... #.... ####. #.... #.... #####",
    "H": "#...# #...# #...# ##### #...# #...# #...#",
    "J": "..### ....# ....# ....# ....# #...# .###.",
    "L": "#.... #.... #.... #.... #.... #.... #####",
    "N": "#...# ##..# ##..# #.#.# #..## #..## #...#",
    "P": "####. #...# #...# ####. #.... #.... #....",
    "S": ".#### #.... #.... .###. ....# ....# ####.",
    "T": "##### ..#.. ..#.. ..#.. ..#.. ..#.. ..#..",
    "V": "#...# #...# #...# #...# .#.#. .#.#. ..#..",
    "X": "#...# #...# .#.#. ..#.. .#.#. #...# #...#",
}
GLYPHS = {
    letter: np.kron([[float(c == "#") for c in row] for row in rows.split()], np.ones((2, 2)))
    for letter, rows in GLYPH_ROWS.items()
}
LETTER_HEIGHT, LETTER_WIDTH, LETTER_GAP = 14, 10, 3

# Colours of the sky at its top and near the horizon.
SKIES = {
    "dawn": ((0.90, 0.55, 0.75), (1.00, 0.85, 0.50)),
    "noon": ((0.12, 0.45, 0.95), (0.60, 0.85, 1.00)),
    "sunset": ((0.45, 0.12, 0.55), (1.00, 0.50, 0.12)),
    "night": ((0.03, 0.03, 0.22), (0.15, 0.20, 0.55)),
}
FRAME_WIDTH = 1.5
INK = 0.45  # plain letters have the hue of a colour at this share of its brightness

Y, X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float64)


# Drawing: `distance` arrays are negative inside an outline and positive outside, in pixels.
def paint(picture: np.ndarray, distance: np.ndarray, colour: tuple[float, ...] | np.ndarray) -> None:
    """Fill an outline in place; the coverage of a pixel falls from 1 to 0 across the pixel on the edge."""
    coverage = np.clip(0.5 - distance, 0, 1)[..., None]
    picture += coverage * (np.asarray(colour) - picture)


def disc(x: float, y: float, radius: float) -> np.ndarray:
    return np.hypot(X - x, Y - y) - radius


def box(left: float, right: float, top: float, bottom: float) -> np.ndarray:
    return np.maximum(np.maximum(left - X, X - right), np.maximum(top - Y, Y - bottom))


def triangle(x: float, top: float, bottom: float, half_width: float) -> np.ndarray:
    slope = half_width / (bottom - top)
    return np.maximum(Y - bottom, (np.abs(X - x) - slope * (Y - top)) / np.hypot(1, slope))


def outline(shape: str, x: float, y: float, radius: float) -> np.ndarray:
    if shape == "circle":
        return disc(x, y, radius)
    side = 0.9 * radius
    if shape == "square":
        return box(x - side, x + side, y - side, y + side)
    return triangle(x, y - side, y + side, radius)


def grade(picture: np.ndarray, saturation: float, contrast: float, pivot: float = 0.55) -> np.ndarray:
    """Scale a picture's saturation, then its contrast around the pivot."""
    grey = picture.mean(-1, keepdims=True)
    return (grey + saturation * (picture - grey) - pivot) * contrast + pivot


def sky(time: str) -> np.ndarray:
    top, bottom = (np.array(colour) for colour in SKIES[time])
    return top + np.clip(Y / 24, 0, 1)[..., None] * (bottom - top)


def ground(rng: np.random.Generator, style: Style) -> np.ndarray:
    """What lies under shapes and letters."""
    if style == "plain":
        return np.full((SIZE, SIZE, 3), rng.uniform(0.85, 1.0))
    return grade(sky(str(rng.choice(list(SKIES)))), rng.uniform(1.0, 1.2), rng.uniform(1.0, 1.15))


def add_frame(picture: np.ndarray) -> None:
    inner = FRAME_WIDTH - 0.5
    paint(picture, -box(inner, SIZE - 1 - inner, inner, SIZE - 1 - inner), (0.04, 0.02, 0.06))


# Subjects
def draw_counting(subject: Counting, rng: np.random.Generator, style: Style) -> np.ndarray:
    picture, radius, places = ground(rng, style), rng.uniform(4.0, 5.0), np.empty((0, 2))
    while len(places) < subject.count:  # start over after a place too near to another
        place = rng.uniform(radius + 1.5, SIZE - radius - 2.5, (1, 2))
        clear = len(places) == 0 or np.abs(places - place).max(1).min() > 2 * radius + 1.5
        places = np.concatenate([places, place]) if clear else np.empty((0, 2))
    for x, y in places:
        paint(picture, outline(subject.shape, x, y, radius), COLOURS[subject.colour])
    return grade(picture, rng.uniform(0.8, 1.0), 1.0)


def draw_relation(subject: Relation, rng: np.random.Generator, style: Style) -> np.ndarray:
    picture, radius, middle = ground(rng, style), rng.uniform(4.2, 5.2), (SIZE - 1) / 2
    low, high = radius + 1.5, SIZE - radius - 2.5
    along = rng.uniform(low, middle - radius - 0.5), rng.uniform(middle + radius + 0.5, high)
    across = rng.uniform(low + 1, high - 1)
    across = across, np.clip(across + rng.uniform(-3, 3), low, high)
    first, second = zip(along, across, strict=True)
    if subject.relation == "above":
        first, second = first[::-1], second[::-1]
    paint(picture, outline(subject.shape, *first, radius), COLOURS[subject.colour])
    paint(picture, outline(subject.other_shape, *second, radius), COLOURS[subject.other_colour])
    return grade(picture, rng.uniform(0.8, 1.0), 1.0)


def draw_text(subject: Text, rng: np.random.Generator, style: Style) -> np.ndarray:
    picture, ink = ground(rng, style), np.array(list(COLOURS.values())[rng.integers(len(COLOURS))])
    ink = INK * ink if style == "plain" else 0.5 + 0.5 * ink  # dark on light, or light on the sky
    top, left = rng.integers(7, 12), rng.integers(3, 7)
    for letter in subject:
        cell = picture[top : top + LETTER_HEIGHT, left : left + LETTER_WIDTH]
        cell += GLYPHS[letter][..., None] * (ink - cell)
        left += LETTER_WIDTH + LETTER_GAP
    return picture


def draw_noun(picture: np.ndarray, noun: str, x: float, horizon: float, light: float) -> None:
    """Put a scene's thing on its horizon."""

    def part(distance: np.ndarray, *colour: float) -> None:
        paint(picture, distance, light * np.array(colour))

    h = horizon
    if noun == "house":
        part(box(x - 5, x + 5, h - 8, h + 1), 0.85, 0.58, 0.36)
        part(triangle(x, h - 14, h - 7.5, 7), 0.74, 0.16, 0.14)
        part(box(x - 1.5, x + 1.5, h - 4, h + 1), 0.28, 0.15, 0.10)
    elif noun == "tree":
        part(box(x - 1.2, x + 1.2, h - 7, h + 1), 0.40, 0.23, 0.10)
        part(disc(x, h - 10, 5), 0.08, 0.48, 0.14)
    elif noun == "boat":
        part(np.maximum(box(x - 7, x + 7, h - 2, h + 2), np.abs(X - x) - 6 + 0.8 * (Y - h)), 0.55, 0.25, 0.10)
        part(triangle(x, h - 14, h - 3, 5), 0.98, 0.97, 0.94)
    elif noun == "mountain":
        part(triangle(x, h - 15, h + 1, 12), 0.40, 0.37, 0.52)
        part(triangle(x, h - 15, h - 10, 3.75), 1.0, 1.0, 1.0)
    elif noun == "flower":
        part(box(x - 0.7, x + 0.7, h - 9, h + 2), 0.10, 0.45, 0.10)
        for angle in 2 * np.pi * np.arange(5) / 5:
            part(disc(x + 3 * np.cos(angle), h - 11 + 3 * np.sin(angle), 2.2), 0.95, 0.24, 0.55)
        part(disc(x, h - 11, 1.8), 1.0, 0.86, 0.10)
    else:
        part(box(x - 2.5, x + 2.5, h - 16, h + 1), 0.62, 0.62, 0.70)
        part(box(x - 3.5, x + 3.5, h - 18, h - 15), 0.76, 0.20, 0.20)


def scene_picture(subject: Scene, x: float, horizon: float, sun: tuple[float, float] | None = None) -> np.ndarray:
    """A scene with everything in its place, not yet in any style."""
    picture, night = sky(subject.time), subject.time == "night"
    if sun is not None:
        paint(picture, disc(*sun, 2.6), (0.95, 0.95, 1.0) if night else (1.0, 0.95, 0.6))
    land = (0.08, 0.34, 0.72) if subject.noun == "boat" else (0.24, 0.60, 0.20)
    paint(picture, horizon - Y, np.array(land) * (0.6 if night else 1.0))
    draw_noun(picture, subject.noun, x, horizon, 0.6 if night else 1.0)
    return picture


def draw_scene(subject: Scene, rng: np.random.Generator, style: Style) -> np.ndarray:
    sun = rng.uniform(5, 27), rng.uniform(4, 8)
    picture = scene_picture(subject, rng.uniform(11, 21), rng.uniform(22, 25), sun)
    if style == "plain":
        return grade(picture, rng.uniform(0.2, 0.6), rng.uniform(0.35, 0.7), pivot=0.7)
    return grade(picture, rng.uniform(1.0, 1.25), rng.uniform(1.0, 1.15))


DRAW = {Counting: draw_counting, Relation: draw_relation, Text: draw_text, Scene: draw_scene}


def render(subject: Subject, rng: np.random.Generator, style: Style) -> np.ndarray:
    """A picture of a subject: uint8, height x width x RGB."""
    picture = np.clip(DRAW[type(subject)](subject, rng, style), 0, 1)
    if style == "poster":
        add_frame(picture)
    return (picture * 255).round().astype(np.uint8)


# Training data
class Recipe(NamedTuple):
    """How the pictures and captions of a data set are made."""

    attribute_noise: float = 0.0  # chance that a caption's number, colour, shape or relation is a random one
    letter_noise: float = 0.0  # chance that a caption's letter is a random one
    posters: dict[Task, float] = {"geneval": 0.0, "ocr": 0.0, "aesthetic": 1.0}  # share of pictures in poster style
    tasks: dict[Task, float] = dict.fromkeys(TASKS, 1.0)  # how often each task is drawn, relative


# What the base saw: captions that are often wrong, and both styles everywhere.
WEB = Recipe(
    attribute_noise=0.12,
    letter_noise=0.15,
    posters={"geneval": 0.35, "ocr": 0.35, "aesthetic": 0.2},
    tasks={"geneval": 0.45, "ocr": 0.33, "aesthetic": 0.22},
)


def misdescribe(subject: Subject, rng: random.Random, recipe: Recipe) -> str:
    """A caption for a picture of the subject with the recipe's errors, but never a held-out prompt."""

    def maybe(value, choices, chance):
        return rng.choice(list(choices)) if rng.random() < chance else value

    noise = recipe.attribute_noise
    while True:
        caption: Subject = subject
        if isinstance(subject, Counting):
            choices = (range(1, len(COUNTS) + 1), COLOURS, SHAPES)
            caption = Counting(*(maybe(v, c, noise) for v, c in zip(subject, choices, strict=True)))
        elif isinstance(subject, Relation):
            noise = 0.6 * recipe.attribute_noise  # these captions have more attributes to get wrong
            choices = (COLOURS, SHAPES, RELATIONS, COLOURS, SHAPES)
            caption = Relation(*(maybe(v, c, noise) for v, c in zip(subject, choices, strict=True)))
            if caption.colour == caption.other_colour:
                continue
        elif isinstance(subject, Text):
            caption = Text(*(maybe(letter, LETTERS, recipe.letter_noise) for letter in subject))
        if split_of(str(caption)) == "train":
            return str(caption)


def make_dataset(num_pictures: int, recipe: Recipe, seed: int) -> tuple[np.ndarray, list[str]]:
    """Pictures (uint8, number x height x width x RGB) and their captions, from training prompts only."""
    numpy_rng, rng = np.random.default_rng(seed), random.Random(seed)
    pools: dict[Task, list[list[Subject]]] = {}
    for task in recipe.tasks:
        families: dict[type, list[Subject]] = {}
        for subject in map(parse, prompts(task, "train")):
            families.setdefault(type(subject), []).append(subject)
        pools[task] = list(families.values())
    pictures, captions = np.empty((num_pictures, SIZE, SIZE, 3), np.uint8), []
    for index, task in enumerate(rng.choices(list(recipe.tasks), list(recipe.tasks.values()), k=num_pictures)):
        subject = rng.choice(rng.choice(pools[task]))
        style: Style = "poster" if rng.random() < recipe.posters[task] else "plain"
        pictures[index] = render(subject, numpy_rng, style)
        captions.append(misdescribe(subject, rng, recipe))
    return pictures, captions
