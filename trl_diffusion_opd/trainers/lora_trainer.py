# SPDX-License-Identifier: Apache-2.0
"""
What `transformers.Trainer` and TRL's `_BaseTrainer` do differently for a LoRA on a diffusers model.

All overrides of upstream internals are here and, for pushing, in `pushing.py`;
`tests/unit/trainers/test_lora_trainer.py` fails when what they rely on changes.
"""

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from peft import LoraConfig
from torch.utils.data import DataLoader, Dataset
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, rotate_checkpoints
from trl.trainer.base_trainer import _BaseTrainer

from ..hub.locations import DIFFUSERS_WEIGHT_NAME
from ..lora.adapters import has_no_effect, load_lora_into, lora_state_dict, save_lora
from ..publishing.card import render_card
from ..publishing.push import RAW_WEIGHT_NAME, TRAINING_ARGS_FILE
from ..utils.files import replace_folder, sync, written_whole
from ..utils.serialization import without_paths, write_json
from .checkpoints import (
    CHECKPOINT_STAGING_FOLDER,
    PROVENANCE_FILE,
    SOURCES_KEY,
    ResumeError,
    begin_run,
    check_average,
    check_files,
    check_student,
    clean_up,
    find_checkpoint,
    read_json,
    read_step,
    write_run_id,
)
from .disk import SaveError, save_elsewhere
from .pushing import PushMixin
from .run_lock import holding
from .trajectory import TRAJECTORY_KEY, check_changes, check_trajectory, describe_trajectory
from .watchdog import watching_others


logger = logging.getLogger(__name__)


class _RoundIndices(Dataset):
    """The dataset that the training loop walks through: micro-round numbers. The samples are found from them."""

    def __init__(self, num_micro_rounds: int):
        self.num_micro_rounds = num_micro_rounds

    def __len__(self) -> int:
        return self.num_micro_rounds

    def __getitem__(self, index: int) -> dict[str, int]:
        return {"micro_round": index}


def _only_item(batch: list[dict[str, int]]) -> dict[str, int]:
    return batch[0]


