# SPDX-License-Identifier: Apache-2.0
"""Each model family against its stock pipeline: images, gradients, resuming, LoRAs, cards, demos, evaluation."""

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from tests.support.cards import snippet
from tests.support.family_runs import (
    LENGTH,
    PROMPTS,
    make_family_teacher,
    make_family_trainer,
    run_round,
    stock_images,
    student,
)
from tests.support.tiny_families import FAMILY_PIPELINES, family_pipeline
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
from trl_diffusion_opd.models.loading import check_pipeline, read_configs
from trl_diffusion_opd.models.registry import family_of
from trl_diffusion_opd.models.sampler import Policy
from trl_diffusion_opd.publishing.card import render_card
from trl_diffusion_opd.publishing.space_content import gather
from trl_diffusion_opd.trainers.plan import describe_plan


NEW = [name for name in FAMILY_PIPELINES if name != "sd3"]


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("name", NEW)
def test_a_rollout_is_the_stock_pipelines_and_prompts_of_different_lengths_do_not_mix(tmp_path, name, guidance_scale):
    trainer, prompts, seeds = make_family_trainer(name, tmp_path, width=32), PROMPTS["count"], [5, 6]
    policy, sampler = Policy("base", guidance_scale), trainer.sampler
    conditioning = trainer.prompts.conditioning(prompts)
    for steps in (2, 4):
        schedule = trainer.family.schedule(trainer.pipeline, steps, trainer.latent_shape)
        latents = sampler.sample_latents(policy, conditioning, seeds, schedule)
        pipe = family_pipeline(name)
        expected = stock_images(pipe, prompts, sampler.noise(seeds)[0], steps, guidance_scale, width=32)
        torch.testing.assert_close(sampler.decode(latents), expected, rtol=0, atol=2e-6)
    for index, prompt in enumerate(prompts):
        alone = trainer.prompts.conditioning([prompt])
        one = sampler.sample_latents(policy, alone, seeds[index : index + 1], schedule)
        torch.testing.assert_close(one[0], latents[index], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NEW)
def test_each_sample_may_have_a_time_of_its_own(tmp_path, name):
    trainer = make_family_trainer(name, tmp_path)
    conditioning = trainer.prompts.conditioning(PROMPTS["count"])
    sample, times = trainer.sampler.noise([1, 2])[0], torch.tensor([250.0, 800.0])
    both = trainer.sampler.velocity(Policy("base", 3.0), sample, times, conditioning)
    for index, prompt in enumerate(PROMPTS["count"]):
        alone = trainer.prompts.conditioning([prompt])
        one = trainer.sampler.velocity(Policy("base", 3.0), sample[index : index + 1], times[index], alone)
        torch.testing.assert_close(one[0], both[index], rtol=0, atol=1e-5)
    swapped = trainer.sampler.velocity(Policy("base", 3.0), sample, times.flip(0), conditioning)
    assert (swapped - both).abs().max() > 1e-3, "time reaches the model"
    other = trainer.sampler.velocity(
        Policy("base", 3.0), sample, times, trainer.prompts.conditioning(PROMPTS["count"][::-1])
    )
    assert (other - both).abs().max() > 1e-3, "the prompt reaches the model"


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("name", NEW)
def test_one_pass_has_the_gradient_of_three(tmp_path, name, guidance_scale):
    trainer = make_family_trainer(name, tmp_path, guidance_scale=guidance_scale)
    trainer.transformer.to(torch.float64)
    noise = trainer.sampler.noise
    trainer.sampler.noise = lambda seeds: (noise(seeds)[0].double(), noise(seeds)[1])
    run_round(trainer)
    single = {name: p.grad.clone() for name, p in trainer.transformer.named_parameters() if p.grad is not None}
    trainer.transformer.zero_grad()
    losses, scale = [], guidance_scale
    steps = trainer.args.num_inference_steps - trainer.args.skip_last_steps
    for batch in trainer.rounds.batches(0):
        conditioning, teacher = trainer.prompts.conditioning(batch.prompts), trainer.teachers[batch.task]
        rollout = trainer.sampler.rollout(
            Policy("student", scale, ("default",)), conditioning, batch.seeds, trainer.schedule
        )
        for step, _ in zip(rollout, range(steps), strict=False):
            sigma, after = trainer.schedule.sigmas[step.index : step.index + 2].tolist()
            time = trainer.schedule.timesteps[step.index]
            target = trainer.sampler.velocity(teacher, step.sample, time, conditioning)
            velocity = trainer.model(step.sample, time, *conditioning.batch(scale), scale)
            losses.append(((after - sigma) * (velocity - target)).square().mean() / 2)
    torch.stack(losses).mean().backward()
    reference = {name: p.grad for name, p in trainer.transformer.named_parameters() if p.grad is not None}
    assert single.keys() == reference.keys() and len(single) > 0
    largest = max(gradient.abs().max() for gradient in reference.values())
    assert largest > 0
    for parameter, gradient in reference.items():
        torch.testing.assert_close(single[parameter], gradient, rtol=1e-9, atol=1e-12 * largest.item(), msg=parameter)


