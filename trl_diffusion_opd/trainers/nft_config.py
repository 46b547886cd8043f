# SPDX-License-Identifier: Apache-2.0
"""Settings of the [`DiffusionNFTTrainer`]."""

from dataclasses import dataclass, field

from ..losses.nft import OLD_POLICY_SCHEDULES
from ..utils.settings import NOT_NEGATIVE, POSITIVE, Rule
from .rl_config import RLConfig


@dataclass
class DiffusionNFTConfig(RLConfig):
    r"""
    Configuration class for the [`DiffusionNFTTrainer`].

    Parameters:
        nft_beta (`float`, *optional*, defaults to `1.0`):
            How far the implicit positive and negative policies are from the one that draws the images.
        kl_coef (`float`, *optional*, defaults to `1e-4`):
            Weight of the squared distance from the base's velocity.
        old_policy_schedule (`int`, *optional*, defaults to `1`):
            How the policy that draws the images follows the trained one, `old <- d old + (1 - d) new` after every
            rollout: 0, `d = 0`; 1, `d = min(0.001 n, 0.5)` after `n` optimizer steps; 2, `d = 0` for 75 steps, then
            `min(0.0075 (n - 75), 0.999)`.

    `noise_level` only concerns how images are drawn, and `skip_last_steps` is the number of noise levels of the schedule,
    drawn at random for each image, that it is not trained on.

    > [!NOTE]
    > These parameters have default values different from [`DiffusionConfig`]:
    > - `solver`: Defaults to `"dpm2"` instead of `"flow"`.
    > - `guidance_scale`: Defaults to `1.0`, as neither drawing nor training uses guidance, instead of the model's own; for
    >   a model that has it as an input, as FLUX.1-dev, to the model's own too.
    > - `ema_decay`: Defaults to `0.9` instead of `None`.
    > - `ema_update_every`: Defaults to `1` instead of `8`.
    """

    _rules = RLConfig._rules | {
        "nft_beta": POSITIVE,
        "kl_coef": NOT_NEGATIVE,
        "old_policy_schedule": Rule(
            lambda value: value in OLD_POLICY_SCHEDULES, f"one of {', '.join(map(str, OLD_POLICY_SCHEDULES))}"
        ),
    }

    solver: str = field(default="dpm2", metadata={"help": "Sampler of the rollout, deterministic."})
    uses_guidance = False
    guidance_scale: float | None = field(
        default=None,
        metadata={"help": "Classifier-free guidance of the student. Defaults to none, which is 1.0."},
    )
    noise_level: float = field(
        default=0.0, metadata={"help": "Scale of the noise injected at each step of the rollout."}
    )
    skip_last_steps: int | None = field(
        default=None,
        metadata={"help": "Number of noise levels, drawn at random for each image, that it is not trained on."},
    )
    ema_decay: float | None = field(
        default=0.9, metadata={"help": "Decay of an exponential moving average of the student's LoRA."}
    )
    ema_update_every: int = field(
        default=1, metadata={"help": "Number of optimizer steps between two updates of the average."}
    )

    nft_beta: float = field(
        default=1.0,
        metadata={
            "help": "How far the implicit positive and negative policies are from the one that draws the images."
        },
    )
    kl_coef: float = field(default=1e-4, metadata={"help": "Weight of the squared distance from the base's velocity."})
    old_policy_schedule: int = field(
        default=1,
        metadata={
            "help": "How the policy that draws the images follows the trained one: 0 at once, 1 and 2 ever slower."
        },
    )
