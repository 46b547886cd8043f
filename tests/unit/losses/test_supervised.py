# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning on the teachers' samples against flow matching written out in float64."""

import math

import pytest
import torch

from trl_diffusion_opd.losses.objective import Course, Prediction
from trl_diffusion_opd.losses.supervised import SFT
from trl_diffusion_opd.sampling.denoising import Schedule


SIGMAS = [1.0, 0.9, 0.7, 0.4, 0.0]


class Run:
    """A batch of given latents, and a student that is linear in its state and knows the time."""

    def __init__(self, clean: torch.Tensor, *, num_steps: int = 3, seeds: list[int] | None = None, half: bool = False):
        sigmas = torch.tensor(SIGMAS)
        self.schedule, self.num_steps = Schedule(sigmas, 1000 * sigmas[:-1]), num_steps
        self.queries = dict.fromkeys(range(num_steps), 1.0)
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds or range(len(clean))]
        self.draw, self.guidance_scale, self.targets = [0], 4.5, [1.0]
        self.clean, self.half = clean, half
        self.theta = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
        self.asked, self.steps_asked, self.velocities = [], [], []

    def student(self, sample: torch.Tensor, timestep: torch.Tensor) -> Prediction:
        self.asked.append((sample, timestep))
        times = (timestep / 1000).reshape(-1, *[1] * (sample.ndim - 1))
        velocity = self.theta[0] * sample + self.theta[1] * times + self.theta[2]
        if self.half:
            velocity = velocity.bfloat16()
        self.velocities.append(velocity)
        return Prediction(velocity)

    def target_samples(self, num_inference_steps: int) -> torch.Tensor:
        self.steps_asked.append(num_inference_steps)
        return self.clean


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def noise_of(run: Run, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Time and noise of what the student was asked, from the state `x_t = (1 - t) x_0 + t eps`."""
    sample, timestep = run.asked[index]
    t = (timestep / 1000).reshape(-1, *[1] * (sample.ndim - 1))
    return t, (sample - (1 - t) * run.clean) / t


@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (1, 4, 5, 6), (2, 4, 3, 5, 6)], ids=["image", "one", "video"])
def test_value_and_gradient_are_those_of_flow_matching(shape):
    run, dims = Run(draw(0, *shape)), math.prod(shape[1:])
    losses = list(SFT().losses(run))
    assert len(losses) == len(run.asked) == SFT().num_losses(len(run.queries)) == 3
    for index, loss in enumerate(losses):
        t, eps = noise_of(run, index)
        sample, timestep = run.asked[index]
        assert sample.shape == shape and timestep.shape == (shape[0],) and loss.value.shape == (shape[0],)
        assert sample.dtype == timestep.dtype == torch.float64 and not loss.metrics

        error = (run.theta[0] * sample + run.theta[1] * t + run.theta[2]).detach() - (eps - run.clean)
        expected = (error**2).flatten(1).sum(1) / dims
        torch.testing.assert_close(loss.value.detach(), expected, rtol=1e-9, atol=0)
        (gradient,) = torch.autograd.grad(loss.value.sum(), run.theta)
        parts = [sample, t.expand(shape), torch.ones(shape, dtype=torch.float64)]
        by_hand = torch.stack([2 * (error * part).sum() / dims for part in parts])
        torch.testing.assert_close(gradient, by_hand, rtol=1e-9, atol=0)


def test_times_are_logit_normal_and_the_noise_is_standard_normal():
    run = Run(draw(0, 1, 20).repeat(4000, 1), num_steps=1)
    list(SFT().losses(run))
    t, eps = noise_of(run, 0)
    logits = (t / (1 - t)).log()
    for values in (logits, eps):
        error = 1 / math.sqrt(values.numel())
        assert abs(values.mean().item()) < 5 * error
        assert abs(values.var().item() - 1) < 5 * math.sqrt(2) * error
        assert abs((values**4).mean().item() - 3) < 5 * math.sqrt(96) * error  # the fourth moment of a Gaussian
    assert abs((logits * eps.mean(1, keepdim=True)).mean().item()) < 5 / math.sqrt(4000 * 20)


def test_samples_steps_and_batches_have_noise_of_their_own():
    run = Run(draw(0, 1, 8).repeat(3, 1))
    list(SFT().losses(run))
    noises = [(t[i].item(), eps[i, 0].item()) for t, eps in map(noise_of, [run] * 3, range(3)) for i in range(3)]
    assert len({t for t, _ in noises}) == len({eps for _, eps in noises}) == 9

    alone = Run(run.clean[:1], seeds=[2])
    list(SFT().losses(alone))
    for (sample, timestep), (together, times) in zip(alone.asked, run.asked, strict=True):
        assert torch.equal(sample[0], together[2]) and torch.equal(timestep[0], times[2])


def test_the_expected_loss_is_least_at_the_velocity_of_the_data():
    """For data `N(m, c^2)`, `v(x) = E[eps - x_0 | x_t = x]` in closed form has no expected gradient."""
    m, c = 0.7, 0.5
    run = Run(m + c * draw(5, 4000, 8), num_steps=1)
    offset = torch.zeros(4000, 2, dtype=torch.float64, requires_grad=True)

    def student(sample: torch.Tensor, timestep: torch.Tensor) -> Prediction:
        t = timestep[:, None] / 1000
        centered = (sample - (1 - t) * m) / ((1 - t) ** 2 * c**2 + t**2)
        velocity = t * centered - (m + (1 - t) * c**2 * centered)
        return Prediction(velocity + offset[:, :1] + offset[:, 1:] * centered)

    def gradients() -> torch.Tensor:
        (loss,) = SFT().losses(run)
        return torch.autograd.grad(loss.value.sum(), offset)[0]

    run.student = student
    at_best = gradients()
    standard_error = at_best.std(0) / math.sqrt(4000)
    assert (at_best.mean(0).abs() < 5 * standard_error).all()
    with torch.no_grad():
        offset += 0.2
    assert (gradients().mean(0) > 10 * standard_error).all()  # or the bound would hold for anything


@pytest.mark.parametrize(("steps", "expected"), [(None, 4), (40, 40)])
def test_the_targets_are_sampled_once_and_in_as_many_steps_as_asked(steps, expected):
    run = Run(draw(0, 2, 8))
    list(SFT(num_inference_steps=steps).losses(run))
    assert run.steps_asked == [expected]


def test_losses_are_handed_out_one_by_one():
    run = Run(draw(0, 2, 8))
    for index, _ in enumerate(SFT().losses(run)):
        assert len(run.asked) == index + 1


def test_half_precision_velocities_are_compared_in_float32():
    run = Run(draw(0, 2, 64, dtype=torch.float32), num_steps=1, half=True)
    (loss,) = SFT().losses(run)
    t, eps = noise_of(run, 0)
    expected = (run.velocities[0].double() - (eps.double() - run.clean.double())).square().mean(1)
    assert loss.value.dtype == torch.float32
    torch.testing.assert_close(loss.value.detach().double(), expected.detach(), rtol=1e-4, atol=0)


def test_a_broken_latent_is_told_and_stays_alone():
    clean = draw(0, 3, 8)
    clean[1, 2] = math.nan
    for loss in SFT().losses(Run(clean)):
        assert loss.value.isfinite().tolist() == [True, False, True]


def test_guidance_is_refused_where_the_conditional_velocity_is_trained():
    SFT().check(Course("flow", 0.0, 1.0, has_branches=False))
    SFT().check(Course("flow", 0.0, 3.5, has_branches=False))  # guidance that is an input of the model
    SFT(guided=True).check(Course("flow", 0.0, 4.5, has_branches=True))
    words = r"`guidance_scale` is 4\.5\. Set it to 1 and `teacher_guidance_scale` to the teachers' own, or .*'guided': True"
    with pytest.raises(ValueError, match=words):
        SFT().check(Course("flow", 0.0, 4.5, has_branches=True))


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "10"])
def test_numbers_of_steps_that_are_none_are_refused(value):
    with pytest.raises(ValueError, match="`num_inference_steps` of the objective 'sft' must be a whole number of at"):
        SFT(num_inference_steps=value)


@pytest.mark.parametrize("value", [1, 0, "true", None])
def test_guided_is_true_or_false(value):
    with pytest.raises(ValueError, match="`guided` of the objective 'sft' must be true or false, but is"):
        SFT(guided=value)
