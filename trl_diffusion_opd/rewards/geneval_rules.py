# SPDX-License-Identifier: Apache-2.0
"""
The rules of GenEval (https://huggingface.co/papers/2310.11513) on detected objects: no model, no image.

Two judgments exist. The benchmark asks whether the most confident `count` objects fit (`is_correct`); Flow-GRPO and
DiffusionNFT train on a partial score with exact counts (`partial_score`).
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


# The classes of COCO in its order. Three are called otherwise in the prompts of GenEval: those are 64, 65 and 66.
CLASSES = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow"),
    *("elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee"),
    *("skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard"),
    *("tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
    *("sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch"),
    *("potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote"),
    *("computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock"),
    *("vase", "scissors", "teddy bear", "hair drier", "toothbrush"),
)
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
SCORE_THRESHOLD = 0.3
COUNTING_SCORE_THRESHOLD = 0.9
MAX_PER_CLASS = 16
# Share of the two sizes by which objects may be shifted without being left, right, above or below.
POSITION_TOLERANCE = 0.1


@dataclass
class Detection:
    """
    One detected object.

    Args:
        label (`int`):
            Index into `CLASSES`.
        score (`float`):
            Confidence.
        box (`tuple[float, float, float, float]`):
            Left, top, right and bottom edge in pixels.
        mask (`np.ndarray`, *optional*):
            Which pixels belong to it, `[H, W]` of `bool`.
        color (`str`, *optional*):
            One of `COLORS`, where a clause asks for it.
    """

    label: int
    score: float
    box: tuple[float, float, float, float]
    mask: np.ndarray | None = None
    color: str | None = None


Objects = dict[str, list[Detection]]


def parse_metadata(metadata: str | Mapping[str, Any]) -> dict[str, Any]:
    """
    Brings what a prompt demands into one form: `tag`, `include` and `exclude`, clauses without empty entries.

    Args:
        metadata (`str` or `Mapping`):
            A line of GenEval's `evaluation_metadata.jsonl`, as JSON text or read.

    Raises:
        `ValueError`: a tag, class, color or relation that GenEval does not know, or a count below 1.
    """
    metadata = json.loads(metadata) if isinstance(metadata, str) else metadata
    if not isinstance(metadata, Mapping) or metadata.get("tag") not in TAGS or not metadata.get("include"):
        raise ValueError(f"GenEval's `metadata` must hold a `tag` of {TAGS} and an `include`, but is {metadata!r}.")
    parsed = {"tag": metadata["tag"]}
    for part in ("include", "exclude"):
        # Columns of Arrow fill what a clause lacks with `None`.
        clauses = [{k: v for k, v in clause.items() if v is not None} for clause in metadata.get(part) or ()]
        for index, clause in enumerate(clauses):
            _check_clause(clause, index)
        parsed[part] = clauses
    return parsed


def _check_clause(clause: Mapping[str, Any], index: int) -> None:
    relation, target = clause.get("position", (RELATIONS[0], 0))
    for name, value, known in (
        ("class", clause.get("class"), CLASSES),
        ("color", clause.get("color", COLORS[0]), COLORS),
        ("position", relation, RELATIONS),
    ):
        if value not in known:
            raise ValueError(f"GenEval's `metadata` has the {name} {value!r} in {dict(clause)}. Known are {known}.")
    if clause.get("count", 0) < 1 or ("position" in clause and not 0 <= target < index):
        raise ValueError(
            f"GenEval's `metadata` has the clause {dict(clause)} at place {index}. A count must be at least 1, and a "
            "position must refer to a clause before."
        )


def keep_objects(detections: Sequence[Detection], tag: str) -> Objects:
    """The objects that count, by class, most confident first: above the threshold of the tag, at most 16 per class."""
    threshold = COUNTING_SCORE_THRESHOLD if tag == "counting" else SCORE_THRESHOLD
    objects: Objects = {}
    for detection in sorted(detections, key=lambda detection: -detection.score):
        group = objects.setdefault(CLASSES[detection.label], [])
        if detection.score > threshold and len(group) < MAX_PER_CLASS:
            group.append(detection)
    return {name: group for name, group in objects.items() if group}


def objects_to_color(objects: Objects, metadata: Mapping[str, Any]) -> list[Detection]:
    """Detections whose color decides: the first `count` of every class with a color clause, if there are that many."""
    wanted = {}
    for clause in metadata["include"]:
        group = objects.get(clause["class"], [])
        if "color" in clause and len(group) >= clause["count"]:
            wanted.update({id(detection): detection for detection in group[: clause["count"]]})
    return list(wanted.values())


def relative_position(box: Sequence[float], target: Sequence[float]) -> set[str]:
    """Where a box is as seen from a target: any of `RELATIONS`, none if the two are too close to each other."""
    boxes = np.array([box, target], dtype=float)
    offset = (boxes[0, :2] + boxes[0, 2:] - boxes[1, :2] - boxes[1, 2:]) / 2
    tolerance = POSITION_TOLERANCE * (boxes[:, 2:] - boxes[:, :2]).sum(axis=0)
    shift = np.sign(offset) * np.maximum(np.abs(offset) - tolerance, 0)
    if (np.abs(shift) < 1e-3).all():
        return set()
    dx, dy = shift / np.linalg.norm(offset)
    holds = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {relation for relation, true in holds.items() if true}


def _position_holds(group: list[Detection], targets: list[Detection], relation: str) -> bool:
    return all(relation in relative_position(a.box, b.box) for a in group for b in targets)


def is_correct(objects: Objects, metadata: Mapping[str, Any]) -> bool:
    """
    The benchmark's judgment. Only the most confident `count` objects of a class are looked at, so more of them do no
    harm unless an `exclude` clause forbids it.
    """
    matched: list[list[Detection] | None] = []
    for clause in metadata["include"]:
        count = clause["count"]
        group = objects.get(clause["class"], [])[:count]
        right = len(group) == count
        if right and "color" in clause:
            right = all(detection.color == clause["color"] for detection in group)
        if right and "position" in clause:
            relation, target = clause["position"]
            right = matched[target] is not None and _position_holds(group, matched[target], relation)
        matched.append(group if right else None)
    return None not in matched and all(
        len(objects.get(clause["class"], [])) < clause["count"] for clause in metadata["exclude"]
    )


def partial_score(objects: Objects, metadata: Mapping[str, Any], *, position_quirk: bool = True) -> tuple[float, bool]:
    """
    The score of training: a mean over what the prompt asks for. It falls below 0 where there are more than twice as
    many objects as asked for.

    Args:
        objects (`dict[str, list[Detection]]`):
            Objects by class, from [`keep_objects`].
        metadata (`Mapping`):
            From [`parse_metadata`].
        position_quirk (`bool`, *optional*, defaults to `True`):
            Whether a wrong position gives a 0 and a 1, as in the code of Flow-GRPO and DiffusionNFT, in place of a 0
            only. Teachers of these papers were trained with it.

    Returns:
        `tuple[float, bool]`: the score, and whether everything is met, counts exactly.
    """
    scores: list[float] = []
    matched: list[list[Detection] | None] = []
    for clause in metadata["include"]:
        count, group = clause["count"], objects.get(clause["class"], [])
        scores.append(1 - abs(count - len(group)) / count)
        right = len(group) == count
        if not right and ("color" in clause or "position" in clause):
            scores.append(0.0)
        if right and "color" in clause:
            num_colored = sum(detection.color == clause["color"] for detection in group)
            scores.append(1 - abs(count - num_colored) / count)
            right = num_colored == count
        if right and "position" in clause:
            relation, target = clause["position"]
            if matched[target] is None:
                scores.append(0.0)
                right = False
            else:
                right = _position_holds(group, matched[target], relation)
                scores += [1.0] if right else [0.0, 1.0] if position_quirk else [0.0]
        matched.append(group if right else None)
    return sum(scores) / len(scores), None not in matched


def summarize(tags: Sequence[str], scores: Sequence[float]) -> dict[str, float]:
    """
    Means of scores of images.

    Returns:
        `dict[str, float]`: the mean of each tag under its name, `score` (the benchmark's number, the mean over the
        tags), `accuracy` (the mean over the images, which DiffusionNFT logs) and `num_failed`, the images without a
        score (NaN), which are left out of the means.
    """
    by_tag: dict[str, list[float]] = {}
    for tag, score in zip(tags, scores, strict=True):
        if not math.isnan(score):
            by_tag.setdefault(tag, []).append(float(score))
    means = {tag: sum(by_tag[tag]) / len(by_tag[tag]) for tag in sorted(by_tag, key=TAGS.index)}
    valid = [score for values in by_tag.values() for score in values]
    return {
        **means,
        "score": sum(means.values()) / len(means) if means else math.nan,
        "accuracy": sum(valid) / len(valid) if valid else math.nan,
        "num_failed": len(scores) - len(valid),
    }
