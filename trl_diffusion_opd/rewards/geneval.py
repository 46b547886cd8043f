# SPDX-License-Identifier: Apache-2.0
"""GenEval: are the objects of the prompt there, in number, color and place? A detector, CLIP for colors, and rules."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from .base import Reward
from .detector import SHORTEST_EDGE, detect
from .geneval_rules import (
    CLASSES,
    COLORS,
    SCORE_THRESHOLD,
    Detection,
    is_correct,
    keep_objects,
    objects_to_color,
    parse_metadata,
    partial_score,
)
from .models import features, load_pretrained
from .preprocessing import clip_pixels, to_uint8


COLOR_TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
# What surrounds an object when its color is judged: #999.
BACKGROUND = 0x99


class ColorClassifier(nn.Module):
    """
    Names the colors of objects by CLIP, without training: the nearest of the texts about each color.

    Args:
        clip ([`~transformers.CLIPModel`]):
            The model.
        tokenizer:
            Its tokenizer.
    """

    def __init__(self, clip: nn.Module, tokenizer: Any):
        super().__init__()
        self.clip = clip
        self.tokenizer = tokenizer
        self._texts: dict[str, torch.Tensor] = {}

    def text_features(self, name: str) -> torch.Tensor:
        """One normalized embedding per color, `[10, D]`: the mean of three texts."""
        if name not in self._texts:
            texts = [text.format(color=color, name=name) for color in COLORS for text in COLOR_TEMPLATES]
            length = self.clip.config.text_config.max_position_embeddings
            tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
            embeddings = features(self.clip.get_text_features(**tokens.to(self.clip.device)))
            mean = embeddings.view(len(COLORS), len(COLOR_TEMPLATES), -1).mean(1)
            self._texts[name] = (mean / mean.norm(dim=-1, keepdim=True)).cpu()
        return self._texts[name]

    def forward(self, crops: list[Image.Image], names: list[str]) -> list[str]:
        """The color of each crop, given what it shows."""
        pixels = clip_pixels(crops, self.clip.config.vision_config.image_size, center=round)  # as OpenCLIP does
        images = features(self.clip.get_image_features(pixels.to(self.clip.device, self.clip.dtype))).cpu()
        texts = torch.stack([self.text_features(name) for name in names])
        return [COLORS[i] for i in (texts @ images[:, :, None]).squeeze(-1).argmax(-1).tolist()]


def crop(image: np.ndarray, detection: Detection) -> Image.Image:
    """What is in the box of a detected object, `BACKGROUND` where its mask is not. `image`: `[H, W, 3]` of bytes."""
    left, top, right, bottom = map(int, detection.box)
    alone = np.where(detection.mask[..., None], image, np.uint8(BACKGROUND))
    return Image.fromarray(alone[top:bottom, left:right])


class GenEvalReward(Reward):
    """
    GenEval (https://huggingface.co/papers/2310.11513) with the Mask2Former of transformers.

    The detector is not the one of the published numbers, which is mmdet's: scores are close to those, not equal.

    Args:
        model_name_or_path (`str` or `Path`, *optional*, defaults to `"facebook/mask2former-swin-small-coco-instance"`):
            A Mask2Former that was trained on the instances of COCO.
        clip_name_or_path (`str` or `Path`, *optional*, defaults to `"openai/clip-vit-large-patch14"`):
            The CLIP that names colors.
        strict (`bool`, *optional*, defaults to `False`):
            Whether to give the benchmark's judgment, 1 or 0, in place of the partial score of training. For tables.
        position_quirk (`bool`, *optional*, defaults to `True`):
            Whether a wrong position costs half of what it should in the partial score, as in the code of Flow-GRPO
            and DiffusionNFT. See [`~rewards.geneval_rules.partial_score`].
        shortest_edge (`int`, *optional*, defaults to 800):
            Size at which objects are detected, in pixels.
        kwargs:
            `device`, `dtype` and `batch_size` of [`~rewards.base.Reward`].

    The dataset needs a column `metadata` with what a prompt demands: a line of GenEval's `evaluation_metadata.jsonl`,
    as text or as a dictionary; or such a file is the dataset itself, with columns `tag`, `include` and `exclude`.
    [`~rewards.geneval_prompts.geneval_prompts`] makes prompts with it.
    """

    name = "geneval"
    requires = ("scipy",)  # Mask2Former of transformers cannot be built without
    columns_needed = ("metadata",)
    batch_size = 8

    def __init__(
        self,
        *,
        model_name_or_path: str | Path = "facebook/mask2former-swin-small-coco-instance",
        clip_name_or_path: str | Path = "openai/clip-vit-large-patch14",
        strict: bool = False,
        position_quirk: bool = True,
        shortest_edge: int = SHORTEST_EDGE,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.model_name_or_path = model_name_or_path
        self.clip_name_or_path = clip_name_or_path
        self.strict = strict
        self.position_quirk = position_quirk
        self.shortest_edge = shortest_edge

    def load_models(self) -> dict[str, Any]:
        from transformers import AutoTokenizer, CLIPModel, Mask2FormerForUniversalSegmentation

        def load(part: Any, location: str | Path, **options: Any) -> Any:
            return load_pretrained(part, location, self.name, **options)

        clip = load(CLIPModel, self.clip_name_or_path, dtype=self.dtype)
        tokenizer = load(AutoTokenizer, self.clip_name_or_path, probe="tokenizer_config.json")
        return {
            "detector": load(Mask2FormerForUniversalSegmentation, self.model_name_or_path, dtype=self.dtype),
            "colors": ColorClassifier(clip, tokenizer),
        }

    def complete(self, columns: dict[str, list]) -> dict[str, list]:
        if "metadata" in columns or not {"tag", "include"} <= columns.keys():
            return columns
        parts = {name: columns[name] for name in ("tag", "include", "exclude") if name in columns}
        rows = zip(*parts.values(), strict=True)
        return {**columns, "metadata": [dict(zip(parts, row, strict=True)) for row in rows]}

    def score(
        self, images: torch.Tensor, prompts: list[str], *, metadata: list[str | Mapping[str, Any]]
    ) -> list[float]:
        demands = [parse_metadata(line) for line in metadata]
        found = detect(self.models["detector"], images, min_score=SCORE_THRESHOLD, shortest_edge=self.shortest_edge)
        objects = [keep_objects(detections, line["tag"]) for detections, line in zip(found, demands, strict=True)]
        self._name_colors(images, objects, demands)
        return [self._judge(*pair) for pair in zip(objects, demands, strict=True)]

    def _name_colors(self, images: torch.Tensor, objects: list[dict], demands: list[dict[str, Any]]) -> None:
        wanted = [
            (image, detection)
            for image, found, line in zip(to_uint8(images), objects, demands, strict=True)
            for detection in objects_to_color(found, line)
        ]
        if not wanted:
            return
        crops = [crop(image, detection) for image, detection in wanted]
        detections = [detection for _, detection in wanted]
        for detection, color in zip(
            detections, self.models["colors"](crops, [CLASSES[d.label] for d in detections]), strict=True
        ):
            detection.color = color

    def _judge(self, objects: dict[str, list[Detection]], demand: dict[str, Any]) -> float:
        if self.strict:
            return float(is_correct(objects, demand))
        return partial_score(objects, demand, position_quirk=self.position_quirk)[0]
