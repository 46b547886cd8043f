# SPDX-License-Identifier: Apache-2.0
"""The pipeline against the stock one, and the trajectories it returns against formulas."""

import copy
import inspect
import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from diffusers.callbacks import PipelineCallback, SD3CFGCutoffCallback
from peft import LoraConfig, inject_adapter_in_model

from tests.support.tiny import random_lora, tiny_pipeline
from trl_diffusion_opd import StableDiffusion3SDEPipeline, StableDiffusion3SDEPipelineOutput
from trl_diffusion_opd.models import family
from trl_diffusion_opd.sampling.transitions import SOLVERS


PROMPTS = ["a red circle on the table", "two cats beside a blue car"]
STOCHASTIC_SOLVERS = ("flow", "dance", "cps", "ddim")


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def stock() -> StableDiffusion3Pipeline:
    return quiet(tiny_pipeline())


@pytest.fixture(scope="module")
def ours(stock) -> StableDiffusion3SDEPipeline:
    return quiet(StableDiffusion3SDEPipeline.from_pipe(stock))


@pytest.fixture(scope="module")
def plain(stock) -> torch.Tensor:
    """The stock pipeline's images for the settings that most tests start from."""
    return stock(**settings()).images


@pytest.fixture
def module_counts(ours):
    """How often the VAE's decoder, the transformer and a text encoder have run."""
    counts = {"decoder": 0, "transformer": 0, "text_encoder": 0}
    modules = {"decoder": ours.vae.decoder, "transformer": ours.transformer, "text_encoder": ours.text_encoder}

    def counter(name):
        def hook(*_):
            counts[name] += 1

        return hook

    handles = [module.register_forward_hook(counter(name)) for name, module in modules.items()]
    yield counts
    for handle in handles:
        handle.remove()


def with_scheduler(pipe, **config):
    """A pipeline of the same class and models with another scheduler."""
    scheduler = FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **config})
    return quiet(type(pipe)(**{**pipe.components, "scheduler": scheduler}))


