# SPDX-License-Identifier: Apache-2.0
"""What happens between the rounds: averaging weights, drawing image grids and curves."""

import importlib
import itertools
import re
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from accelerate import Accelerator
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import CallbackHandler

from ..data.rounds import TaskBatch
from ..evaluation.grids import GridSampler
from ..lora.ema import StudentEMA
from ..models.sampler import Policy
from ..publishing.record import GalleryImage, Outcome
from ..utils.figures import draw_curves, enlarge, image_grid, to_pil


_GALLERY_IMAGES = 2  # of each task in the gallery of the model card
# Backends with one interface: `backend.log({name: backend.Image(image)})`.
_IMAGE_LOGGERS = ("wandb", "trackio", "swanlab")


class EMACallback(TrainerCallback):
    """
    Updates the moving average after every optimizer step.

    Args:
        ema ([`StudentEMA`]):
            The average.
    """

    def __init__(self, ema: StudentEMA):
        self.ema = ema

    def on_step_end(self, args, state, control, **kwargs):
        self.ema.update(state.global_step)


class FiniteGradientCallback(TrainerCallback):
    """
    Stops before a gradient that is NaN or infinite reaches the weights. (With fp16 the gradient scaler skips such
    steps, and lowers its scale, by design.)

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Which may have a gradient scaler.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        if self.accelerator.scaler is None and not torch.isfinite(norm):
            raise FloatingPointError(
                f"The gradient of round {state.global_step} has the norm {norm.item()}. Nothing was updated and the last "
                "checkpoint is intact. Lower `learning_rate`, or train in fp32."
            )


class StopwatchCallback(TrainerCallback):
    """
    Measures the time spent in training, evaluations included, on top of that of the parts before a resumption.

    Args:
        outcome ([`Outcome`]):
            Where the time goes.
    """

    def __init__(self, outcome: Outcome):
        self.outcome = outcome

    def on_train_begin(self, args, state, control, **kwargs):
        self._last = time.perf_counter()
        # What was scored were weights that are about to change.
        self.outcome.results = {}

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        self.outcome.seconds += now - self._last
        self._last = now

    on_train_end = on_step_end


class ImageGridCallback(TrainerCallback):
    """
    Draws the same prompts with the same noise at every evaluation and after the last step: a row per prompt, a
    column per model (base, student, each teacher). Saves it to `images/` in the output folder and shows it. A few of
    the student's images are saved singly too, for the gallery of the model card.

    Args:
        grid ([`GridSampler`]):
            Draws them.
        policies (`Callable[[], list[Policy]]`):
            The models, the student second.
        student_weights (`Callable[[bool], ContextManager]`):
            Puts the student's averaged weights in its place.
        outcome ([`Outcome`]):
            Where the files are noted.
        show (`Callable[[str, PIL.Image.Image, int], None]`):
            Sends an image of this name to the loggers.
    """

    def __init__(
        self,
        grid: GridSampler,
        policies: Callable[[], list[Policy]],
        student_weights: Callable[[bool], AbstractContextManager],
        outcome: Outcome,
        show: Callable[[str, PIL.Image.Image, int], None],
    ):
        self.grid, self.policies, self.student_weights = grid, policies, student_weights
        self.outcome, self.show = outcome, show
        self._drawn_at: int | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self._drawn_at = None

    def on_evaluate(self, args, state, control, **kwargs):
        self._draw_once(args, state)

    def on_step_end(self, args, state, control, **kwargs):
        # Not in `on_train_end`, where the loggers have closed their files already.
        if control.should_training_stop:
            self._draw_once(args, state)

    def _draw_once(self, args: TrainingArguments, state: TrainerState) -> None:
        step = state.global_step
        if step == self._drawn_at or not state.is_world_process_zero:
            return
        self._drawn_at = step
        batches, policies = self.grid.batches(), self.policies()
        student = policies[1]
        with self.student_weights(True):
            columns = self.grid.sample(policies, student, batches)
        rows = [f"{batch.task}: {prompt}" for batch in batches for prompt in batch.prompts]
        image, folder = image_grid(columns, rows), Path(args.output_dir)
        self.outcome.grid = f"images/step_{step:06d}.png"
        (folder / self.outcome.grid).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / self.outcome.grid)
        self.outcome.gallery = save_gallery(batches, columns[student.name], folder, step)
        self.show("images", image, step)


class CurvesCallback(TrainerCallback):
    """
    Draws loss, divergences and rewards to `curves.png` at every evaluation and at the end of training.

    Args:
        outcome ([`Outcome`]):
            Where the file is noted.
    """

    def __init__(self, outcome: Outcome):
        self.outcome = outcome

    def on_evaluate(self, args, state, control, **kwargs):
        if state.is_world_process_zero and draw_curves(state.log_history, Path(args.output_dir) / "curves.png"):
            self.outcome.curves = "curves.png"

    on_train_end = on_evaluate


def save_gallery(batches: list[TaskBatch], images: list[torch.Tensor], folder: Path, step: int) -> list[GalleryImage]:
    """Saves the first images of each task as `images/<task>_<index>.png`, tiny ones enlarged."""
    samples = [(b.task, *sample) for b in batches for sample in zip(b.prompts, b.seeds, strict=True)]
    gallery: list[GalleryImage] = []
    for (task, prompt, seed), image in zip(samples, images, strict=True):
        if sum(other.task == task for other in gallery) < _GALLERY_IMAGES:
            taken = [other.file for other in gallery]  # maybe by a task that differs in other characters only
            names = (f"images/{re.sub(r'[^a-zA-Z0-9_-]+', '_', task)}_{index}.png" for index in itertools.count())
            file = next(name for name in names if name not in taken)
            enlarge(to_pil(image)).save(folder / file)
            gallery.append(GalleryImage(prompt, file, task, seed, step))
    return gallery


def report_image(
    callbacks: CallbackHandler, report_to: list[str], name: str, image: PIL.Image.Image, step: int
) -> None:
    """Sends an image to those `report_to` backends that take images."""
    for callback in callbacks.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            callback.tb_writer.add_image(name, np.asarray(image), step, dataformats="HWC")
    for backend in _IMAGE_LOGGERS:
        if backend in report_to:
            module = importlib.import_module(backend)
            module.log({name: module.Image(image), "train/global_step": step})
