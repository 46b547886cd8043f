# SPDX-License-Identifier: Apache-2.0
"""What happens between the rounds: averaging weights, drawing image grids and curves."""

import importlib
import itertools
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image
import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from ..data.rounds import spread
from ..evaluation.score import evaluation_batch
from ..publishing.record import GalleryImage
from ..utils.figures import draw_curves, enlarge, image_grid, to_pil
from ..utils.hardware import on_device


if TYPE_CHECKING:
    from ..data.rounds import TaskBatch
    from .base_trainer import DiffusionTrainer

_GALLERY_IMAGES = 2  # of each task in the gallery of the model card
# Backends with one interface: `backend.log({name: backend.Image(image)})`.
_IMAGE_LOGGERS = ("wandb", "trackio", "swanlab")


class EMACallback(TrainerCallback):
    """Updates the moving average after every optimizer step."""

    def __init__(self, trainer: "DiffusionTrainer"):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.ema.update(state.global_step)


class FiniteGradientCallback(TrainerCallback):
    """
    Stops before a gradient that is NaN or infinite reaches the weights. (With fp16 the gradient scaler skips such
    steps, and lowers its scale, by design.)
    """

    def __init__(self, trainer: "DiffusionTrainer"):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        gradients = [p.grad for p in self.trainer.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.trainer.accelerator.scaler is None and not torch.isfinite(norm):
            raise FloatingPointError(
                f"The gradient of round {state.global_step} has the norm {norm.item()}. Nothing was updated and the last "
                "checkpoint is intact. Lower `learning_rate`, or train in fp32."
            )


class StopwatchCallback(TrainerCallback):
    """Measures the time spent in training, evaluations included, on top of that of the parts before a resumption."""

    def __init__(self, trainer: "DiffusionTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self._last = time.perf_counter()
        # What was scored were weights that are about to change.
        self.trainer.outcome.results = {}

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        self.trainer.outcome.seconds += now - self._last
        self._last = now

    on_train_end = on_step_end


class ImageGridCallback(TrainerCallback):
    """
    Draws the same prompts with the same noise at every evaluation and after the last step: a row per prompt, a
    column per model (base, student, each teacher). Saves it to `images/` in the output folder and reports it to
    TensorBoard, Weights & Biases, Trackio and SwanLab where they are in `report_to`. A few of the student's images
    are saved singly too, for the gallery of the model card.
    """

    def __init__(self, trainer: "DiffusionTrainer"):
        self.trainer = trainer
        self._drawn_at: int | None = None
        self._unchanging: dict[str, list[torch.Tensor]] = {}  # images of all models but the student

    def on_train_begin(self, args, state, control, **kwargs):
        self._drawn_at = None

    def on_evaluate(self, args, state, control, **kwargs):
        self._draw_once(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        # Not in `on_train_end`, where the loggers have closed their files already.
        if control.should_training_stop:
            self._draw_once(state.global_step)

    def _draw_once(self, step: int) -> None:
        if step != self._drawn_at and self.trainer.is_world_process_zero():
            self._drawn_at = step
            batches = self._batches()
            columns = self._draw(batches)
            rows = [f"{batch.task}: {prompt}" for batch in batches for prompt in batch.prompts]
            grid = image_grid(columns, rows)
            outcome, folder = self.trainer.outcome, Path(self.trainer.args.output_dir)
            outcome.grid = f"images/step_{step:06d}.png"
            (folder / outcome.grid).parent.mkdir(parents=True, exist_ok=True)
            grid.save(folder / outcome.grid)
            outcome.gallery = save_gallery(batches, columns[self.trainer.student_policy.name], folder, step)
            report_image(self.trainer, "images", grid, step)

    def _batches(self) -> list["TaskBatch"]:
        trainer, args = self.trainer, self.trainer.args
        batches = []
        for task in trainer.datasets:
            data = trainer.eval_datasets.get(task, trainer.datasets[task])
            positions = spread(data, args.num_grid_prompts)
            for start in range(0, len(positions), args.per_device_eval_batch_size):
                chunk = positions[start : start + args.per_device_eval_batch_size]
                batches.append(
                    evaluation_batch(data, task, chunk, seed=args.seed, column=args.prompt_column, purpose="grid")
                )
        return batches

    def _draw(self, batches: list["TaskBatch"]) -> dict[str, list[torch.Tensor]]:
        """Images of each model, by its name."""
        trainer, args = self.trainer, self.trainer.args
        columns = {}
        trainer.grid_prompts.prepare("grid", lambda: [prompt for batch in batches for prompt in batch.prompts])
        with on_device((trainer.pipeline.vae,), trainer.accelerator.device), trainer.student_weights(average=True):
            policies = trainer.policies()
            for policy in tqdm(policies, desc="Drawing images", disable=args.disable_tqdm, leave=False):
                images = self._unchanging.get(policy.name)
                if images is None:
                    images = [image for batch in batches for image in trainer.sample_images(policy, batch)]
                    if policy.name != trainer.student_policy.name:
                        self._unchanging[policy.name] = images
                columns[policy.name] = images
        return columns


class CurvesCallback(TrainerCallback):
    """Draws loss, divergences and rewards to `curves.png` at every evaluation and at the end of training."""

    def __init__(self, trainer: "DiffusionTrainer"):
        self.trainer = trainer

    def on_evaluate(self, args, state, control, **kwargs):
        if state.is_world_process_zero and draw_curves(state.log_history, Path(args.output_dir) / "curves.png"):
            self.trainer.outcome.curves = "curves.png"

    on_train_end = on_evaluate


def save_gallery(
    batches: list["TaskBatch"], images: list[torch.Tensor], folder: Path, step: int
) -> list[GalleryImage]:
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


def report_image(trainer: "DiffusionTrainer", name: str, image: PIL.Image.Image, step: int) -> None:
    """Sends an image to those `report_to` backends that take images."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            callback.tb_writer.add_image(name, np.asarray(image), step, dataformats="HWC")
    for backend in _IMAGE_LOGGERS:
        if backend in trainer.args.report_to:
            module = importlib.import_module(backend)
            module.log({name: module.Image(image), "train/global_step": step})