@pytest.mark.parametrize("name", NEW)
def test_every_weight_of_the_student_gets_a_gradient(tmp_path, name):
    trainer = make_family_trainer(name, tmp_path)
    run_round(trainer)
    weights = {n: p for n, p in trainer.transformer.named_parameters() if p.requires_grad}
    assert weights and not [n for n, p in weights.items() if p.grad is None]


@pytest.mark.parametrize("name", NEW)
def test_a_student_is_distilled_resumed_to_the_bit_and_drawn_by_the_stock_pipeline(tmp_path, name, monkeypatch):
    base = tmp_path / "base"
    family_pipeline(name).save_pretrained(base)
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "model": str(base)}
    trainer = make_family_trainer(name, tmp_path, **saving)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    trainer.save_model()

    again = make_family_trainer(name, tmp_path, **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    first, second = student(trainer), student(again)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)

    seeds, prompts = [5, 6], PROMPTS["scene"]
    pipe = family_pipeline(name)
    pipe.load_lora_weights(tmp_path / "out", weight_name="pytorch_lora_weights.safetensors")
    policy, schedule = trainer.student_policy, trainer.eval_schedule
    noise = trainer.sampler.noise(seeds)[0]
    images = stock_images(pipe, prompts, noise, len(schedule), policy.guidance_scale)
    conditioning = trainer.prompts.conditioning(prompts)
    ours = trainer.sampler.decode(trainer.sampler.sample_latents(policy, conditioning, seeds, schedule))
    torch.testing.assert_close(ours, images, rtol=0, atol=1e-5)
    plain = stock_images(family_pipeline(name), prompts, noise, len(schedule), policy.guidance_scale)
    assert (images - plain).abs().max() > 1e-3, "the LoRA has an effect"

    record = trainer.make_record()
    card = str(render_card(record))
    assert type(pipe).__name__ in card and "prompt=" in card and type(pipe).__name__ in describe_plan(trainer) + card
    code = snippet(card).replace(repr(f"./{record.base.name}"), repr(str(base)))
    code = code.replace(f'"./{record.base.name}"', repr(str(base)))
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "snippet", "exec"), {})
    assert Path("image.png").is_file()
    content = gather(tmp_path / "out", base=base)
    assert content.guidance["argument"] in trainer.family.call_arguments(3.0, LENGTH)


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize(
    "trainer_class, config_class, settings",
    [(FlowGRPOTrainer, FlowGRPOConfig, {"beta": 0.1}), (DiffusionNFTTrainer, DiffusionNFTConfig, {})],
)
def test_it_learns_from_rewards(tmp_path, name, trainer_class, config_class, settings):
    def brightness(images, prompts, **columns):
        return images.flatten(1).mean(1).tolist()

    args = config_class(
        output_dir=str(tmp_path),
        max_steps=2,
        num_inference_steps=3,
        max_sequence_length=LENGTH,
        height=16,
        width=16,
        per_device_train_batch_size=2,
        num_generations=2,
        steps_per_rollout=1,
        learning_rate=0.1,
        save_strategy="no",
        num_grid_prompts=0,
        save_curves=False,
        disable_tqdm=True,
        use_cpu=True,
        **settings,
    )
    trainer = trainer_class(family_pipeline(name), brightness, args, PROMPTS["count"], peft_config={"r": 4})
    guided = trainer.family.needs_negative(trainer.args.guidance_scale)
    assert guided == (trainer_class is FlowGRPOTrainer and name != "flux"), "NFT goes without guidance"
    before = student(trainer)
    trainer.train()
    after = student(trainer)
    assert any(not torch.equal(before[key], after[key]) for key in before)
    assert all(torch.isfinite(tensor).all() for tensor in after.values())


