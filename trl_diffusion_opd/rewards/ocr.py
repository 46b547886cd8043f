# SPDX-License-Identifier: Apache-2.0
"""OCR: whether the text that the prompt has in quotes can be read in the image."""

import functools
import threading
from typing import Any

import numpy as np
import torch

from .base import Reward
from .preprocessing import to_uint8


# RapidOCR keeps state between its steps, so that one call at a time may use it.
_LOCK = threading.Lock()


@functools.cache
def _engine(num_threads: int) -> Any:
    """The engine of this process; it is shared, as it takes a second to start."""
    from rapidocr import RapidOCR

    return RapidOCR(
        params={
            "Global.log_level": "critical",  # it warns of every image without text
            "Global.use_cls": False,  # as the paper's engine is set: no search for text that stands on its head
            "EngineConfig.onnxruntime.intra_op_num_threads": num_threads,
        }
    )


def quoted(prompt: str) -> str:
    """The text between the first two double quotes, or `""`."""
    parts = prompt.split('"')
    return parts[1] if len(parts) > 2 else ""


def similarity(recognized: str, target: str) -> float:
    """
    1 if `recognized` holds `target`, else 1 minus their edit distance by the length of `target`, at least 0. Spaces
    and case do not count. `target` must not be empty.
    """
    from rapidfuzz.distance import Levenshtein

    recognized, target = (text.replace(" ", "").lower() for text in (recognized, target))
    if target in recognized:
        return 1.0
    return 1 - min(Levenshtein.distance(recognized, target), len(target)) / len(target)


class OCRReward(Reward):
    """
    How much of the text in the prompt's double quotes is in the image, 0 to 1, read by RapidOCR (PP-OCRv6, on the CPU,
    with the models that its package brings). The paper used PaddleOCR (PP-OCRv4): numbers differ a little.

    A prompt without text in quotes fails.

    Args:
        num_threads (`int`, *optional*):
            Threads of the recognition; by default as many as torch uses, which follows `OMP_NUM_THREADS`.
        kwargs:
            `batch_size` of [`~rewards.base.Reward`]; `device` and `dtype` have no meaning here.
    """

    name = "ocr"
    requires = ("rapidocr", "onnxruntime", "rapidfuzz")

    def __init__(self, *, num_threads: int | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        self.num_threads = num_threads or torch.get_num_threads()

    def load_models(self) -> dict[str, Any]:
        return {"engine": _engine(self.num_threads)}

    def free(self) -> "OCRReward":
        _engine.cache_clear()
        return super().free()

    def score(self, images: torch.Tensor, prompts: list[str]) -> list[float]:
        return [self._score_one(*pair) for pair in zip(to_uint8(images), prompts, strict=True)]

    def _score_one(self, image: np.ndarray, prompt: str) -> float:
        target = quoted(prompt)
        if not target.strip():
            return self.failed("the prompt has no text in double quotes", repr(prompt))
        try:
            with _LOCK:
                lines = self.models["engine"](np.ascontiguousarray(image[..., ::-1])).txts  # it wants BGR
        except Exception as error:
            return self.failed(f"RapidOCR failed with {type(error).__name__}", error)
        return similarity("".join(lines or ()), target)
