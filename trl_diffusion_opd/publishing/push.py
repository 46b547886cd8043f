# SPDX-License-Identifier: Apache-2.0
"""Push the folder of a run to the Hub."""

import json
import logging
from pathlib import Path

from ..hub.locations import DIFFUSERS_WEIGHT_NAME
from ..hub.upload import create_repo, push_files
from ..utils.serialization import dump_json, without_paths
from .record import RECORD_FILE


logger = logging.getLogger(__name__)
# Must not end in `pytorch_lora_weights.safetensors`: `load_lora_weights(repo)` takes any file that does.
RAW_WEIGHT_NAME = "pytorch_lora_weights_raw.safetensors"
TRAINING_ARGS_FILE = "training_args.json"
# All that is uploaded of a run, so that no pickle, no base weights and nothing that lies there by chance is.
_PUSHED = (
    DIFFUSERS_WEIGHT_NAME,
    RAW_WEIGHT_NAME,
    "README.md",
    RECORD_FILE,
    "provenance.json",
    "results.json",
    TRAINING_ARGS_FILE,
    "trainer_state.json",
    "curves.png",
    "images/*.png",
)


def read_run(folder: str | Path) -> dict[str, bytes]:
    """
    Reads what is uploaded of a run's folder or checkpoint, so that what happens to the folder afterwards does not
    matter.

    Args:
        folder (`str` or `Path`):
            The `output_dir` of a run or a checkpoint.

    Returns:
        `dict[str, bytes]`: contents by path in the repository. JSON files without the paths of this machine.
    """
    folder = Path(folder)
    files = {}
    for path in sorted(path for pattern in _PUSHED for path in folder.glob(pattern)):
        content = path.read_bytes()
        if path.suffix == ".json" and path.name != RECORD_FILE:  # no paths in it, but prompts that may look like one
            try:
                content = dump_json(without_paths(json.loads(content))).encode()
            except ValueError as error:
                raise ValueError(
                    f"{str(path)!r} is damaged: it holds no JSON ({error}). Take it from a checkpoint of the run, or "
                    "remove it: nothing is rendered from it."
                ) from error
        files[path.relative_to(folder).as_posix()] = content
    return files


def push_folder(
    folder: str | Path,
    repo_id: str | None = None,
    *,
    token: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    commit_message: str = "Upload the LoRA",
    evaluation: str | Path | None = None,
    base_model: str | None = None,
) -> str:
    """
    Pushes the folder of a run, finished or not, with its model card.

    Args:
        folder (`str` or `Path`):
            The `output_dir` of a run, or a checkpoint.
        repo_id (`str`, *optional*):
            Where to. By default where the run was going to push.
        token (`str`, *optional*):
            Token to use instead of the one of `hf auth login` or `HF_TOKEN`.
        revision (`str`, *optional*):
            Branch, created if needed. By default the one that the run was going to push to.
        private (`bool`, *optional*):
            Whether a new repository is private.
        commit_message (`str`, *optional*, defaults to `"Upload the LoRA"`):
            Title of the commit.
        evaluation (`str` or `Path`, *optional*):
            Results of `trl-diffusion-opd eval` whose scores of this LoRA go on the card, and into its `run.json`.
        base_model (`str`, *optional*):
            The base on the Hub, `owner/name[@revision]`, for the card of a run that was made with a local folder.

    Returns:
        `str`: address of the commit.

    Raises:
        `ValueError`: the folder holds no LoRA that can be read, or a file that is damaged, or nothing says where to push.
        `PushError`: it could not be pushed.
    """
    from ..lora.adapters import has_no_effect
    from ..lora.files import read_lora
    from .card import render_card
    from .record import RunRecord

    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"There is no folder {str(folder)!r}. Pass the `output_dir` of a run.")
    lora = read_lora(folder, weight_name=DIFFUSERS_WEIGHT_NAME, owner="push")
    record = RunRecord.load(folder)
    if evaluation is not None:
        from .benchmarks import benchmark_scores

        guidance_scale = record.guidance_scale
        record.benchmarks, record.benchmark_settings = benchmark_scores(evaluation, lora, guidance_scale)
    if changes_nothing := has_no_effect(lora.state_dict):
        logger.warning(
            f"The LoRA in {str(folder)!r} has no effect: all its weights are zero. It is pushed all the same, and its "
            "card says so. A longer run, or one without a moving average (`ema_decay`), would have learned something."
        )
    is_news = record.rounds > 0 and changes_nothing != record.has_no_effect
    record.has_no_effect = record.rounds > 0 and changes_nothing
    if base_model is not None:
        record.set_base(base_model, token)
    record.drop_missing(folder)
    repo_id = repo_id or record.repo_id
    if repo_id is None:
        raise ValueError(f"Nothing in {str(folder)!r} says where to push. Pass `--repo_id owner/name`.")
    revision = revision or record.revision
    files = read_run(folder)
    repo_id = create_repo(repo_id, token=token, private=private)
    is_elsewhere = (repo_id, revision) != (record.repo_id, record.revision)
    if is_news or evaluation is not None or base_model is not None or is_elsewhere or "README.md" not in files:
        record.repo_id, record.revision, record.name = repo_id, revision, repo_id.split("/")[-1]
        record.save(folder)
        render_card(record).save(folder / "README.md")
        files = read_run(folder)
    return push_files(files, repo_id, commit_message, token=token, revision=revision).commit_url