def draw_latents(batch_size: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch_size, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def settings(**kwargs) -> dict:
    common = {
        "num_inference_steps": 4,
        "guidance_scale": 4.5,
        "height": 16,
        "width": 16,
        "max_sequence_length": 16,
        "output_type": "pt",
        "latents": draw_latents(),
    }
    if "prompt_embeds" not in kwargs:
        common["prompt"] = PROMPTS
    return {**common, **kwargs}


def velocity(
    pipe, sample: torch.Tensor, timestep: torch.Tensor, guidance_scale: float, prompts=PROMPTS
) -> torch.Tensor:
    """The guided velocity, by two separate forwards."""

    def predict(texts):
        embeds, _, pooled, _ = pipe.encode_prompt(
            prompt=texts, prompt_2=None, prompt_3=None, do_classifier_free_guidance=False, max_sequence_length=16
        )
        return pipe.transformer(
            hidden_states=sample,
            timestep=timestep.expand(len(sample)),
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            return_dict=False,
        )[0]

    with torch.no_grad():
        negative, positive = predict([""] * len(prompts)), predict(prompts)
    return negative + guidance_scale * (positive - negative)


# --- The stock pipeline's images ---------------------------------------------------------------------------------


def images_of(stock, ours, **kwargs) -> torch.Tensor:
    """The images, after a check that both pipelines make the same."""
    expected = stock(**settings(**kwargs)).images
    images = ours(**settings(**kwargs)).images
    assert torch.equal(images, expected)
    assert images.std() > 0.05  # of something
    return images


def test_without_noise_the_images_are_the_stock_pipelines(stock, ours):
    assert images_of(stock, ours).shape == (2, 3, 16, 16)


@pytest.mark.parametrize(
    "changed",
    [
        {"guidance_scale": 1.0},
        {"guidance_scale": 0.5},
        {"guidance_scale": 9.0},
        {"prompt": PROMPTS[0], "latents": draw_latents(1, seed=1)},
        {"negative_prompt": ["sad old house", "dark night"]},
        {"negative_prompt": "sad old house", "negative_prompt_2": "dark night", "negative_prompt_3": "rain cup"},
        {"prompt_2": ["a cat", "a dog"], "prompt_3": ["a bird", "a horse"]},
        {"clip_skip": 1},
        {"max_sequence_length": 4},
        {"num_images_per_prompt": 2, "latents": draw_latents(4)},
        {"num_images_per_prompt": 2, "latents": draw_latents(4), "guidance_scale": 1.0},
        {"num_images_per_prompt": 2, "latents": draw_latents(4), "negative_prompt": ["sad house", "dark night"]},
        {"skip_guidance_layers": [0], "skip_layer_guidance_stop": 0.8},
        {"skip_guidance_layers": [0], "skip_layer_guidance_stop": 0.8, "skip_layer_guidance_scale": 1.0},
        {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.4, "skip_layer_guidance_stop": 1.0},
        {"sigmas": [1.0, 0.6, 0.3], "num_inference_steps": 3},
        {"num_inference_steps": 1},
        {"num_inference_steps": 10},
        {"latents": None, "generator": 3},
        {"latents": None, "generator": [3, 4]},
        {"height": 8, "width": 16, "latents": None, "generator": 3},
        {"num_images_per_prompt": 2, "latents": None, "generator": 3},
        {"num_images_per_prompt": 2, "latents": None, "generator": [3, 4, 5, 6]},
    ],
    ids=lambda changed: "-".join(changed),
)
def test_every_argument_acts_as_in_the_stock_pipeline(changed, stock, ours, plain):
    def arguments():
        seeds = changed.get("generator")
        if seeds is None:
            return changed
        generator = torch.Generator().manual_seed
        made = [torch.Generator().manual_seed(s) for s in seeds] if isinstance(seeds, list) else generator(seeds)
        return {**changed, "generator": made}

    expected = stock(**settings(**arguments())).images
    images = ours(**settings(**arguments())).images
    assert torch.equal(images, expected)
    assert images.shape != plain.shape or not torch.equal(images, plain)  # the argument does something


@pytest.mark.parametrize("inside", [True, False])
def test_skip_layer_guidance_applies_strictly_inside_its_window(inside, stock, ours, plain):
    # Of steps 0..3, `0 < 4 * 0.3 = 1.2` leaves 1 in and `4 * 0.25 = 1` leaves it out.
    window = {"skip_guidance_layers": [0], "skip_layer_guidance_stop": 0.3 if inside else 0.25}
    images = images_of(stock, ours, **window)
    assert torch.equal(images, plain) != inside


def test_skip_layer_guidance_needs_classifier_free_guidance(stock, ours):
    images = images_of(stock, ours, guidance_scale=1.0, skip_guidance_layers=[0], skip_layer_guidance_stop=0.8)
    assert torch.equal(images, ours(**settings(guidance_scale=1.0)).images)


def test_embeddings_may_be_given_instead_of_prompts(stock, ours):
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    with torch.no_grad():
        encoded = stock.encode_prompt(
            prompt=PROMPTS,
            prompt_2=None,
            prompt_3=None,
            negative_prompt=["dark night", "dark night"],
            max_sequence_length=16,
        )
    embedded = images_of(stock, ours, **dict(zip(names, encoded, strict=True)))
    assert torch.equal(embedded, ours(**settings(negative_prompt="dark night")).images)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"mu": 2.0}, {"mu": 0.0}, {"mu": 2.0, "sigmas": [1.0, 0.6, 0.3], "num_inference_steps": 3}],
    ids=["from-patches", "mu", "mu-zero", "mu-sigmas"],
)
def test_dynamic_shifting_is_the_stock_pipelines(arguments, stock, ours, plain):
    config = {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64}
    images = images_of(with_scheduler(stock, **config), with_scheduler(ours, **config), **arguments)
    assert not torch.equal(images, plain)


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_lora_scale_of_joint_attention_kwargs_is_heard(part, stock, ours, plain):
    if part == "transformer":
        config, state_dict = random_lora(scale=0.3)
    else:
        config, state_dict = LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), None
    model = copy.deepcopy(stock.components[part])
    with torch.random.fork_rng(devices=[]):
        # Not `add_adapter`: transformers 5.24 refuses the newest PEFT that there is, 0.21.2.
        inject_adapter_in_model(config, model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and state_dict is None:
                parameter.normal_(0.0, 0.5, generator=generator)
            elif "lora_" in name:
                parameter.copy_(state_dict[name.replace(".default", "")])
    pipes = [quiet(type(pipe)(**{**pipe.components, part: model})) for pipe in (stock, ours)]
    images = [images_of(*pipes, joint_attention_kwargs=kwargs) for kwargs in (None, {"scale": 0.5}, {"scale": 0.0})]
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(images[1], images[2])
    assert torch.equal(images[2], plain)


@pytest.mark.parametrize("output_type", ["pil", "np", "latent"])
def test_every_output_type_is_the_stock_pipelines(output_type, stock, ours):
    expected = stock(**settings(output_type=output_type)).images
    images = ours(**settings(output_type=output_type)).images
    assert type(images) is type(expected)
    if output_type == "pil":
        images, expected = ([np.asarray(image) for image in side] for side in (images, expected))
        assert images[0].shape == (16, 16, 3)
    assert np.array_equal(np.asarray(images), np.asarray(expected))


# --- Callbacks ---------------------------------------------------------------------------------------------------


def test_callback_is_told_what_the_stock_pipeline_tells_it(stock, ours):
    def recorder(record):
        def callback(pipe, index, timestep, kwargs):
            record.append((index, timestep.item(), pipe.num_timesteps, pipe.guidance_scale, dict(kwargs)))
            return {}

        return callback

    names = ["latents", "prompt_embeds", "pooled_prompt_embeds"]
    records = [], []
    for pipe, record in zip((stock, ours), records, strict=True):
        pipe(**settings(callback_on_step_end=recorder(record), callback_on_step_end_tensor_inputs=names))
    assert len(records[1]) == 4
    for expected, told in zip(*records, strict=True):
        assert told[:4] == expected[:4]
        assert list(told[4]) == names
        for name in names:
            assert torch.equal(told[4][name], expected[4][name]), (told[0], name)


def replace_latents(pipe, index, timestep, kwargs):
    return {"latents": kwargs["latents"] * 0.5 + 0.1} if index == 1 else {}


def change_latents_in_place(pipe, index, timestep, kwargs):
    kwargs["latents"].mul_(0.5)
    return {}


def change_texts(pipe, index, timestep, kwargs):
    return {name: tensor.flip(-1) for name, tensor in kwargs.items()} if index == 1 else {}


def change_guidance(pipe, index, timestep, kwargs):
    pipe._guidance_scale = 2.0
    return {}


def end_guidance(pipe, index, timestep, kwargs):
    if index != 1:
        return {}
    pipe._guidance_scale = 0.0
    return {name: tensor.chunk(2)[1] for name, tensor in kwargs.items()}


def change_skip_layer_guidance(pipe, index, timestep, kwargs):
    pipe._skip_layer_guidance_scale = 0.5
    return {}


def interrupt(pipe, index, timestep, kwargs):
    pipe._interrupt = index == 1
    return {}


class Halve(PipelineCallback):
    tensor_inputs = ["latents"]

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        return {"latents": callback_kwargs["latents"] * 0.5}


TEXTS = ["prompt_embeds", "pooled_prompt_embeds"]


@pytest.mark.parametrize(
    ("callback", "tensor_inputs", "arguments"),
    [
        (replace_latents, ["latents"], {}),
        (change_latents_in_place, ["latents"], {}),
        (change_texts, TEXTS, {}),
        (change_guidance, [], {}),
        (end_guidance, TEXTS, {}),
        (change_skip_layer_guidance, [], {"skip_guidance_layers": [0], "skip_layer_guidance_stop": 0.8}),
        (interrupt, [], {}),
        (Halve(), None, {}),
        (
            SD3CFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1),
            None,
            {"prompt": PROMPTS[:1], "latents": draw_latents(1)},
        ),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_a_callback_has_the_effect_it_has_in_the_stock_pipeline(callback, tensor_inputs, arguments, stock, ours):
    inputs = {} if tensor_inputs is None else {"callback_on_step_end_tensor_inputs": tensor_inputs}
    images = images_of(stock, ours, callback_on_step_end=callback, **inputs, **arguments)
    assert not torch.equal(images, ours(**settings(**arguments)).images)


def test_latents_that_a_callback_returns_are_the_next_state(ours):
    untouched, changed = ours(**settings()), ours(**settings(callback_on_step_end=replace_latents))
    assert torch.equal(changed.latents[:, :2], untouched.latents[:, :2])
    assert torch.equal(changed.latents[:, 2], untouched.latents[:, 2] * 0.5 + 0.1)
    # The transition that was taken is still the solver's.
    assert torch.equal(changed.means[:, :2], untouched.means[:, :2])
    assert not torch.equal(changed.means[:, 2], untouched.means[:, 2])


@pytest.mark.parametrize("noise_level", [0.0, 0.7])
def test_latents_that_a_callback_changes_in_place_leave_the_means_alone(noise_level, ours):
    outputs = [
        ours(**settings(noise_level=noise_level, generator=torch.Generator().manual_seed(0), **callback))
        for callback in ({}, {"callback_on_step_end": change_latents_in_place})
    ]
    assert torch.equal(outputs[1].latents[:, 1], outputs[0].latents[:, 1] * 0.5)
    assert torch.equal(outputs[1].means[:, 0], outputs[0].means[:, 0])


def test_an_interrupted_rollout_returns_the_steps_it_took(ours):
    whole = ours(**settings())
    part = ours(**settings(callback_on_step_end=interrupt))
    assert torch.equal(part.latents, whole.latents[:, :3])
    assert torch.equal(part.means, whole.means[:, :2])
    assert part.log_probs.shape == (2, 2)
    # An interruption is over when the call is.
    assert torch.equal(ours(**settings()).images, whole.images)


# --- Trajectories ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("solver", "noise_level"), [*((s, 0.0) for s in SOLVERS), *((s, 0.7) for s in STOCHASTIC_SOLVERS)]
)
def test_output_has_the_shapes_of_its_documentation(solver, noise_level, ours):
    arguments = settings(num_images_per_prompt=2, latents=draw_latents(4), num_inference_steps=3)
    output = ours(**arguments, solver=solver, noise_level=noise_level, generator=torch.Generator().manual_seed(0))
    assert isinstance(output, StableDiffusion3SDEPipelineOutput)
    shapes = {field.name: tuple(getattr(output, field.name).shape) for field in fields(output)}
    assert shapes == {
        "images": (4, 3, 16, 16),
        "latents": (4, 4, 4, 8, 8),
        "log_probs": (4, 3),
        "means": (4, 3, 4, 8, 8),
        "stds": (3,),
        "sigmas": (4,),
        "timesteps": (3,),
    }
    for field in fields(output):
        tensor = getattr(output, field.name)
        assert tensor.dtype == torch.float32, field.name
        assert tensor.isfinite().all(), field.name
        assert not tensor.requires_grad, field.name


def test_the_tuple_has_the_fields_in_order(ours):
    output, values = ours(**settings()), ours(**settings(return_dict=False))
    assert [field.name for field in fields(output)] == [
        "images",
        "latents",
        "log_probs",
        "means",
        "stds",
        "sigmas",
        "timesteps",
    ]
    assert type(values) is tuple and len(values) == 7
    for value, field in zip(values, fields(output), strict=True):
        assert torch.equal(value, getattr(output, field.name))


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_rollout_without_noise_goes_from_mean_to_mean(solver, ours):
    output = ours(**settings(), solver=solver)
    assert torch.equal(output.latents[:, 0], draw_latents())
    assert torch.equal(output.latents[:, 1:], output.means)
    assert torch.equal(output.stds, torch.zeros(4))
    assert torch.equal(output.log_probs, torch.zeros(2, 4))


@pytest.mark.parametrize("solver", ["dance", "cps", "ddim", "dpm1"])
def test_first_order_solvers_without_noise_agree(solver, ours, plain):
    images = ours(**settings(), solver=solver).images
    torch.testing.assert_close(images, plain, rtol=0, atol=1e-4)


def test_dpm2_is_another_solver(stock, ours):
    images = ours(**settings(num_inference_steps=10), solver="dpm2").images
    assert (images - stock(**settings(num_inference_steps=10)).images).abs().max() > 1e-3


def test_trajectory_with_noise_is_that_of_eq_7(ours):
    noise_level = 0.7
    arguments = settings(num_inference_steps=10, noise_level=noise_level)
    output = ours(**arguments, generator=torch.Generator().manual_seed(5))

    published = [1.0, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0.0]
    assert output.sigmas.tolist() == pytest.approx(published, abs=5.1e-5)
    assert torch.equal(output.timesteps, 1000 * output.sigmas[:-1])
    stds = [0.700, 0.743, 0.536, 0.446, 0.392, 0.353, 0.319, 0.282, 0.225, 0.0063]
    assert output.stds.tolist() == pytest.approx(stds, abs=6e-4)

    sigmas = output.sigmas.double().tolist()
    noise = torch.Generator().manual_seed(5)
    for j in range(10):
        s, dt = sigmas[j], sigmas[j + 1] - sigmas[j]
        x = output.latents[:, j]
        v = velocity(ours, x, output.timesteps[j], 4.5).double()
        sigma_t = noise_level * math.sqrt(s / (1 - (sigmas[1] if s == 1 else s)))
        mean = (1 + sigma_t**2 / (2 * s) * dt) * x.double() + (1 + sigma_t**2 * (1 - s) / (2 * s)) * v * dt
        std = sigma_t * math.sqrt(-dt)
        torch.testing.assert_close(output.means[:, j].double(), mean, rtol=0, atol=1e-4)
        assert output.stds[j].item() == pytest.approx(std, rel=1e-5)
        expected = output.means[:, j] + std * torch.randn(2, 4, 8, 8, generator=noise)
        torch.testing.assert_close(output.latents[:, j + 1], expected, rtol=0, atol=1e-6)
        normal = torch.distributions.Normal(output.means[:, j], output.stds[j])
        log_prob = normal.log_prob(output.latents[:, j + 1]).flatten(1).mean(1)
        torch.testing.assert_close(output.log_probs[:, j], log_prob, rtol=0, atol=1e-3)


def test_the_generator_draws_the_latents_first_and_then_the_noise(ours):
    generator = torch.Generator().manual_seed(5)
    output = ours(**settings(latents=None, noise_level=0.7), generator=generator)
    reference = torch.Generator().manual_seed(5)
    assert torch.equal(output.latents[:, 0], torch.randn(2, 4, 8, 8, generator=reference))
    for j in range(4):
        noise = (output.latents[:, j + 1] - output.means[:, j]) / output.stds[j]
        torch.testing.assert_close(noise, torch.randn(2, 4, 8, 8, generator=reference), rtol=0, atol=1e-3)
    assert torch.equal(generator.get_state(), reference.get_state())


def test_with_its_own_generator_an_image_is_the_same_in_any_batch(ours):
    def rollout(rows):
        generators = [torch.Generator().manual_seed(10 + row) for row in rows]
        prompts = [PROMPTS[row] for row in rows]
        return ours(**settings(prompt=prompts, latents=None, noise_level=0.7, generator=generators))

    together = rollout([0, 1])
    for row in (0, 1):
        alone = rollout([row])
        torch.testing.assert_close(alone.latents, together.latents[row : row + 1], rtol=0, atol=1e-3)
        torch.testing.assert_close(alone.images, together.images[row : row + 1], rtol=0, atol=1e-3)
    assert (together.latents[0] - together.latents[1]).abs().max() > 0.1


def test_noise_changes_the_images(ours, plain):
    arguments = settings(noise_level=0.7)
    images = [ours(**arguments, generator=torch.Generator().manual_seed(seed)).images for seed in (0, 0, 1)]
    assert torch.equal(images[0], images[1])
    assert (images[0] - images[2]).abs().max() > 0.05
    assert (images[0] - plain).abs().max() > 0.05


@pytest.fixture(scope="module")
def half(stock) -> StableDiffusion3SDEPipeline:
    """All of it in bfloat16 but the VAE."""
    models = {name: part for name, part in stock.components.items() if isinstance(part, torch.nn.Module)}
    del models["vae"]
    copies = {name: copy.deepcopy(model).to(torch.bfloat16) for name, model in models.items()}
    return quiet(StableDiffusion3SDEPipeline(**{**stock.components, **copies}))


def test_half_precision_models_make_a_float32_trajectory(ours, half):
    output, full = (
        pipe(**settings(noise_level=0.7), generator=torch.Generator().manual_seed(0)) for pipe in (half, ours)
    )
    for tensor in (output.latents, output.means, output.log_probs, output.stds, output.sigmas, output.timesteps):
        assert tensor.dtype == torch.float32
        assert tensor.isfinite().all()
    assert torch.equal(output.latents[:, 0], draw_latents().bfloat16().float())
    assert not torch.equal(output.latents[:, 1:].bfloat16().float(), output.latents[:, 1:])
    assert (output.latents - full.latents).abs().mean() < 0.1 * full.latents.abs().mean()


def test_half_precision_velocities_are_guided_in_float32(half):
    output = half(**settings())
    with torch.no_grad():
        embeds, negative, pooled, negative_pooled = half.encode_prompt(
            prompt=PROMPTS, prompt_2=None, prompt_3=None, max_sequence_length=16
        )
        for j in range(4):
            x = output.latents[:, j]
            predicted = half.transformer(
                hidden_states=torch.cat([x, x]).bfloat16(),
                timestep=output.timesteps[j].expand(4),
                encoder_hidden_states=torch.cat([negative, embeds]),
                pooled_projections=torch.cat([negative_pooled, pooled]),
                return_dict=False,
            )[0]
            unconditional, conditional = predicted.double().chunk(2)
            guided = unconditional + 4.5 * (conditional - unconditional)
            expected = x.double() + (output.sigmas[j + 1] - output.sigmas[j]).double() * guided
            torch.testing.assert_close(output.means[:, j].double(), expected, rtol=0, atol=1e-5)


# --- Schedules, loading, signature -------------------------------------------------------------------------------


@pytest.mark.parametrize("noise_level", [0.0, 0.7])
def test_the_schedulers_state_is_left_alone(noise_level, ours):
    pipe = with_scheduler(ours)
    pipe.scheduler.set_timesteps(7)
    pipe.scheduler.step(torch.zeros(1, 2), pipe.scheduler.timesteps[0], torch.zeros(1, 2))
    before = copy.deepcopy(vars(pipe.scheduler))

    pipe(**settings(noise_level=noise_level), generator=torch.Generator().manual_seed(0))

    assert vars(pipe.scheduler).keys() == before.keys()
    for name, value in vars(pipe.scheduler).items():
        same = torch.equal(value, before[name]) if isinstance(value, torch.Tensor) else value == before[name]
        assert same, name
    assert len(pipe.scheduler.timesteps) == 7


def test_latent_output_decodes_nothing(ours, module_counts):
    output = ours(**settings(output_type="latent"))
    assert module_counts["decoder"] == 0
    assert torch.equal(output.images, output.latents[:, -1])
    images = ours(**settings()).images
    assert module_counts["decoder"] == 1
    with torch.no_grad():
        decoded = ours.decode_latents(output.images)
    assert torch.equal((decoded / 2 + 0.5).clamp(0, 1), images)


def test_images_are_decoded_in_parts(ours, module_counts, monkeypatch):
    latents = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = ours.decode_latents(latents)
        monkeypatch.setattr(family, "PIXELS_AT_ONCE", 2 * 16 * 16)
        parts = ours.decode_latents(latents)
    assert module_counts["decoder"] == 1 + 3
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
def test_one_forward_makes_a_step(guidance_scale, ours, module_counts):
    ours(**settings(guidance_scale=guidance_scale))
    assert module_counts["transformer"] == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": "euler"}, "`solver` must be one of flow, dance, cps, ddim, dpm1, dpm2, but is 'euler'"),
        ({"solver": "dpm2", "noise_level": 0.7}, "`solver='dpm2'` is deterministic and takes no noise"),
        ({"noise_level": -0.1}, "`noise_level` must be a finite number >= 0, but is -0.1"),
        ({"height": 17}, "`height` and `width` have to be divisible by"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "`callback_on_step_end_tensor_inputs` has to be in"),
    ],
)
def test_wrong_arguments_are_refused_before_any_model_runs(arguments, message, ours, module_counts):
    with pytest.raises(ValueError, match=message):
        ours(**settings(**arguments))
    assert module_counts == {"decoder": 0, "transformer": 0, "text_encoder": 0}


