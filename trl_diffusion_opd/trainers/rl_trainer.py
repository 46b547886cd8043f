# SPDX-License-Identifier: Apache-2.0
"""What the trainers that learn from rewards share: drawing images, scoring them, and comparing them."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch import nn
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from ..data.rounds import TaskBatch
from ..losses.advantages import group_advantages, prompt_group
from ..rewards.functions import RewardFunc, check_columns, reward_columns, reward_name, reward_threads
from ..utils.hardware import on_device
from ..utils.markdown import escape
from .base_trainer import DiffusionTrainer
from .experience import Experience
from .method_plan import MethodPlan
from .rl_config import RLConfig


_MAX_UNSCORED_ROLLOUTS = 3


class UnscoredError(RuntimeError):
    """Every reward failed, rollout after rollout, so that nothing can be learned."""


class RLTrainer(DiffusionTrainer):
    """
    Base class of the trainers that learn from rewards. Subclasses define `draw`, how a batch of images is drawn and
    what is kept of it, and `learn`, which accumulates the gradient of a batch; `config_class`, whose defaults are used
    without `args`; and for the plan of a run `objective`, in words, and `kept_latents`, how many tensors of the size of
    its latents are kept of an image.
    """

    config_class: type[RLConfig]
    _only_task: str | None = None

    def __init__(
        self,
        model: str | Path | DiffusionPipeline,
        reward_funcs: RewardFunc | str | list[RewardFunc | str] | Mapping[str, Any],
        args: RLConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Callable | None, Callable | None] = (None, None),
        peft_config: LoraConfig | dict[str, Any] | None = None,
        adapter: str | Path | None = None,
    ):
        if train_dataset is None:
            raise ValueError("`train_dataset` is required: the prompts, or those of each task.")
        if not isinstance(reward_funcs, Mapping):
            # One task, called like its reward.
            funcs = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
            name = "+".join(func if isinstance(func, str) else reward_name(func) for func in funcs)
            name = name or "reward"  # of an empty list, which is refused below
            reward_funcs, train_dataset = {name: funcs}, {name: train_dataset}
            eval_dataset = None if eval_dataset is None else {name: eval_dataset}
            self._only_task = name
        args = args if args is not None else self.config_class(output_dir=self._tag_names[1])
        self.reward_weights = args.reward_weights
        super().__init__(
            model,
            args,
            train_dataset,
            eval_dataset,
            tasks=list(reward_funcs),
            reward_funcs=reward_funcs,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
            adapter=adapter,
            num_generations=args.num_generations,
        )
        self._experiences: dict[tuple[int, int], list[Experience]] = {}
        self._loss_weights: list[float] = []
        self._scored: dict[int, bool] = {}  # whether an image of the rollout of a step has a score

    def check_rewards(self, args: RLConfig) -> None:
        if unprompted := [task for task in self.reward_funcs if task not in self.datasets]:
            raise ValueError(
                f"`train_dataset` has no prompts for tasks of `reward_funcs`: {unprompted}. Add some, or leave the tasks "
                "out."
            )
        for task, funcs in self.reward_funcs.items():
            if args.reward_weights is not None and len(args.reward_weights) != len(funcs):
                raise ValueError(
                    f"`reward_weights` has {len(args.reward_weights)} weights, but task {task!r} has {len(funcs)} reward "
                    "functions. Pass one for each, or `trl_diffusion_opd.rewards.weighted_sum` as the reward of the task."
                )
        check_columns(self.reward_funcs, self.datasets, "train_dataset")
        check_columns(self.reward_funcs, self.eval_datasets, "eval_dataset")

    def prompts_at_once(self) -> int:
        """Those of a rollout."""
        return len(set(self.rounds.prompts_of(range(self.args.steps_per_rollout))))

    def known_sources(self, args: RLConfig) -> dict[str, Any]:
        rewards = {task: [reward_name(func) for func in funcs] for task, funcs in self.reward_funcs.items()}
        return {
            **super().known_sources(args),
            "method": self._name,
            "rewards": rewards,
            "reward weights": self.reward_weights,
        }

    def plan(self) -> MethodPlan:
        args = self.args
        total = self.rounds.prompts_per_round * args.steps_per_rollout
        return MethodPlan(
            objective=self.objective,
            tasks={
                task: f"reward: {' + '.join(reward_name(func) for func in funcs)}"
                for task, funcs in self.reward_funcs.items()
            },
            lines={
                "images": f"{total * args.world_size:,} in a rollout, {args.num_generations} of a prompt, shared by "
                f"{args.steps_per_rollout} round(s)"
            },
            memory={"images": 4 * math.prod(self.latent_shape) * self.kept_latents * total},
        )

    def describe_run(self) -> dict[str, Any]:
        return {"summary": f"A LoRA trained by reinforcement learning ({self._name}) on {self.describe_rewards()}."}

    def load_method_state(self, folder: Path) -> None:
        step = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME)).global_step
        if step % self.args.steps_per_rollout and step < self.planned_steps:  # at the end no images are needed
            raise ValueError(
                f"The checkpoint {str(folder)!r} was saved in the middle of a rollout, whose images are gone: its step "
                f"{step} is no multiple of `steps_per_rollout` = {self.args.steps_per_rollout}. Resume from another one, "
                "or start a new run from its LoRA with `adapter`."
            )

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """See [`DiffusionTrainer.evaluate`]; takes the prompts alone if the trainer was given those of one task alone."""
        of_tasks = isinstance(eval_dataset, Mapping) and eval_dataset.keys() == {self._only_task}
        if self._only_task is not None and eval_dataset is not None and not of_tasks:
            eval_dataset = {self._only_task: eval_dataset}
        return super().evaluate(eval_dataset, *args, **kwargs)

    # The method

    def takes(self, advantages: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
        """Which images are learned from; boolean, of the shape of both. Those without a score are not."""
        return rewards.isfinite()

    def draw(self, batch: TaskBatch) -> tuple[torch.Tensor, Any]:
        """Draws a batch without gradients: the final latents `[B, C, H, W]` and what `learn` needs to know."""
        raise NotImplementedError

    def learn(
        self, model: nn.Module, experience: Experience, loss_weight: float, is_last_batch: bool
    ) -> dict[str, torch.Tensor]:
        """
        Accumulates the gradient of a batch.

        Args:
            model (`torch.nn.Module`):
                The student, in its data-parallel wrapper.
            experience ([`Experience`]):
                The batch.
            loss_weight (`float`):
                Weight of each image's loss.
            is_last_batch (`bool`):
                Whether this is the last batch, in whose last backward gradients are reduced over the processes.

        Returns:
            `dict[str, torch.Tensor]`: metrics of shape `[B]`, `loss` among them.
        """
        raise NotImplementedError

    def prepare_rollout(self) -> None:
        """Called before each rollout, also the first one of a run."""

    # Rounds

    def train_round(self, model: nn.Module, micro_round: int) -> tuple[torch.Tensor, int]:
        """
        One (micro-)round: every `steps_per_rollout` steps new images are drawn and scored; then a share is learned from.
        """
        offset = self.state.global_step % self.args.steps_per_rollout
        if offset == 0 and micro_round == 0:
            self.prepare_rollout()
            self.roll_out(self.state.global_step)
        experiences = self._experiences.pop((offset, micro_round))
        # At least one batch, for the reduction over the processes.
        useful = [experience for experience in experiences if experience.taken.any()] or experiences[-1:]
        metrics = [
            self.learn(model, experience, self._loss_weights[offset], is_last_batch=experience is useful[-1])
            for experience in useful
        ]
        loss = torch.cat([columns["loss"] for columns in metrics]).sum() * self._loss_weights[offset]
        self.check_finite(loss)
        self._log_learning(useful, metrics)
        return loss, sum(len(experience.batch.prompts) for experience in experiences)

    @torch.no_grad()
    def roll_out(self, step: int) -> None:
        """
        Draws and scores the images of the next `steps_per_rollout` steps. Rewards are computed while more are drawn.
        """
        args, steps = self.args, range(step, step + self.args.steps_per_rollout)
        self._prepare_prompts_of(steps)
        keys = [(offset, micro) for offset in range(len(steps)) for micro in range(args.gradient_accumulation_steps)]
        batches = {(offset, micro): self.rounds.batches(step + offset, micro) for offset, micro in keys}
        progress = tqdm(
            total=sum(len(batch.prompts) for group in batches.values() for batch in group),
            desc="Drawing images",
            disable=args.disable_tqdm or not self.is_world_process_zero(),
            leave=False,
        )
        executor, futures = reward_threads(args.reward_workers), []
        with ExitStack() as stack:
            stack.callback(executor.shutdown, cancel_futures=True)
            stack.enter_context(on_device((self.pipeline.vae,), self.accelerator.device))
            stack.enter_context(progress)
            for key in keys:
                self._experiences[key] = []
                for batch in batches[key]:
                    latents, trajectory = self.draw(batch)
                    experience = Experience(batch, trajectory)
                    self._experiences[key].append(experience)
                    images = self.sampler.decode(latents)
                    futures.append((experience, executor.submit(self._score, images, batch)))
                    progress.update(len(batch.prompts))
                    for _, future in futures:
                        if future.done():
                            future.result()  # raises what the reward raised, before more are drawn
            for experience, future in futures:
                experience.rewards = future.result()
        self._compare([self._experiences[key] for key in keys])

    def _score(self, images: torch.Tensor, batch: TaskBatch) -> dict[str, list[float]]:
        funcs, args = self.reward_funcs[batch.task], self.args
        return reward_columns(funcs, images, batch, args.reward_weights, timeout=args.reward_timeout)

    def _compare(self, rounds: list[list[Experience]]) -> None:
        """Sets the advantages, by statistics over all processes, and the weight of an image in each step's loss."""
        device, tasks = self.accelerator.device, list(self.datasets)
        experiences = [experience for group in rounds for experience in group]
        rewards = torch.tensor([r for e in experiences for r in e.rewards["reward"]], dtype=torch.float64)
        task_ids = torch.tensor([tasks.index(e.batch.task) for e in experiences for _ in e.batch.groups])
        groups = torch.tensor([prompt_group(e.batch.task, prompt) for e in experiences for prompt in e.batch.prompts])
        everywhere = [self.accelerator.gather(t.to(device)).cpu() for t in (rewards.float(), groups, task_ids)]
        self.check_scored(everywhere[0])
        first = self.args.process_index * len(rewards)
        advantages = group_advantages(*everywhere, scale=self.args.scale_rewards)
        advantages = advantages.clamp(-self.args.advantage_clip, self.args.advantage_clip)
        taken = self.takes(advantages, everywhere[0])
        lengths = [len(experience.batch.groups) for experience in experiences]
        own = slice(first, first + len(rewards))
        for experience, advantage, mask in zip(
            experiences, advantages[own].float().split(lengths), taken[own].split(lengths), strict=True
        ):
            experience.advantages, experience.taken = advantage.to(device), mask.to(device)

        # The loss of a step is the mean over the images that are learned from, in all processes.
        steps = self.args.steps_per_rollout
        counts = taken.reshape(self.args.world_size, steps, len(rewards) // steps).sum((0, 2)).tolist()
        self._loss_weights = [self.args.world_size / max(1, count) for count in counts]
        for index, task in enumerate(tasks):
            equal = (advantages[everywhere[2] == index] == 0).double().mean().item()
            self.metrics[f"frac_reward_zero_std/{task}"].append(equal)
        self._log_rewards(experiences)

    def _log_rewards(self, experiences: list[Experience]) -> None:
        columns: dict[tuple[str, str], list[float]] = defaultdict(list)
        for experience in experiences:
            for name, values in experience.rewards.items():
                columns[name, experience.batch.task] += values
        parts = gather_object([columns])
        for name, task in columns:
            scores = torch.tensor([score for part in parts for score in part[name, task]])
            valid = scores[scores.isfinite()]
            if len(valid):
                self.metrics[f"{name}/{task}"].append(valid.mean().item())
            if name == "reward":
                self.metrics[f"reward_failures/{task}"].append(len(scores) - len(valid))
                if len(valid):
                    self.metrics[f"reward_std/{task}"].append(valid.std(correction=0).item())

    def _log_learning(self, experiences: list[Experience], metrics: list[dict[str, torch.Tensor]]) -> None:
        """Means of what `learn` returned, over the images that are learned from in all processes."""
        tasks, names = list(self.datasets), sorted(metrics[0].keys() - {"loss"})
        sums = torch.zeros(len(tasks), len(names) + 1, device=self.accelerator.device)
        for experience, columns in zip(experiences, metrics, strict=True):
            values = torch.stack([*(columns[name].float() for name in names), torch.ones_like(experience.advantages)])
            sums[tasks.index(experience.batch.task)] += torch.where(experience.taken, values, 0.0).sum(1)
        for task, (*totals, count) in zip(tasks, self.accelerator.reduce(sums).tolist(), strict=True):
            for name, total in zip(names, totals, strict=True):
                if count:
                    self.metrics[f"{name}/{task}"].append(total / count)

    def describe_rewards(self) -> str:
        """The tasks and their rewards, in words, as Markdown."""
        names = {escape(task): escape("+".join(map(reward_name, funcs))) for task, funcs in self.reward_funcs.items()}
        return ", ".join(task if task == name else f"{task} (rewarded by {name})" for task, name in names.items())

    def check_scored(self, rewards: torch.Tensor) -> None:
        """Raises an [`UnscoredError`] at the third rollout in a row of which no image, in all processes, has a score."""
        self._scored[self.state.global_step] = bool(rewards.isfinite().any())
        if len(self._scored) >= _MAX_UNSCORED_ROLLOUTS:
            self.check_end()

    def check_end(self) -> None:
        """Raises an [`UnscoredError`] if no image of the last rollouts has a score."""
        last = list(self._scored.values())[-_MAX_UNSCORED_ROLLOUTS:]
        if last and not any(last):
            raise UnscoredError(
                f"No image of the last {len(last)} rollouts up to round {self.state.global_step} has a score: every reward "
                "failed or was not finite, so that nothing was learned. See to the rewards (`trl-diffusion-opd rewards "
                "--check`) and resume from the last checkpoint."
            )

    def check_finite(self, loss: torch.Tensor) -> None:
        """Raises a `FloatingPointError` if the loss is NaN or infinite in any process."""
        mean = self.accelerator.reduce(loss, reduction="mean")
        if not torch.isfinite(mean):
            raise FloatingPointError(
                f"The loss of round {self.state.global_step} is {mean.item()}. Nothing was updated and the last "
                "checkpoint is intact. Lower `learning_rate`, or train in bf16 or fp32 instead of fp16."
            )
