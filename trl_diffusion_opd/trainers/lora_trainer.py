# SPDX-License-Identifier: Apache-2.0
"""
What `transformers.Trainer` and TRL's `_BaseTrainer` do differently for a LoRA on a diffusers model.

All overrides of upstream internals are here; `tests/unit/trainers/test_lora_trainer.py` fails when what they rely on changes.
"""

import json
import logging
import os
import shlex
import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import run_as_future
from torch.utils.data import DataLoader, Dataset
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, rotate_checkpoints
from transformers.utils import PushInProgress
from trl.trainer.base_trainer import _BaseTrainer

from ..hub.locations import DIFFUSERS_WEIGHT_NAME
from ..hub.upload import PushError, create_repo, push_files
from ..lora.adapters import load_lora_into, save_lora
from ..publishing.push import RAW_WEIGHT_NAME, TRAINING_ARGS_FILE, read_run
from ..utils.serialization import write_json


if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

logger = logging.getLogger(__name__)
PROVENANCE_FILE = "provenance.json"


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


class LoraTrainer(_BaseTrainer):
    """
    A [`~transformers.Trainer`] whose model is a LoRA adapter called `"default"` on a diffusers transformer.

    Subclasses set `transformer` (the module with the adapter), `ema` (a [`StudentEMA`] or `None`) and `provenance` (a
    JSON-like dictionary of what the run was made from, which a resumed run must share), and define `make_record`, the
    [`RunRecord`] that the model card is rendered from.
    """

    loss_is_scaled_for_ga = True  # the training step divides by the number of accumulation steps itself

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

    # Saving

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # Upstream writes the whole base model, and pickles the arguments with the Hub token in clear.
        if not self.args.should_save:
            return
        output_dir = Path(output_dir or self.args.output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        if self.ema is None:
            save_lora(output_dir, self.transformer)
            (output_dir / RAW_WEIGHT_NAME).unlink(missing_ok=True)  # of an earlier run in this folder
        else:
            with self.ema.applied():
                save_lora(output_dir, self.transformer)
            save_lora(output_dir, self.transformer, weight_name=RAW_WEIGHT_NAME)
        write_json(output_dir / TRAINING_ARGS_FILE, self.args.to_dict())
        write_json(output_dir / PROVENANCE_FILE, self.provenance)
        self.make_record().save(output_dir)
        if output_dir == Path(self.args.output_dir):
            self.create_model_card()

    def _get_output_dir(self, trial) -> str:
        return self._staging_dir or super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial) -> None:
        # Upstream writes into `checkpoint-N` file by file, and a kill in between leaves a folder that looks like a
        # checkpoint. Have it write elsewhere and rename the whole.
        run_dir = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self.create_model_card()
        self._staging_dir = str(run_dir / "_staging")  # upstream's final push leaves out what starts with "_"
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
            self.save_method_state(staged)
            self.state.save_to_json(str(staged / "trainer_state.json"))
            for path in [*staged.iterdir(), staged]:
                _sync(path)
            shutil.rmtree(run_dir / name, ignore_errors=True)
            os.replace(staged, run_dir / name)
            _sync(run_dir)
            shutil.rmtree(staged.parent, ignore_errors=True)
            rotate_checkpoints(
                output_dir=str(run_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run_dir / name))

    # Resuming

    def save_method_state(self, folder: Path) -> None:
        """Writes what a method needs to resume, beside the student, into a checkpoint."""

    def load_method_state(self, folder: Path) -> None:
        """Reads what [`save_method_state`] wrote."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        # Upstream knows full models and PEFT's file names only.
        folder = Path(resume_from_checkpoint)
        for file in (DIFFUSERS_WEIGHT_NAME, PROVENANCE_FILE, OPTIMIZER_NAME, SCHEDULER_NAME):
            # Upstream starts the optimizer afresh without a word if its file is missing.
            if not (folder / file).is_file():
                raise ValueError(
                    f"There is no checkpoint in {str(folder)!r}: it has no {file!r}. Pass a `checkpoint-N` folder of an "
                    "earlier run's `output_dir`, saved without `save_only_model`."
                )
        self._check_provenance(json.loads((folder / PROVENANCE_FILE).read_text(encoding="utf-8")), folder)
        self._load_student(folder)
        self.load_method_state(folder)
        self.resume_record(folder)

    def _load_student(self, folder: Path) -> None:
        averaged = (folder / RAW_WEIGHT_NAME).is_file()
        if averaged != (self.ema is not None):
            raise ValueError(
                f"The checkpoint {str(folder)!r} was saved {'with' if averaged else 'without'} a moving average, but "
                f"`ema_decay` is {self.args.ema_decay}. Resume with the settings of the saved run."
            )
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
                    f"The checkpoint {str(folder)!r} belongs to a run with other {key}:\n  saved: {saved.get(key)}\n"
                    f"  now:   {value}\nResume with the same {key}, or start a new run in another `output_dir`."
                )

    # The Hub

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        # Upstream does not ask whether the token may write, and passes the client's errors on.
        if self.is_world_process_zero():
            self.hub_model_id = create_repo(
                self.args.hub_model_id or Path(self.args.output_dir).absolute().name,
                token=token if token is not None else self.args.hub_token,
                private=private if private is not None else self.args.hub_private_repo,
            )
            self.push_in_progress = None

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | list[str] | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        # TRL's card is for language models: it names `transformers` as the library and reads `model.config`.
        if self.is_world_process_zero():
            from ..publishing.card import render_card

            card = render_card(self.make_record(), model_name=model_name, dataset_name=dataset_name, tags=tags)
            card.save(Path(self.args.output_dir) / "README.md")

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ) -> "CommitInfo | Future | None":
        # Upstream uploads whatever lies in the folder, and does not try again.
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        self._finish_current_push()
        files = read_run(self.args.output_dir)
        if blocking:
            return self._push(files, commit_message, token, revision)
        return run_as_future(self._push, files, commit_message, token, revision)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Upstream copies only file names that it knows, none of them ours, and pickles the arguments beside them.
        if self._staging_dir is not None:  # called by upstream before the checkpoint is in its place
            return
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        running = self.push_in_progress
        if running is not None and not running.is_done() and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        folder = Path(checkpoint_folder)
        checkpoint = read_run(folder)
        files = {**read_run(self.args.output_dir), **checkpoint}
        files.pop("trainer_state.json")
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            last = self.args.hub_strategy == HubStrategy.CHECKPOINT
            target = "last-checkpoint" if last else folder.name
            files |= {f"{target}/{name}": content for name, content in checkpoint.items()}
        # One background thread of `huggingface_hub` serves all uploads, one after another.
        job = run_as_future(self._push_in_passing, files, f"Training in progress, step {self.state.global_step}")
        jobs = [] if running is None or running.is_done() else running.jobs
        self.push_in_progress = PushInProgress([*jobs, job])

    def _push_in_passing(self, files: dict[str, bytes], message: str) -> None:
        try:
            self._upload(files, message)
        except PushError as error:  # there will be another
            logger.warning(f"{error} Training goes on.")

    def _push(self, files: dict[str, bytes], message: str, token: str | None, revision: str | None) -> "CommitInfo":
        try:
            return self._upload(files, message, token, revision)
        except PushError as error:
            command = ["trl-diffusion-opd", "push", self.args.output_dir, "--repo_id", self.hub_model_id]
            command += ["--revision", revision] if revision else []
            raise PushError(
                f"{error} Nothing is lost: all of it is in {self.args.output_dir!r}. Once that is mended, run "
                f"`{shlex.join(command)}`."
            ) from error

    def _upload(
        self, files: dict[str, bytes], message: str, token: str | None = None, revision: str | None = None
    ) -> "CommitInfo":
        return push_files(
            files,
            self.hub_model_id,
            message,
            token=token if token is not None else self.args.hub_token,
            revision=revision if revision is not None else self.args.hub_revision,
        )


def _sync(path: Path) -> None:
    """Waits until a file or folder is on the disk, so that a rename never survives what it renamed."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
