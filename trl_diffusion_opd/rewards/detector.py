# SPDX-License-Identifier: Apache-2.0
"""
Objects in images by Mask2Former, by the rule for instances of mmdet, which GenEval is defined with.

`post_process_instance_segmentation` of transformers is another rule: masks of 384 x 384 pixels, no boxes.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .geneval_rules import CLASSES, Detection
from .preprocessing import normalize


# The file on the Hub says 384 x 384, but GenEval detects at these sizes.
SHORTEST_EDGE = 800
LONGEST_EDGE = 1333
SIZE_DIVISOR = 32
MAX_DETECTIONS = 100
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def detector_size(height: int, width: int, shortest_edge: int = SHORTEST_EDGE) -> tuple[int, int]:
    """Height and width at which objects are detected: as large as `shortest_edge` and `LONGEST_EDGE` allow."""
    scale = min(shortest_edge / min(height, width), LONGEST_EDGE / max(height, width))
    return int(height * scale + 0.5), int(width * scale + 0.5)


def detector_pixels(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """
    The input of the detector: resized (bilinear, from bytes to bytes), normalized, and padded to multiples of 32.

    Args:
        images (`torch.Tensor`):
            `[B, 3, H, W]` in `[0, 1]`.
        size (`tuple[int, int]`):
            Height and width before padding, from [`detector_size`].
    """
    images = (images * 255).round().clamp(0, 255)
    images = F.interpolate(images, size, mode="bilinear", antialias=True).round() / 255
    return F.pad(
        normalize(images, IMAGENET_MEAN, IMAGENET_STD), (0, -size[1] % SIZE_DIVISOR, 0, -size[0] % SIZE_DIVISOR)
    )


def find_instances(
    class_logits: torch.Tensor,
    mask_logits: torch.Tensor,
    *,
    padded: tuple[int, int],
    resized: tuple[int, int],
    original: tuple[int, int],
    min_score: float,
) -> list[Detection]:
    """
    Instances of one image: the 100 likeliest pairs of query and class, scored by the probability of the class times
    the mean probability of the mask's pixels.

    Args:
        class_logits (`torch.Tensor`):
            `[Q, C + 1]`, the last for no object.
        mask_logits (`torch.Tensor`):
            `[Q, h, w]`.
        padded, resized, original (`tuple[int, int]`):
            Height and width of the detector's input, of that without padding, and of the image.
        min_score (`float`):
            Instances up to this score are left out.

    Returns:
        `list[Detection]`: most confident first.
    """
    probabilities = class_logits.float().softmax(-1)[:, :-1]
    num_classes = probabilities.shape[1]
    scores, indices = probabilities.flatten().topk(min(MAX_DETECTIONS, probabilities.numel()))
    # The mean over the mask is at most 1, so the others cannot come above `min_score`: no masks for them.
    indices, scores = indices[scores > min_score], scores[scores > min_score]
    if not len(indices):
        return []
    logits = mask_logits.float()[indices // num_classes][None]
    logits = F.interpolate(logits, padded, mode="bilinear")[..., : resized[0], : resized[1]]
    logits = F.interpolate(logits, original, mode="bilinear")[0]
    masks = logits > 0
    areas = masks.sum((1, 2))
    scores = scores * (logits.sigmoid() * masks).sum((1, 2)) / (areas + 1e-6)
    detections = []
    for i in scores.argsort(descending=True).tolist():
        if areas[i] and scores[i] > min_score:
            rows, columns = masks[i].any(1).nonzero(), masks[i].any(0).nonzero()
            left, top, right, bottom = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
            box = tuple(float(edge) for edge in (left, top, right, bottom))
            detections.append(Detection(int(indices[i]) % num_classes, float(scores[i]), box, masks[i].cpu().numpy()))
    return detections


def detect(
    model: nn.Module, images: torch.Tensor, *, min_score: float, shortest_edge: int = SHORTEST_EDGE
) -> list[list[Detection]]:
    """
    Objects in each of a batch of images.

    Args:
        model ([`~transformers.Mask2FormerForUniversalSegmentation`]):
            Trained on the instances of COCO, classes in the order of COCO.
        images (`torch.Tensor`):
            `[B, 3, H, W]` in `[0, 1]`.
        min_score (`float`):
            Instances up to this score are left out.
        shortest_edge (`int`, *optional*, defaults to 800):
            Size of the shorter edge at which objects are detected.
    """
    if model.config.num_labels != len(CLASSES):
        raise ValueError(
            f"GenEval's detector must know the {len(CLASSES)} classes of COCO, but has {model.config.num_labels}. Use a "
            "Mask2Former that was trained on the instances of COCO."
        )
    original = tuple(images.shape[-2:])
    resized = detector_size(*original, shortest_edge)
    pixels = detector_pixels(images.to(model.device), resized)
    output = model(pixel_values=pixels.to(model.dtype))
    return [
        find_instances(
            class_logits,
            mask_logits,
            padded=tuple(pixels.shape[-2:]),
            resized=resized,
            original=original,
            min_score=min_score,
        )
        for class_logits, mask_logits in zip(output.class_queries_logits, output.masks_queries_logits, strict=True)
    ]
