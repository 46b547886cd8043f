# SPDX-License-Identifier: Apache-2.0
"""The seam for model families: a second one, defined by the tests, does all that the first one does."""

import ast
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from tests.support.stripes_family import Stripes, stripes_pipeline
from tests.support.tiny import tiny_pipeline
from trl_diffusion_opd import (
    DiffusionNFTConfig,
    DiffusionNFTTrainer,
    DiffusionOPDConfig,
    DiffusionOPDTrainer,
    FlowGRPOConfig,
    FlowGRPOTrainer,
)
from trl_diffusion_opd.evaluation.benchmark.drawing import EntrySampler
from trl_diffusion_opd.evaluation.benchmark.entries import Entry
from trl_diffusion_opd.lora.adapters import save_lora
from trl_diffusion_opd.models.family import ModelFamily
from trl_diffusion_opd.models.loading import check_pipeline
from trl_diffusion_opd.models.registry import DEFAULT_PIPELINE, FAMILIES, family_named, family_of
from trl_diffusion_opd.models.sampler import Policy
from trl_diffusion_opd.models.sd3 import StableDiffusion3
from trl_diffusion_opd.publishing.card import render_card
from trl_diffusion_opd.publishing.space_content import gather
from trl_diffusion_opd.trainers.plan import describe_plan


PACKAGE = Path(__file__).parents[3] / "trl_diffusion_opd"
PROMPTS = {
    "count": ["a red circle", "two blue square on a dark sky"],
    "scene": ["a boat", "a tree in the city at night"],
}
SETTINGS = {
    "per_device_train_batch_size": 2,
    "num_inference_steps": 4,
    "guidance_scale": 3.0,
    "max_sequence_length": 16,
    "learning_rate": 0.2,
    "max_steps": 6,
    "logging_steps": 1,
    "save_strategy": "no",
    "num_grid_prompts": 1,
    "save_curves": False,
    "disable_tqdm": True,
    "activation_checkpointing": False,
    "use_cpu": True,
}


def brightness(images, prompts, **columns):
    return images.flatten(1).mean(1).tolist()


def teacher(folder: Path, seed: int) -> str:
    pipe = stripes_pipeline()
    pipe.transformer.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=Stripes.lora_targets))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in pipe.transformer.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.5, generator=generator)
    save_lora(folder, pipe.transformer)
    return str(folder)


def make_trainer(folder: Path, **settings) -> DiffusionOPDTrainer:
    return DiffusionOPDTrainer(
        model=settings.pop("model", None) or stripes_pipeline(),
        teachers={task: teacher(folder / task, seed) for seed, task in enumerate(PROMPTS)},
        args=DiffusionOPDConfig(output_dir=str(folder / "out"), **{**SETTINGS, **settings}),
        train_dataset=PROMPTS,
        eval_dataset=PROMPTS,
        reward_funcs={"count": brightness},
        peft_config={"r": 4, "lora_alpha": 4},  # the loader of a transformer alone reads no alpha
    )


def noise(count: int) -> torch.Tensor:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_rollout_is_the_stock_pipelines_and_prompts_of_different_lengths_do_not_mix(tmp_path, guidance_scale):
    trainer, prompts = make_trainer(tmp_path), [text for texts in PROMPTS.values() for text in texts]
    policy, sampler = Policy("base", guidance_scale), trainer.sampler
    conditioning, seeds = trainer.prompts.conditioning(prompts), [5, 6, 7, 8]
    latents = sampler.sample_latents(policy, conditioning, seeds, trainer.schedule)
    images = stripes_pipeline()(prompts, sampler.noise(seeds)[0], 4, strength=guidance_scale - 1)
    torch.testing.assert_close(sampler.decode(latents), images, rtol=0, atol=1e-5)
    for index, prompt in enumerate(prompts):
        alone = trainer.prompts.conditioning([prompt])
        one = sampler.sample_latents(policy, alone, seeds[index : index + 1], trainer.schedule)
        torch.testing.assert_close(one[0], latents[index], rtol=0, atol=1e-5)


def test_a_student_is_distilled_saved_and_drawn_by_the_stock_pipeline(tmp_path):
    trainer = make_trainer(tmp_path)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.7 * before["eval_loss"]
    results = trainer.compare()
    assert set(results) == {"base", "teachers", "merge", "student"}
    assert (tmp_path / "out" / "images" / "step_000006.png").is_file()
    trainer.save_model()

    stock = stripes_pipeline()
    stock.transformer.load_lora_adapter(tmp_path / "out" / "pytorch_lora_weights.safetensors", prefix="transformer")
    prompts, seeds = PROMPTS["count"], [5, 6]
    images = stock(prompts, trainer.sampler.noise(seeds)[0], 4, strength=2.0)
    conditioning = trainer.prompts.conditioning(prompts)
    latents = trainer.sampler.sample_latents(trainer.student_policy, conditioning, seeds, trainer.eval_schedule)
    torch.testing.assert_close(trainer.sampler.decode(latents), images, rtol=0, atol=1e-5)

    plan, card = describe_plan(trainer), str(render_card(trainer.make_record()))
    assert "16x16 px" in plan and "4 steps of flow" in plan and "4 of them trained" in plan
    assert (
        "StripesPipeline" in card and "strength=2.0" in card and "guidance 3" in card and "StableDiffusion" not in card
    )


