# SPDX-License-Identifier: Apache-2.0
"""Options of the base's scheduler: followed, as the stock pipeline follows them, or refused by name."""

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    StableDiffusion3Pipeline,
)

from tests.support.runs import make_trainer
from tests.support.tiny import tiny_pipeline
from trl_diffusion_opd import StableDiffusion3SDEPipeline


DYNAMIC = {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64}
REFUSED = [
    (
        FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True),
        "`stochastic_sampling=True` of the FlowMatchEulerDiscreteScheduler is not supported",
    ),
    (
        FlowMatchEulerDiscreteScheduler(shift=3.0, invert_sigmas=True),
        "`invert_sigmas=True` of the FlowMatchEulerDiscreteScheduler is not supported",
    ),
    (FlowMatchHeunDiscreteScheduler(shift=3.0), "must be a FlowMatchEulerDiscreteScheduler, but is a FlowMatchHeun"),
    (
        DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
        "must be a FlowMatchEulerDiscreteScheduler, but is a DPMSolverMultistepScheduler",
    ),
]


def draw(pipeline_class, scheduler) -> torch.Tensor:
    pipe = pipeline_class(**{**tiny_pipeline().components, "scheduler": scheduler})
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    settings = {"num_inference_steps": 5, "guidance_scale": 2.0, "max_sequence_length": 16, "height": 16, "width": 16}
    return pipe("a red circle", generator=generator, output_type="pt", **settings).images


@pytest.mark.parametrize(
    "options",
    [
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"use_beta_sigmas": True},
        {"shift_terminal": 0.1},
        {"num_train_timesteps": 500},
        {**DYNAMIC, "time_shift_type": "linear"},
        {**DYNAMIC, "base_shift": 0.2, "max_shift": 2.0},
    ],
    ids=lambda options: "-".join(options),
)
def test_what_shapes_the_sigmas_is_followed_to_the_bit(options):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, **options)
    images = draw(StableDiffusion3SDEPipeline, scheduler)
    assert torch.equal(images, draw(StableDiffusion3Pipeline, scheduler))
    assert not torch.equal(images, draw(StableDiffusion3Pipeline, FlowMatchEulerDiscreteScheduler(shift=3.0)))


def test_every_option_of_the_scheduler_is_followed_or_refused():
    """A new one of diffusers has to be looked at."""
    followed = {
        *("num_train_timesteps", "shift", "use_dynamic_shifting", "base_shift", "max_shift", "base_image_seq_len"),
        *("max_image_seq_len", "shift_terminal", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"),
        "time_shift_type",
    }
    options = {name for name in FlowMatchEulerDiscreteScheduler().config if not name.startswith("_")}
    assert options == followed | {"stochastic_sampling", "invert_sigmas"}


@pytest.mark.parametrize(("scheduler", "message"), REFUSED, ids=["stochastic", "inverted", "heun", "dpm"])
class TestRefused:
    def test_by_the_pipeline(self, scheduler, message):
        with pytest.raises(ValueError, match=message):
            draw(StableDiffusion3SDEPipeline, scheduler)

    def test_by_a_trainer_at_start_up(self, scheduler, message, tmp_path):
        pipeline = tiny_pipeline()
        pipeline.scheduler = scheduler
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, pipeline=pipeline)
