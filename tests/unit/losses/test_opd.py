# SPDX-License-Identifier: Apache-2.0
"""The per-step objective against the paper's formulas, written out with sums and in float64."""

import copy
import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from tests.support.tiny import random_lora, tiny_inputs, tiny_transformer
from trl_diffusion_opd.losses.opd import divergence_weight, step_divergence
from trl_diffusion_opd.models.sd3 import StableDiffusion3
from trl_diffusion_opd.models.velocity import VelocityModel
from trl_diffusion_opd.sampling.denoising import Schedule, denoise, make_schedule
from trl_diffusion_opd.sampling.transitions import SOLVERS, Transition, transition


STOCHASTIC_SOLVERS = ("flow", "dance", "cps", "ddim")


def sd3_schedule(num_steps: int = 10) -> Schedule:
    return make_schedule(FlowMatchEulerDiscreteScheduler(shift=3.0), num_steps)


SIGMAS = sd3_schedule().sigmas.tolist()
STEPS = list(zip(SIGMAS[:-1], SIGMAS[1:], strict=True))
STEP_IDS = [f"step{j}" for j in range(len(STEPS))]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def step(solver: str, x, v, s: float, t: float, noise_level: float) -> Transition:
    return transition(solver, x, v, s, t, noise_level=noise_level, sigma_max=SIGMAS[1])


def papers_mean(x, v, s, t, noise_level):
    """Eq. 7."""
    sigma_t = noise_level * math.sqrt(s / (1 - (SIGMAS[1] if s == 1 else s)))
    dt = t - s
    return (1 + sigma_t**2 / (2 * s) * dt) * x + (1 + sigma_t**2 * (1 - s) / (2 * s)) * v * dt


def papers_step_loss(x, student, teacher, s, t, noise_level):
    """Eq. 11 of each sample, or Eq. 12 without noise: squared norms, so sums over the latent dimensions."""
    difference = papers_mean(x, student, s, t, noise_level) - papers_mean(x, teacher, s, t, noise_level)
    squared_norm = difference.square().flatten(1).sum(1)
    if noise_level == 0:
        return squared_norm / 2
    variance = noise_level**2 * s / (1 - (SIGMAS[1] if s == 1 else s)) * (s - t)
    return squared_norm / (2 * variance)


# --- Weights -----------------------------------------------------------------------------------------------------


def weights(noise_level: float) -> list[float]:
    """Of all steps but the last, which is not trained."""
    return [divergence_weight(step("flow", draw(1, 4), draw(1, 4), s, t, noise_level)).item() for s, t in STEPS[:-1]]


def test_weights_without_noise_are_half_the_squared_step_sizes():
    values = weights(0.0)
    assert values == pytest.approx([0.5 * (s - t) ** 2 for s, t in STEPS[:-1]], rel=1e-12)
    assert sum(values) == pytest.approx(0.0778, abs=5e-5)
    shares = [100 * value / sum(values) for value in values]
    assert shares == pytest.approx([1.0, 1.4, 2.0, 2.9, 4.4, 7.1, 12.1, 22.4, 46.6], abs=0.051)


def test_weights_with_noise_divide_by_the_variance_of_the_whole_step():
    values = weights(0.7)
    # Without `-dt` in the variance the sum would be 0.393.
    assert sum(values) == pytest.approx(1.72, abs=5e-3)
    shares = [100 * value / sum(values) for value in values]
    assert shares[:2] == pytest.approx([0.09, 0.18], abs=6e-3)
    assert shares[2:] == pytest.approx([0.5, 1.0, 2.0, 4.0, 8.3, 19.7, 64.1], abs=0.051)


def test_divergence_is_the_weighted_mean_square_of_the_velocities():
    student, teacher = draw(3, 4, 8, 8), draw(3, 4, 8, 8, seed=1)
    for s, t in STEPS:
        at = step("flow", draw(3, 4, 8, 8, seed=2), student, s, t, 0.7)
        expected = divergence_weight(at) * (student - teacher).square().mean((1, 2, 3))
        torch.testing.assert_close(step_divergence(student, teacher, at), expected, rtol=1e-12, atol=0)