@pytest.mark.parametrize(
    "trainer_class, config_class, settings",
    [(FlowGRPOTrainer, FlowGRPOConfig, {"beta": 0.1}), (DiffusionNFTTrainer, DiffusionNFTConfig, {})],
)
def test_it_learns_from_rewards(tmp_path, trainer_class, config_class, settings):
    args = config_class(
        output_dir=str(tmp_path),
        **{**SETTINGS, "num_generations": 2, "steps_per_rollout": 1, "max_steps": 2, **settings},
    )
    trainer = trainer_class(stripes_pipeline(), brightness, args, PROMPTS["count"], peft_config={"r": 4})
    before = {name: p.detach().clone() for name, p in trainer.transformer.named_parameters() if ".default." in name}
    trainer.train()
    after = dict(trainer.transformer.named_parameters())
    assert any(not torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert all(torch.isfinite(after[name]).all() for name in before)


def test_a_run_is_resumed_to_the_bit(tmp_path):
    whole = make_trainer(tmp_path / "whole", save_strategy="steps", save_steps=3)
    whole.train()
    resumed = make_trainer(tmp_path / "whole", save_strategy="steps", save_steps=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "out" / "checkpoint-3"))
    states = [
        {name: p for name, p in trainer.transformer.named_parameters() if ".default." in name}
        for trainer in (whole, resumed)
    ]
    assert states[0].keys() == states[1].keys() and all(torch.equal(p, states[1][n]) for n, p in states[0].items())


def test_its_images_are_those_of_an_evaluation():
    pipe = stripes_pipeline()
    sampler = EntrySampler(
        pipe,
        *check_pipeline(pipe),
        {},
        dtype=torch.float32,
        device=torch.device("cpu"),
        num_inference_steps=4,
        resolution=None,
        max_sequence_length=16,
        show_progress=False,
    )
    prompts = PROMPTS["scene"]
    images = sampler.draw(Entry("base", 3.0), sampler.prompts.conditioning(prompts), [1, 2])
    expected = stripes_pipeline()(prompts, sampler.sampler.noise([1, 2])[0], 4, strength=2.0)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)


def test_families_are_found_by_the_pipelines_class(tmp_path):
    assert isinstance(family_of(stripes_pipeline()), Stripes)
    assert isinstance(family_of(tiny_pipeline()), StableDiffusion3)
    assert isinstance(family_named(DEFAULT_PIPELINE), StableDiffusion3)
    (tmp_path / "model_index.json").write_text('{"_class_name": "KolorsPipeline"}')
    with pytest.raises(
        ValueError, match="`model` is a 'KolorsPipeline', which no known model family has. The pipelines"
    ):
        check_pipeline(tmp_path)
    (tmp_path / "model_index.json").write_text("[]")
    with pytest.raises(ValueError, match="is no index of a pipeline"):
        check_pipeline(tmp_path)


def test_dynamic_shifts_are_those_of_stable_diffusion():
    """base_shift + (tokens - base) (max_shift - base_shift) / (max - base)"""
    family, pipe = StableDiffusion3(), tiny_pipeline()
    assert family.mu(pipe, 1024, 10) is None
    pipe.scheduler.register_to_config(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    assert family.mu(pipe, 1024, 10) == pytest.approx(0.5 + (1024 - 256) * 0.65 / (4096 - 256))
    pipe.scheduler.register_to_config(base_shift=0.2, max_shift=0.8, base_image_seq_len=16, max_image_seq_len=64)
    assert family.mu(pipe, 40, 10) == pytest.approx(0.5)


def test_a_teacher_of_another_family_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="teacher of task 'count' is a SD3Transformer2DModel but the student is a Stripes"
    ):
        DiffusionOPDTrainer(
            stripes_pipeline(),
            {"count": tiny_pipeline().transformer},
            DiffusionOPDConfig(output_dir=str(tmp_path), **SETTINGS),
            {"count": PROMPTS["count"]},
        )


def test_only_the_files_of_families_name_them():
    """In code; docstrings and comments may have it as an example. The registry and the public names have to."""
    families = {f"models/{place.partition(':')[0]}.py" for place in FAMILIES.values() if isinstance(place, str)}
    own = {*families, "models/sd3_sde_pipeline.py", "models/registry.py", "lora/names.py", "__init__.py"}
    named = re.compile(
        r"SD3|StableDiffusion3|sd3_|text_encoder_[23]|pos_embed_max_size|joint_attention_|pooled_pro"
        r"|ZImage|Flux|FLUX|QwenImage|klein|is_distilled|guidance_embeds|true_cfg"
    )
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        path = file.relative_to(PACKAGE).as_posix()
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
                node.body = node.body[1:] or [ast.Pass()]
        if path not in own and (hits := named.findall(ast.unparse(tree))):
            found.append((path, hits))
    assert not found
    assert all(isinstance(family, (str, ModelFamily)) for family in FAMILIES.values())


def test_the_demo_is_told_what_the_pipeline_calls_guidance(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.train()
    trainer.save_model()
    stripes_pipeline().save_pretrained(tmp_path / "base")
    content = gather(tmp_path / "out", base=tmp_path / "base")
    assert content.guidance == {"argument": "strength", "offset": -1.0, "info": "Up to 1: none", "fixed": False}
    assert content.defaults == {"num_inference_steps": 4, "guidance_scale": 3.0, "height": 16, "width": 16}
