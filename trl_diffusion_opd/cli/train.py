# SPDX-License-Identifier: Apache-2.0
"""The body of `trl-diffusion-opd opd`, `grpo` and `nft`: from a recipe to a trained student."""

import json
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from ..evaluation.comparison import format_table, save_results, scored_tasks
from ..hub.upload import PushError, check_destination
from ..trainers.base_config import DiffusionConfig
from ..trainers.base_trainer import DiffusionTrainer
from ..trainers.checkpoints import ResumeError
from ..trainers.disk import SaveError
from ..trainers.grpo_config import FlowGRPOConfig
from ..trainers.grpo_trainer import FlowGRPOTrainer
from ..trainers.nft_config import DiffusionNFTConfig
from ..trainers.nft_trainer import DiffusionNFTTrainer
from ..trainers.opd_config import DiffusionOPDConfig
from ..trainers.opd_trainer import DiffusionOPDTrainer
from ..trainers.plan import describe_plan
from ..trainers.rl_trainer import UnscoredError
from ..trainers.run_lock import holding
from ..utils.distributed import use_all_cores
from ..utils.files import written_whole
from .parser import BAD_INPUT, disable_bars, fail, one_line_errors
from .recipe import OPDScriptArguments, RLScriptArguments, ScriptArguments, parse_recipe


@dataclass(frozen=True)
class Method:
    """
    A way to train.

    Args:
        description (`str`):
            What it does.
        arguments (`type`):
            Dataclass of what is trained on what.
        config (`type`):
            Dataclass of the settings of the trainer.
        trainer (`type`):
            The trainer.
    """

    description: str
    arguments: type[ScriptArguments]
    config: type[DiffusionConfig]
    trainer: type[DiffusionTrainer]


# By the name of the command.
METHODS = {
    "opd": Method(
        "Distills several LoRA teachers into one LoRA student, as a recipe says.",
        OPDScriptArguments,
        DiffusionOPDConfig,
        DiffusionOPDTrainer,
    ),
    "grpo": Method(
        "Trains a LoRA from rewards by GRPO-Guard or Flow-GRPO, as a recipe says.",
        RLScriptArguments,
        FlowGRPOConfig,
        FlowGRPOTrainer,
    ),
    "nft": Method(
        "Trains a LoRA from rewards by DiffusionNFT, as a recipe says.",
        RLScriptArguments,
        DiffusionNFTConfig,
        DiffusionNFTTrainer,
    ),
}


def train(trainer: DiffusionTrainer, script_args: ScriptArguments) -> None:
    """Trains the student and shows what came of it."""
    training_args, main = trainer.args, trainer.is_world_process_zero()
    resume = training_args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=resume)
    # "Internal", or upstream would push here too, before there are results
    trainer.save_model(training_args.output_dir, _internal_call=True)
    trainer.check_end()
    output_dir = Path(training_args.output_dir)
    if script_args.compare:
        results = _results_of_the_end(trainer) or trainer.compare()
        if main:
            with written_whole(output_dir) as folder:
                save_results(results, folder)
                trainer.make_record().save(folder)
            print(f"\n{format_table(results)}\n")
        trainer.create_model_card()
    if main:
        print(f"images   {output_dir / 'images'}")
        if training_args.save_curves and (output_dir / "curves.png").is_file():  # not if nothing was logged
            print(f"curves   {output_dir / 'curves.png'}")
        print(f'the LoRA pipe.load_lora_weights("{output_dir}", weight_name="pytorch_lora_weights.safetensors")')
    if training_args.push_to_hub:
        commit = trainer.push_to_hub()
        if main:
            print(f"pushed   {commit.commit_url}")


def _results_of_the_end(trainer: DiffusionTrainer) -> dict[str, Any]:
    """Those of an earlier comparison of the very weights that a run ended with; empty if there was none."""
    file = Path(trainer.args.output_dir) / "results.json"
    found = [{}]
    if trainer.resumed_at_end and trainer.is_world_process_zero() and file.is_file():
        found = [json.loads(file.read_text(encoding="utf-8"))]
    [trainer.outcome.results] = broadcast_object_list(found)
    return trainer.outcome.results


def main(
    argv: list[str] | None = None, *, method: str = "opd", prog: str | None = None, epilog: str | None = None
) -> None:
    """
    Trains what a recipe describes. Bad input ends with exit code 2.

    Args:
        argv (`list[str]`, *optional*):
            Arguments instead of those of the process.
        method (`str`, *optional*, defaults to `"opd"`):
            One of `METHODS`.
        prog (`str`, *optional*), epilog (`str`, *optional*):
            As of [`parse_recipe`].
    """
    how = METHODS[method]
    with ExitStack() as held:
        with one_line_errors(*BAD_INPUT, TypeError):
            script_args, training_args, recipe = parse_recipe(
                sys.argv[1:] if argv is None else argv,
                (how.arguments, how.config),
                description=how.description,
                prog=prog,
                epilog=epilog,
            )
            if training_args.disable_tqdm:
                disable_bars()
            use_all_cores(training_args.device)
            if not script_args.dry_run and training_args.process_index == 0:
                held.enter_context(holding(training_args.output_dir))  # before anything large is loaded
            if script_args.dry_run and training_args.push_to_hub:
                check_destination(training_args)
                training_args.push_to_hub = False  # or constructing the trainer creates the repository
            trainer = how.trainer(args=training_args, **script_args.trainer_arguments(recipe))
            if script_args.compare:
                scored_tasks(trainer.eval_datasets, trainer.reward_funcs)  # before training, not after it
        with one_line_errors():  # from here on, what others raise is a bug of a reward function, a library or ours
            if trainer.is_world_process_zero():
                print(describe_plan(trainer), flush=True)
            if not script_args.dry_run:
                _train_or_fail(trainer, script_args)
        trainer.end_processes()  # or a process may abort while it exits, its communication still running


def _train_or_fail(trainer: DiffusionTrainer, script_args: ScriptArguments) -> None:
    try:
        train(trainer, script_args)
    except ResumeError as error:  # what could not be checked before the models were loaded
        fail(error)
    except (PushError, SaveError, UnscoredError) as error:
        fail(error, exit_code=1)
