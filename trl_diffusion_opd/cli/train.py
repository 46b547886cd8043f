# SPDX-License-Identifier: Apache-2.0
"""The body of `trl-diffusion-opd train`, `grpo` and `nft`: from a recipe to a trained student."""

import sys
from dataclasses import dataclass
from pathlib import Path

from ..evaluation.comparison import compare, format_table, save_results, scored_tasks
from ..hub.upload import PushError, check_destination
from ..trainers.base_config import DiffusionConfig
from ..trainers.base_trainer import DiffusionTrainer
from ..trainers.grpo_config import FlowGRPOConfig
from ..trainers.grpo_trainer import FlowGRPOTrainer
from ..trainers.nft_config import DiffusionNFTConfig
from ..trainers.nft_trainer import DiffusionNFTTrainer
from ..trainers.opd_config import DiffusionOPDConfig
from ..trainers.opd_trainer import DiffusionOPDTrainer
from ..trainers.plan import describe_plan
from ..utils.distributed import use_all_cores
from .parser import fail
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
    "train": Method(
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
    trainer.train(resume_from_checkpoint=True if str(resume).lower() == "true" else resume)
    # "Internal", or upstream would push here too, before there are results
    trainer.save_model(training_args.output_dir, _internal_call=True)
    output_dir = Path(training_args.output_dir)
    if script_args.compare:
        results = compare(trainer)
        if main:
            save_results(results, output_dir)
            trainer.make_record().save(output_dir)
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


def main(
    argv: list[str] | None = None, *, method: str = "train", prog: str | None = None, epilog: str | None = None
) -> None:
    """
    Trains what a recipe describes. Bad input ends with exit code 2.

    Args:
        argv (`list[str]`, *optional*):
            Arguments instead of those of the process.
        method (`str`, *optional*, defaults to `"train"`):
            One of `METHODS`.
        prog (`str`, *optional*), epilog (`str`, *optional*):
            As of [`parse_recipe`].
    """
    how = METHODS[method]
    try:
        script_args, training_args, recipe = parse_recipe(
            sys.argv[1:] if argv is None else argv,
            (how.arguments, how.config),
            description=how.description,
            prog=prog,
            epilog=epilog,
        )
        use_all_cores(training_args.device)
        if script_args.dry_run and training_args.push_to_hub:
            check_destination(training_args)
            training_args.push_to_hub = False  # or constructing the trainer creates the repository
        trainer = how.trainer(args=training_args, **script_args.trainer_arguments(recipe))
        if script_args.compare:
            scored_tasks(trainer)  # before training, not after it
    except (ValueError, TypeError, OSError, ImportError) as error:
        fail(error)
    if trainer.is_world_process_zero():
        print(describe_plan(trainer), flush=True)
    if not script_args.dry_run:
        try:
            train(trainer, script_args)
        except PushError as error:
            fail(error, exit_code=1)
    trainer.accelerator.end_training()  # or a process may abort while it exits, its communication still running