@pytest.mark.parametrize(
    "name, options, steps, rollout, guidance, length, skipped",
    [
        ("sd3", {}, 40, 10, 4.5, 128, 1),
        ("zimage", {}, 28, 10, 5.0, 512, 0),
        ("zimage", {"shift": 3.0}, 8, 8, 1.0, 512, 0),
        ("flux2_klein", {}, 50, 10, 4.0, 512, 0),
        ("flux2_klein", {"is_distilled": True}, 4, 4, 1.0, 512, 0),
        ("flux", {}, 28, 10, 3.5, 512, 0),
        ("flux", {"guidance_embeds": False}, 4, 4, 1.0, 256, 0),
        ("qwen_image", {}, 50, 10, 4.0, 512, 1),
    ],
)
def test_what_a_model_is_made_for_is_told_by_its_configs(
    tmp_path, name, options, steps, rollout, guidance, length, skipped
):
    pipe = family_pipeline(name, **options)
    pipe.save_pretrained(tmp_path)
    for model in (pipe, str(tmp_path)):
        origin, family = check_pipeline(model)
        defaults = family.defaults(read_configs(model, origin))
        assert (defaults.num_inference_steps, defaults.rollout_steps, defaults.guidance_scale) == (
            steps,
            rollout,
            guidance,
        )
        assert (defaults.max_sequence_length, defaults.skip_last_steps) == (length, skipped)


@pytest.mark.parametrize(
    "name, options, steps",
    [
        ("zimage", {"shift": 3.0}, 8),
        ("flux2_klein", {"is_distilled": True}, 4),
        ("flux", {"guidance_embeds": False}, 4),
    ],
)
def test_a_base_of_few_steps_is_rolled_out_in_its_own_steps_without_guidance(tmp_path, name, options, steps):
    pipe = family_pipeline(name, **options)
    settings = {"num_inference_steps": None, "guidance_scale": None, "max_sequence_length": None}
    trainer = make_family_trainer(name, tmp_path, model=pipe, **settings)
    assert len(trainer.schedule) == steps and trainer.args.guidance_scale == 1.0
    batch = next(iter(trainer.rounds.batches(0)))
    policy, conditioning = Policy("base", 1.0), trainer.prompts.conditioning(batch.prompts)
    latents = trainer.sampler.sample_latents(policy, conditioning, batch.seeds, trainer.schedule)
    noise, length = trainer.sampler.noise(batch.seeds)[0], trainer.args.max_sequence_length
    images = stock_images(family_pipeline(name, **options), batch.prompts, noise, steps, 1.0, length=length)
    torch.testing.assert_close(trainer.sampler.decode(latents), images, rtol=0, atol=1e-5)
    before = student(trainer)
    trainer.train()
    assert any(not torch.equal(tensor, before[key]) for key, tensor in student(trainer).items())
    assert f"{steps} steps of flow" in describe_plan(trainer)


@pytest.mark.parametrize(
    "name, options, message",
    [
        (
            "flux2_klein",
            {"is_distilled": True},
            "`guidance_scale` is 4, but a distilled FLUX.2-klein takes no guidance",
        ),
        ("flux", {"guidance_embeds": False}, "`guidance_scale` is 4, but this FLUX.1 takes no guidance"),
    ],
)
def test_guidance_that_the_model_would_ignore_is_refused_before_anything_is_loaded(tmp_path, name, options, message):
    pipe = family_pipeline(name, **options)
    (tmp_path / "base").mkdir()
    pipe.save_config(tmp_path / "base")
    for component in ("scheduler", "transformer"):
        getattr(pipe, component).save_config(tmp_path / "base" / component)
    with pytest.raises(ValueError, match=message):
        DiffusionOPDTrainer(
            str(tmp_path / "base"),
            {"count": "owner/nowhere"},
            DiffusionOPDConfig(output_dir=str(tmp_path), use_cpu=True, guidance_scale=4.0),
            {"count": ["a"]},
        )