# --- Eq. 11 and 12 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", STOCHASTIC_SOLVERS)
@pytest.mark.parametrize(("s", "t"), STEPS, ids=STEP_IDS)
def test_divergence_with_noise_is_the_kl_divergence_of_the_two_gaussians(solver, s, t):
    x, student, teacher = (draw(3, 4, 8, 8, seed=seed) for seed in range(3))
    ours, theirs = (step(solver, x, v, s, t, 0.7) for v in (student, teacher))
    assert torch.equal(ours.std, theirs.std)
    if ours.std == 0:
        assert solver in ("ddim", "cps") and t == 0
        return
    normals = (torch.distributions.Normal(at.mean, at.std) for at in (ours, theirs))
    expected = torch.distributions.kl_divergence(*normals).flatten(1).mean(1)
    torch.testing.assert_close(step_divergence(student, teacher, ours), expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize(
    ("solver", "noise_level", "steps"),
    [*((solver, 0.0, STEPS) for solver in SOLVERS), ("ddim", 0.7, STEPS[-1:]), ("cps", 0.7, STEPS[-1:])],
)
def test_divergence_where_the_std_is_zero_is_half_the_squared_distance_of_the_means(solver, noise_level, steps):
    x, student, teacher = (draw(3, 4, 8, 8, seed=seed) for seed in range(3))
    for s, t in steps:
        ours, theirs = (step(solver, x, v, s, t, noise_level) for v in (student, teacher))
        assert ours.std == 0
        expected = 0.5 * (ours.mean - theirs.mean).square().flatten(1).mean(1)
        torch.testing.assert_close(step_divergence(student, teacher, ours), expected, rtol=1e-9, atol=0)


def test_std_alone_decides_between_the_two():
    student, teacher = draw(2, 5), draw(2, 5, seed=1)
    mean_square = (student - teacher).square().mean(1)
    for std, expected in ((0.0, 0.5 * 0.09), (1e-3, 0.5 * 0.09 / 1e-6), (2.0, 0.5 * 0.09 / 4)):
        at = Transition(mean=student, std=torch.tensor(std).double(), coefficient=torch.tensor(-0.3).double())
        torch.testing.assert_close(step_divergence(student, teacher, at), expected * mean_square, rtol=1e-6, atol=0)


@pytest.mark.parametrize("solver", STOCHASTIC_SOLVERS)
def test_kl_is_the_expected_log_ratio_of_the_sampled_steps(solver):
    x, student = draw(1, 4000), draw(1, 4000, seed=1)
    teacher = student + 0.1 * draw(1, 4000, seed=2)
    at, theirs = (step(solver, x, v, *STEPS[6], 0.7) for v in (student, teacher))
    generator = torch.Generator().manual_seed(3)
    ratios = []
    for _ in range(200):
        action = at.sample(generator)
        ratios.append((at.log_prob(action) - theirs.log_prob(action)).item())
    ratios = torch.tensor(ratios)
    standard_error = ratios.std().item() / math.sqrt(len(ratios))
    divergence = step_divergence(student, teacher, at).item()
    assert 5 * standard_error < 0.3 * divergence  # or the next line would hold for anything
    assert ratios.mean().item() == pytest.approx(divergence, abs=5 * standard_error)


@pytest.mark.parametrize("noise_level", [0.0, 0.3, 0.7])
@pytest.mark.parametrize(("s", "t"), STEPS, ids=STEP_IDS)
def test_value_and_gradient_are_the_papers_divided_by_the_number_of_dimensions(noise_level, s, t):
    x, student, teacher = (draw(3, 4, 5, 6, seed=seed) for seed in range(3))
    student.requires_grad_()
    papers = papers_step_loss(x, student, teacher, s, t, noise_level)
    ours = step_divergence(student, teacher, step("flow", x, student, s, t, noise_level))

    torch.testing.assert_close(ours * (4 * 5 * 6), papers, rtol=1e-9, atol=0)
    # Unequal weights on the samples, so that each has to send its gradient to its own velocity.
    scale = torch.tensor([1.0, -2.0, 0.5]).double()
    (gradient,) = torch.autograd.grad((ours * scale).sum(), student)
    (expected,) = torch.autograd.grad((papers * scale).sum(), student)
    torch.testing.assert_close(gradient * (4 * 5 * 6), expected, rtol=1e-8, atol=1e-12)


# --- Students and teachers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_an_identical_teacher_gives_exactly_zero(dtype):
    x, v = draw(2, 4, 8, 8, dtype=dtype), draw(2, 4, 8, 8, seed=1, dtype=dtype)
    for solver in SOLVERS:
        for s, t in STEPS:
            student = v.clone().requires_grad_()
            at = step(solver, x, student, s, t, 0.7 if solver in STOCHASTIC_SOLVERS else 0.0)
            loss = step_divergence(student, v.clone(), at)
            loss.sum().backward()
            assert torch.equal(loss, torch.zeros_like(loss))
            assert torch.equal(student.grad, torch.zeros_like(v))


@pytest.mark.parametrize("noise_level", [0.0, 0.7])
def test_the_first_step_has_a_gradient_for_the_student_and_none_for_the_teacher(noise_level):
    x, student, teacher = (draw(2, 4, 8, 8, seed=seed, dtype=torch.float32).requires_grad_() for seed in range(3))
    loss = step_divergence(student, teacher, step("flow", x, student, *STEPS[0], noise_level))
    loss.sum().backward()
    assert loss.min() > 0
    assert student.grad.abs().min() > 0
    assert teacher.grad is None
    assert x.grad is None  # the state is a constant: no gradient of the loss goes through it


@pytest.mark.parametrize("noise_level", [0.0, 0.7])
def test_lora_gradients_are_those_of_the_papers_loss(noise_level):
    config, state_dict = random_lora(seed=1)
    student = tiny_transformer()
    student.add_adapter(copy.deepcopy(config))  # zero-effect, like a run's first step
    teacher = tiny_transformer()
    teacher.add_adapter(copy.deepcopy(config))
    parameters = dict(teacher.named_parameters())
    with torch.no_grad():
        for name, tensor in state_dict.items():
            parameters[name.replace(".weight", ".default.weight")].copy_(tensor)
    models = [VelocityModel(transformer.double(), StableDiffusion3()) for transformer in (student, teacher)]
    inputs = tiny_inputs(batch_size=2, dtype=torch.float64)
    x, s, t = inputs["hidden_states"], *STEPS[0]
    texts = [
        {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
        for embeds, pooled in (
            (inputs["encoder_hidden_states"], inputs["pooled_projections"]),
            (inputs["encoder_hidden_states"].flip(0), inputs["pooled_projections"].flip(0)),
        )
    ]
    student_velocity = models[0](x, torch.tensor(1000 * s), *texts, 4.5)
    with torch.no_grad():
        teacher_velocity = models[1](x, torch.tensor(1000 * s), *texts, 1.5)

    loss = step_divergence(student_velocity, teacher_velocity, step("flow", x, student_velocity, s, t, noise_level))
    expected = papers_step_loss(x, student_velocity, teacher_velocity, s, t, noise_level) / x[0].numel()
    trained = {name: p for name, p in student.named_parameters() if "lora_B" in name}
    gradients = torch.autograd.grad(loss.mean(), trained.values(), retain_graph=True)
    references = torch.autograd.grad(expected.mean(), trained.values())

    assert len(trained) > 10
    for name, gradient, reference in zip(trained, gradients, references, strict=True):
        # The last block drops what it makes of the text.
        unused = name.startswith(("transformer_blocks.1.attn.to_add_out", "transformer_blocks.1.attn.add_q_proj"))
        assert (gradient.abs().max() > 0) == (not unused), name
        torch.testing.assert_close(gradient, reference, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_velocities_are_subtracted_and_squared_in_float32(dtype):
    student = draw(2, 4, 16, 16, dtype=dtype)
    # Off by the last digit: below 1e-3, whose square float16 cannot hold.
    teacher = (student.float() * (1 + torch.finfo(dtype).eps)).to(dtype)
    at = step("flow", student, student, *STEPS[3], 0.0)
    s, t = STEPS[3]
    expected = 0.5 * (t - s) ** 2 * (student.double() - teacher.double()).square().flatten(1).mean(1)
    loss = step_divergence(student, teacher, at)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


def test_a_teacher_between_two_half_precision_numbers_is_not_rounded_to_one():
    student = torch.ones(1, 8, dtype=torch.bfloat16)
    teacher = torch.full((1, 8), 1.0 + 1e-3)  # bfloat16 would make this 1
    s, t = STEPS[3]
    for one, other in ((student, teacher), (teacher, student)):
        loss = step_divergence(one, other, step("flow", one, one, s, t, 0.0))
        assert loss.item() == pytest.approx(0.5 * (t - s) ** 2 * 1e-6, rel=1e-3)


def test_velocities_of_different_shapes_are_refused():
    student, teacher = draw(2, 4, 8, 8), draw(1, 4, 8, 8)
    at = step("flow", student, student, *STEPS[3], 0.7)
    with pytest.raises(ValueError, match=r"velocities of one shape, but got \(2, 4, 8, 8\) and \(1, 4, 8, 8\)"):
        step_divergence(student, teacher, at)


# --- Whole trajectories ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise_level", [0.0, 0.7])
@pytest.mark.parametrize("shape", [(4, 3, 5), (10, 4, 3, 5)], ids=["image", "video"])
def test_each_sample_of_each_step_has_its_own_value(shape, noise_level):
    # The video has as many channels as there are steps: a mixed-up axis would broadcast in silence.
    batch_size = 3
    states, students, teachers = (draw(batch_size, len(STEPS), *shape, seed=seed) for seed in range(3))
    columns = []
    for j, (s, t) in enumerate(STEPS):
        at = step("flow", states[:, j], students[:, j], s, t, noise_level)
        columns.append(step_divergence(students[:, j], teachers[:, j], at))
    values = torch.stack(columns, dim=1)

    assert values.shape == (batch_size, len(STEPS))
    for i in range(batch_size):
        for j, (s, t) in enumerate(STEPS):
            row = slice(i, i + 1)
            expected = papers_step_loss(states[row, j], students[row, j], teachers[row, j], s, t, noise_level)
            torch.testing.assert_close(values[i, j], expected[0] / math.prod(shape), rtol=1e-8, atol=0)


def test_the_loss_at_a_state_does_not_depend_on_the_noise_drawn_there():
    models = [VelocityModel(tiny_transformer(seed), StableDiffusion3()) for seed in (0, 1)]
    inputs = tiny_inputs(batch_size=2)
    texts = (
        {
            "prompt_embeds": inputs["encoder_hidden_states"],
            "pooled_prompt_embeds": inputs["pooled_projections"],
        },
        None,
    )
    schedule = sd3_schedule()

    def losses(seed: int) -> list[torch.Tensor]:
        def student(sample, timestep):
            return models[0](sample, timestep, *texts, 1.0)

        values = []
        generator = torch.Generator().manual_seed(seed)
        x = inputs["hidden_states"]
        for at in denoise(student, x, schedule, noise_level=0.7, generator=generator, num_steps=2):
            teacher = models[1](at.sample, schedule.timesteps[at.index], *texts, 1.0)
            values.append(step_divergence(at.velocity, teacher, at.transition))
        return values

    with torch.no_grad():
        one, other = losses(0), losses(1)
    assert torch.equal(one[0], other[0])  # the same state
    assert not torch.equal(one[1], other[1])  # where the noise led