def test_from_pipe_shares_every_component(stock, ours):
    assert type(ours) is StableDiffusion3SDEPipeline
    assert ours.components.keys() == stock.components.keys()
    for name, component in stock.components.items():
        assert ours.components[name] is component, name


def test_a_saved_pipeline_loads_as_either_class(tmp_path, stock, ours, plain):
    for number, (saved, loaded_as) in enumerate(
        [(stock, StableDiffusion3SDEPipeline), (ours, StableDiffusion3SDEPipeline), (ours, StableDiffusion3Pipeline)]
    ):
        folder = tmp_path / str(number)
        saved.save_pretrained(folder)
        loaded = quiet(loaded_as.from_pretrained(folder))
        assert type(loaded) is loaded_as
        assert torch.equal(loaded(**settings()).images, plain)


def test_call_has_every_parameter_of_the_stock_pipeline_and_two_more():
    stock = inspect.signature(StableDiffusion3Pipeline.__call__).parameters
    ours = inspect.signature(StableDiffusion3SDEPipeline.__call__).parameters
    assert list(ours) == [*stock, "solver", "noise_level"]
    for name, parameter in stock.items():
        assert (ours[name].kind, ours[name].default) == (parameter.kind, parameter.default), name
    assert (ours["solver"].default, ours["noise_level"].default) == ("flow", 0.0)