class LoraTrainer(PushMixin, _BaseTrainer):
    """
    A [`~transformers.Trainer`] whose model is a LoRA adapter called `"default"` on a diffusers transformer.

    Subclasses set `transformer` (the module with the adapter), `ema` (a [`StudentEMA`] or `None`), `provenance` (a
    JSON-like dictionary of what the run was made from, which a resumed run must share) and `sources` (what of it can be
    told before anything is loaded), call `check_start` before they load anything large, and define `make_record`, the
    [`RunRecord`] that the model card is rendered from.
    """

    loss_is_scaled_for_ga = True  # the training step divides by the number of accumulation steps itself
    run_id = ""  # of the run that is being trained
    resumed_at_end = False  # whether the last call of `train` had nothing left to train

    def __init__(self, model, args, *, num_micro_rounds: int, **kwargs):
        self._staging_dir = None
        super().__init__(model=model, args=args, train_dataset=_RoundIndices(num_micro_rounds), **kwargs)

    def _send_telemetry(self) -> None:
        # TRL reads `model.config.model_type`, which no diffusers model has, and does so unless `CI` is set. We send
        # nothing.
        pass

    def get_train_dataloader(self) -> DataLoader:
        # Every process walks through all rounds and takes its share of each, so there is nothing to shuffle or shard.
        return DataLoader(self.train_dataset, batch_size=1, collate_fn=_only_item)

    # The run

    def check_start(self, args: Any, datasets: Mapping[str, Any], lora: LoraConfig) -> None:
        """
        Checks what can be checked of the run's folder, and of the checkpoint that `args.resume_from_checkpoint` names, as
        long as nothing is loaded. Notes what defines the course of the run.

        Args:
            args ([`DiffusionConfig`]):
                Settings of the run.
            datasets (`Mapping[str, Dataset | StreamedPrompts]`):
                Prompts of each task.
            lora ([`~peft.LoraConfig`]):
                The student's LoRA.

        Raises:
            `OSError`: another run writes there.
            `ResumeError`: the run cannot be resumed from the checkpoint.
        """
        self.trajectory = describe_trajectory(datasets, args)
        self.first_checkpoint, self.first_step = None, 0
        if args.resume_from_checkpoint is None:
            return
        if args.process_index == 0:
            with holding(args.output_dir):
                clean_up(Path(args.output_dir))
        PartialState().wait_for_everyone()
        self.first_checkpoint = checkpoint = find_checkpoint(args.resume_from_checkpoint, args.output_dir)
        if checkpoint is not None:
            check_files(checkpoint)
            check_student(checkpoint, lora, args.ema_decay)
            check_trajectory(checkpoint, self.trajectory, args.allow_changes)
            self.first_step = read_step(checkpoint)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """
        Trains, as [`~transformers.Trainer.train`] does.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                A checkpoint, or `True` for the last one of the run in `output_dir`, or for a new run if that has none.
                From the checkpoint of the last step there is nothing left to train: the run is as at its end.
            *args, **kwargs:
                Further arguments of [`~transformers.Trainer.train`].
        """
        # Upstream resumes from the highest number in the folder, whoever saved it, and does not keep others out.
        main = self.is_world_process_zero()
        with holding(self.args.output_dir) if main else nullcontext():
            begun = [begin_run(self.args.output_dir, resume_from_checkpoint) if main else None]
            [(checkpoint, self.run_id)] = broadcast_object_list(begun)
            self.resumed_at_end = checkpoint is not None and read_step(checkpoint) >= self.planned_steps
            if main and not self.resumed_at_end:
                # Of weights that are about to change
                (Path(self.args.output_dir) / "results.json").unlink(missing_ok=True)
            if self.resumed_at_end:
                logger.warning(f"{checkpoint!r} is of the last step: there is nothing left to train.")
            with watching_others():
                output = super().train(checkpoint, *args, **kwargs)
            if main and self.resumed_at_end:  # maybe the run was killed just before
                self._rotate_checkpoints(self.args.output_dir)
            return output

    @property
    def planned_steps(self) -> int:
        """The number of optimizer steps that a run has."""
        return self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Upstream trains a step of the epoch that it resumes in before it asks whether there is one left.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def end_processes(self) -> None:
        """Ends the communication of the processes. Nothing can be trained afterwards."""
        # The data-parallel wrapper goes first: if it were the last to hold the process group, that would be destroyed with
        # the GIL held, and wait for a thread that needs it, for ever.
        self.model_wrapped = self.model
        self.accelerator.free_memory()
        self.accelerator.end_training()

    def check_end(self) -> None:
        """Raises an error if a run that has ended learned nothing for a reason that must not go unnoticed."""

    # Saving

    @contextmanager
    def _saving(self, what: str) -> Iterator[None]:
        """If what is done in it fails, the LoRA is saved elsewhere, and the error says where."""
        try:
            yield
        except SaveError:
            raise
        except Exception as error:
            if not self.args.should_save:
                raise
            place = save_elsewhere(self.args.output_dir, self._save_loras)
            raise SaveError(f"{what} could not be saved: {error}. {place}") from error

    def _save_loras(self, folder: Path) -> None:
        if self.ema is None:
            save_lora(folder, self.transformer)
        else:
            with self.ema.applied():
                save_lora(folder, self.transformer)
            save_lora(folder, self.transformer, weight_name=RAW_WEIGHT_NAME)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # Upstream writes the whole base model, and pickles the arguments with the Hub token in clear.
        if not self.args.should_save:
            return
        output_dir = Path(output_dir or self.args.output_dir)
        with self._saving(f"The LoRA of {str(output_dir)!r}"):
            with written_whole(output_dir) as folder:
                self._save_loras(folder)
                write_json(folder / TRAINING_ARGS_FILE, self.args.to_dict())
                notes = {SOURCES_KEY: self.sources, TRAJECTORY_KEY: self.trajectory}
                write_json(folder / PROVENANCE_FILE, {**self.provenance, **notes})
                if self.run_id:
                    write_run_id(folder, self.run_id)
                self.make_record().save(folder)
            if self.ema is None:
                (output_dir / RAW_WEIGHT_NAME).unlink(missing_ok=True)  # of an earlier run in this folder
            if output_dir == Path(self.args.output_dir):
                self.create_model_card()
                with self.ema.applied() if self.ema is not None else nullcontext():
                    idle = has_no_effect(lora_state_dict(self.transformer))
                if idle:
                    logger.warning(f"The LoRA in {str(output_dir)!r} has no effect: its updates are all zero.")

    def _get_output_dir(self, trial) -> str:
        return self._staging_dir or super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial) -> None:
        # Upstream writes into `checkpoint-N` file by file, and a kill in between leaves a folder that looks like a
        # checkpoint. Have it write elsewhere and rename the whole.
        run_dir = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with self._saving(f"The checkpoint {str(run_dir / name)!r}"):
            self.create_model_card()
            # Upstream's final push leaves out what starts with "_".
            self._staging_dir = str(run_dir / CHECKPOINT_STAGING_FOLDER)
            try:
                if self.args.should_save:
                    shutil.rmtree(self._staging_dir, ignore_errors=True)
                self.accelerator.wait_for_everyone()
                super()._save_checkpoint(model, trial)
                staged = Path(self._staging_dir) / name
            finally:
                self._staging_dir = None
            self.accelerator.wait_for_everyone()
            if self.state.best_global_step:
                best = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
                if best.name == name or best.is_dir():
                    self.state.best_model_checkpoint = str(best)
            if self.args.should_save:
                self._put_in_place(staged, run_dir / name)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run_dir / name))

    def _put_in_place(self, staged: Path, folder: Path) -> None:
        self.save_method_state(staged)
        self.state.save_to_json(str(staged / "trainer_state.json"))
        for path in [*staged.iterdir(), staged]:
            sync(path)
        replace_folder(staged, folder)
        shutil.rmtree(staged.parent, ignore_errors=True)
        self._rotate_checkpoints(folder.parent)

    def _rotate_checkpoints(self, run_dir: str | Path) -> None:
        rotate_checkpoints(
            output_dir=str(run_dir),
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
            use_mtime=True,
        )

    # Resuming

    def save_method_state(self, folder: Path) -> None:
        """Writes what a method needs to resume, beside the student, into a checkpoint."""

    def load_method_state(self, folder: Path) -> None:
        """Reads what [`save_method_state`] wrote."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        # Upstream knows full models and PEFT's file names only.
        folder = Path(resume_from_checkpoint)
        try:
            check_files(folder)
            self._check_provenance(read_json(folder, PROVENANCE_FILE), folder)
            self._load_student(folder)
            self.load_method_state(folder)
            check_trajectory(folder, self.trajectory, self.args.allow_changes)
        except ValueError as error:
            raise ResumeError(str(error)) from error
        settings, tell = without_paths(self.args.to_dict()), self.is_world_process_zero()
        check_changes(folder, self.trajectory, settings, at_end=self.resumed_at_end, tell=tell)
        self.resume_record(folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # Upstream also loads the learning rate, the weight decay and the like, so that no change of them has an effect.
        settings = [{k: v for k, v in g.items() if k not in ("params", "lr")} for g in self.optimizer.param_groups]
        base_lrs = list(getattr(self.lr_scheduler, "base_lrs", []))
        super()._load_optimizer_and_scheduler(checkpoint)
        for group, new in zip(self.optimizer.param_groups, settings, strict=True):
            if group.get("initial_lr") != new.get("initial_lr"):
                group["lr"] *= new["initial_lr"] / group["initial_lr"]
            group.update(new)
        if base_lrs and base_lrs != self.lr_scheduler.base_lrs:
            self.lr_scheduler.base_lrs = base_lrs
            self.lr_scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def _load_student(self, folder: Path) -> None:
        averaged = check_average(folder, self.args.ema_decay)
        if averaged:
            load_lora_into(self.transformer, folder / DIFFUSERS_WEIGHT_NAME)
            self.ema.load_state_dict({name: p.detach().clone() for name, p in self.ema.parameters.items()})
        load_lora_into(self.transformer, folder / (RAW_WEIGHT_NAME if averaged else DIFFUSERS_WEIGHT_NAME))

    def _load_best_model(self) -> None:
        self._load_student(Path(self.state.best_model_checkpoint))

    def _check_provenance(self, saved: dict, folder: Path) -> None:
        for key, value in self.provenance.items():
            if saved.get(key) != json.loads(json.dumps(value)):
                raise ValueError(
                    f"The checkpoint {str(folder)!r} belongs to a run with other {key}: {value} instead of "
                    f"{saved.get(key)}. Resume with the same {key}, or start a new run in another `output_dir`."
                )

    # The model card

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | list[str] | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        # TRL's card is for language models: it names `transformers` as the library and reads `model.config`.
        if self.is_world_process_zero():
            card = render_card(self.make_record(), model_name=model_name, dataset_name=dataset_name, tags=tags)
            with written_whole(self.args.output_dir) as folder:
                card.save(folder / "README.md")