@pytest.mark.parametrize("name", NEW)
def test_its_images_are_those_of_an_evaluation(name):
    pipe = family_pipeline(name)
    sampler = EntrySampler(
        pipe,
        *check_pipeline(pipe),
        {},
        dtype=torch.float32,
        device=torch.device("cpu"),
        num_inference_steps=3,
        resolution=16,
        max_sequence_length=LENGTH,
        show_progress=False,
    )
    prompts = PROMPTS["scene"]
    images = sampler.draw(Entry("base", 3.0), sampler.prompts.conditioning(prompts), [1, 2])
    expected = stock_images(family_pipeline(name), prompts, sampler.sampler.noise([1, 2])[0], 3, 3.0)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)


def test_settings_for_one_base_are_not_carried_over_to_the_next(tmp_path):
    args = DiffusionOPDConfig(output_dir=str(tmp_path / "out"), height=16, width=16, use_cpu=True, num_grid_prompts=0)
    found = []
    for shift in (6.0, 3.0):
        teacher = make_family_teacher("zimage", tmp_path / "teacher", 0)
        pipe = family_pipeline("zimage", shift=shift)
        trainer = DiffusionOPDTrainer(pipe, {"count": teacher}, args, {"count": PROMPTS["count"]})
        found.append((trainer.args.num_inference_steps, trainer.args.guidance_scale))
    assert found == [(10, 5.0), (8, 1.0)] and args.guidance_scale is None


@pytest.mark.parametrize("content", ["{}", "[]", "3", '"x"', "{", ""])
@pytest.mark.parametrize("name", NEW)
def test_damaged_configs_are_told_by_what_loads_them(tmp_path, name, content):
    pipe = family_pipeline(name)
    pipe.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "transformer" / "config.json").write_text(content)
    (tmp_path / "base" / "scheduler" / "scheduler_config.json").write_text(content)
    origin, family = check_pipeline(str(tmp_path / "base"))
    configs = read_configs(str(tmp_path / "base"), origin)
    assert family.defaults(configs).rollout_steps in (4, 10) and family.lora_options(configs("transformer"))
    assert configs("transformer") == {}


def test_kleins_prompts_are_encoded_without_the_head_of_the_language_model():
    pipe = family_pipeline("flux2_klein")
    family, prompts = family_of(pipe), PROMPTS["count"]
    stock, _ = pipe.encode_prompt(prompts, max_sequence_length=LENGTH)
    pipe.text_encoder.lm_head = None
    ours = family.encode(pipe, prompts, device=torch.device("cpu"), max_sequence_length=LENGTH)
    assert torch.equal(torch.stack([item["prompt_embeds"] for item in ours]), stock)


def test_qwens_guidance_keeps_the_length_of_each_token():
    from trl_diffusion_opd.models.packing import pack

    family = family_of(family_pipeline("qwen_image"))
    positive, negative = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    guided = family.guide(positive, negative, 4.0)
    torch.testing.assert_close(pack(guided).norm(dim=-1), pack(positive).norm(dim=-1))
    direction = torch.nn.functional.cosine_similarity(pack(guided), pack(negative + 4 * (positive - negative)), dim=-1)
    torch.testing.assert_close(direction, torch.ones_like(direction))


@pytest.mark.parametrize("dtype", [torch.bfloat16])
@pytest.mark.parametrize("name", NEW)
def test_in_half_precision_it_draws_what_the_stock_pipeline_draws(tmp_path, name, dtype):
    """Up to rounding: the stock pipelines of FLUX and Qwen-Image keep the state in half precision, ours is in float32."""
    family_pipeline(name).save_pretrained(tmp_path / "base")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "base", dtype=dtype)
    trainer = make_family_trainer(
        name, tmp_path, model=str(tmp_path / "base"), model_init_kwargs={"dtype": str(dtype).split(".")[1]}
    )
    assert next(trainer.transformer.parameters()).dtype == dtype
    prompts, seeds = PROMPTS["count"], [5, 6]
    schedule = trainer.family.schedule(trainer.pipeline, 4, trainer.latent_shape)
    conditioning = trainer.prompts.conditioning(prompts)
    latents = trainer.sampler.sample_latents(Policy("base", 3.0), conditioning, seeds, schedule)
    assert latents.dtype == torch.float32
    pipe.set_progress_bar_config(disable=True)
    noise = trainer.sampler.noise(seeds)[0].to(torch.float32 if name == "zimage" else dtype)
    expected = stock_images(pipe, prompts, noise, 4, 3.0)
    difference = (trainer.sampler.decode(latents) - expected.float()).square().mean().sqrt()
    assert difference < 0.03, difference
