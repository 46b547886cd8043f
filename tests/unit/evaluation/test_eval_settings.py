# SPDX-License-Identifier: Apache-2.0
"""The settings of evaluation, against images that the pipeline draws by itself with these settings."""

import pytest
import torch

from tests.support.runs import PROMPTS, make_trainer
from tests.support.tiny import tiny_pipeline
from trl_diffusion_opd import StableDiffusion3SDEPipeline
from trl_diffusion_opd.data.rounds import sample_seed


def pipeline_images(guidance_scale: float, noise_level: float, steps: int) -> torch.Tensor:
    """Images of the base, which an untrained student is, for the prompts of `count`; noise by its definition."""
    pipe = StableDiffusion3SDEPipeline(**tiny_pipeline().components)
    pipe.set_progress_bar_config(disable=True)
    images = []
    for position, prompt in enumerate(PROMPTS["count"]):
        generator = torch.Generator().manual_seed(sample_seed(42, "eval/count", 0, position))
        images += pipe(
            prompt,
            generator=generator,  # draws the initial noise, then that of the steps
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            noise_level=noise_level,
            max_sequence_length=16,
            height=16,
            width=16,
            output_type="pt",
        ).images
    return torch.stack(images)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (2.0, 0.0, 4)),
        ({"eval_guidance_scale": 3.5}, (3.5, 0.0, 4)),
        ({"eval_guidance_scale": 1.0}, (1.0, 0.0, 4)),
        ({"eval_noise_level": 0.7}, (2.0, 0.7, 4)),
        ({"eval_noise_level": 0.7, "noise_level": 0.3}, (2.0, 0.7, 4)),
        ({"noise_level": 0.3}, (2.0, 0.0, 4)),
        ({"eval_num_inference_steps": 6}, (2.0, 0.0, 6)),
    ],
)
def test_evaluation_draws_with_its_own_settings(tmp_path, settings, expected):
    seen = []

    def keep(images, prompts, **columns):
        seen.append(images)
        return [0.0] * len(prompts)

    trainer = make_trainer(
        tmp_path, eval_dataset={"count": PROMPTS["count"]}, reward_funcs={"count": keep}, **settings
    )
    trainer.evaluate()
    ours = torch.cat(seen)
    torch.testing.assert_close(ours, pipeline_images(*expected), rtol=0, atol=1e-5)
    if settings.keys() & {"eval_guidance_scale", "eval_noise_level", "eval_num_inference_steps"}:
        assert (ours - pipeline_images(2.0, settings.get("noise_level", 0.0), 4)).abs().max() > 1e-4  # matters
