# SPDX-License-Identifier: Apache-2.0
"""What `transformers.Trainer` does differently when it pushes to the Hub: listed files alone, and it tries again."""

import logging
import shlex
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import run_as_future
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from ..hub.upload import PushError, create_repo, push_files
from ..publishing.push import read_run


if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

logger = logging.getLogger(__name__)


class PushMixin:
    """The part of [`LoraTrainer`] that pushes. Its overrides of upstream are pinned with those of the rest."""

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        # Upstream does not ask whether the token may write, and passes the client's errors on.
        if self.is_world_process_zero():
            self.hub_model_id = create_repo(
                self.args.hub_model_id or Path(self.args.output_dir).absolute().name,
                token=token if token is not None else self.args.hub_token,
                private=private if private is not None else self.args.hub_private_repo,
            )
            self.push_in_progress = None

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
