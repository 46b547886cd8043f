# SPDX-License-Identifier: Apache-2.0
"""What every reward shares: loading and freeing its models, batches, and failed scores."""

import logging
import math
import threading
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn


logger = logging.getLogger(__name__)


def default_device() -> torch.device:
    """The current accelerator with its index, which stays the same in threads, or the CPU."""
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.device(torch.accelerator.current_accelerator().type, torch.accelerator.current_device_index())


class Reward:
    """
    A reward: `reward(images, prompts, **columns)` gives one float per image, `nan` where scoring failed.

    It is cheap to build. Its models are loaded at the first score or by [`~rewards.base.Reward.load`], and leave
    memory by [`~rewards.base.Reward.free`]. Calls from several threads wait for each other.

    A subclass sets `name` and writes two methods: `load_models`, which returns the models by name, and `score`, which
    scores one batch with them (`self.models[name]`) and calls `self.failed` for an image that cannot be scored.

    Args:
        device (`torch.device` or `str`, *optional*):
            Where the models run; by default the current accelerator, or the CPU.
        dtype (`torch.dtype` or `str`, *optional*, defaults to `torch.float32`):
            Precision of the models.
        batch_size (`int`, *optional*):
            Images scored at once; by default the class attribute.

    Attributes:
        name (`str`):
            Name in tables and logs; also `__name__`, as functions have it.
        table_factor (`float`):
            What a score is multiplied by to get the number of published tables.
        requires (`tuple[str, ...]`):
            Packages of the extra `rewards` that it needs.
        columns_needed (`tuple[str, ...]`):
            Columns of the dataset that `score` gets beside images and prompts.
        num_scored, num_failed (`int`):
            Images scored and images for which scoring failed, since it was built.
        parts (`list`):
            What the scores of the last call were made of, one entry per image and `None` where scoring failed, if
            `score` adds it there; else empty.
    """

    name: str
    table_factor: float = 1.0
    requires: tuple[str, ...] = ()
    columns_needed: tuple[str, ...] = ()
    batch_size: int = 16

    def __init__(
        self,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        batch_size: int | None = None,
    ):
        if missing := [package for package in self.requires if find_spec(package) is None]:
            raise ImportError(
                f"The reward `{self.name}` needs {' and '.join(map(repr, missing))}, which cannot be imported. Install "
                'it with `pip install "trl-diffusion-opd[rewards]"`.'
            )
        self.device = default_device() if device is None else torch.device(device)
        self.dtype = _dtype(dtype) or torch.float32
        self.batch_size = self.batch_size if batch_size is None else batch_size
        if self.batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, but is {batch_size}.")
        self.models: dict[str, Any] = {}
        self.num_scored = self.num_failed = 0
        self.parts: list[Any] = []
        self._reasons: set[str] = set()
        self._lock = threading.RLock()

    @property
    def __name__(self) -> str:
        return self.name

    def load_models(self) -> dict[str, Any]:
        """Builds what scoring needs, by name: modules are moved to `device` and `dtype`, and frozen."""
        return {}

    def score(self, images: torch.Tensor, prompts: list[str], **columns: list) -> list[float]:
        """
        Scores one batch. It runs without gradients and without autocast.

        Args:
            images (`torch.Tensor`):
                `[B, 3, H, W]`, float32 in `[0, 1]`, on any device.
            prompts (`list[str]`):
                B texts.
            columns:
                The columns named in `columns_needed`, as lists of B.

        Returns:
            `list[float]`: B scores; `self.failed(reason)` in the place of one that failed.
        """
        raise NotImplementedError

    def complete(self, columns: dict[str, list]) -> dict[str, list]:
        """Adds to a dataset's columns what follows from them; a subclass may override it."""
        return columns

    def missing_columns(self, names: Iterable[str]) -> list[str]:
        """What is needed and does not follow from columns of these names."""
        columns = self.complete({name: [] for name in names})
        return [name for name in self.columns_needed if name not in columns]

    def failed(self, reason: str, detail: object = "") -> float:
        """Returns `nan`, the score of an image that could not be scored, and logs each `reason` once."""
        if reason not in self._reasons:
            self._reasons.add(reason)
            logger.warning(
                f"The reward `{self.name}` has no score for an image: {reason}{f' ({detail})' if detail else ''}. It is "
                "counted as failed; more of this kind are not logged."
            )
        return math.nan

    def __call__(self, images: torch.Tensor, prompts: list[str], **columns: list) -> list[float]:
        """
        Scores images.

        Args:
            images (`torch.Tensor`):
                `[B, 3, H, W]`, floating, in `[0, 1]`, on any device.
            prompts (`list[str]`):
                B texts.
            columns:
                Other columns of the dataset, as lists of B. Those not in `columns_needed` are ignored.

        Returns:
            `list[float]`: B scores, `nan` where scoring failed.
        """
        columns = self._check(images, prompts, columns)
        with self._lock, torch.no_grad():
            self.load()
            scores = []
            self.parts = []
            for start in range(0, len(prompts), self.batch_size):
                part = slice(start, start + self.batch_size)
                pixels = images[part].float()
                # A trainer's autocast would change the scores.
                with torch.autocast(self.device.type, enabled=False):
                    batch = self.score(
                        pixels, prompts[part], **{name: values[part] for name, values in columns.items()}
                    )
                # As bytes, which most rewards look at, what is not finite is black and would be scored so.
                for score, whole in zip(batch, pixels.isfinite().flatten(1).all(1).tolist(), strict=True):
                    scores.append(self._checked(score) if whole else self.failed("its pixels are not finite"))
            self._count(scores)
        return scores

    def _check(self, images: torch.Tensor, prompts: list[str], columns: dict[str, list]) -> dict[str, list]:
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                f"`images` of the reward `{self.name}` must be a floating tensor `[B, 3, H, W]` in `[0, 1]`, but is "
                f"{images.dtype} of shape {tuple(images.shape)}."
            )
        columns = self.complete(columns)
        if missing := [name for name in self.columns_needed if columns.get(name) is None]:
            raise ValueError(
                f"The reward `{self.name}` needs the dataset's columns {', '.join(map(repr, self.columns_needed))}, "
                f"but there is no {' and no '.join(map(repr, missing))}."
            )
        columns = {name: columns[name] for name in self.columns_needed}
        lengths = {"images": len(images), "prompts": len(prompts)} | {k: len(v) for k, v in columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"The reward `{self.name}` needs lists of one length, but got {lengths}.")
        return columns

    def _checked(self, score: float) -> float:
        score = float(score)
        # `failed` gives `math.nan` itself, which a model's own nan is not.
        if math.isfinite(score) or score is math.nan:
            return score
        return self.failed("the model gave a value that is not finite", score)

    def _count(self, scores: list[float]) -> None:
        failed = sum(map(math.isnan, scores))
        self.num_failed += failed
        self.num_scored += len(scores) - failed

    def load(self) -> "Reward":
        """Loads the models now, so that the first score does not wait for them."""
        with self._lock:
            if not self.models:
                self.models = self.load_models()
                self._place()
        return self

    def free(self) -> "Reward":
        """Takes the models out of memory; the next score loads them again."""
        with self._lock:
            self.models = {}
            if torch.accelerator.is_available():
                torch.accelerator.empty_cache()
        return self

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | str | None = None) -> "Reward":
        """Moves the models, now or when they are loaded. For another precision they are loaded anew, not rounded twice."""
        with self._lock:
            self.device = self.device if device is None else torch.device(device)
            if dtype is not None and _dtype(dtype) != self.dtype:
                self.dtype = _dtype(dtype)
                self.free()
            self._place()
        return self

    def _place(self) -> None:
        for model in self.models.values():
            if isinstance(model, nn.Module):
                model.to(self.device, self.dtype).eval().requires_grad_(False)


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype
