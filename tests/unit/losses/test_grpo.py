# SPDX-License-Identifier: Apache-2.0
"""The losses of Flow-GRPO, GRPO-Guard and DiffusionNFT against evaluations in float64 that were written from the papers."""

import math

import numpy as np
import pytest
import torch

from trl_diffusion_opd.losses.advantages import group_advantages
from trl_diffusion_opd.losses.grpo import (
    is_clipped,
    log_ratio,
    mean_shift,
    reference_divergence,
    step_weight,
    surrogate_loss,
)
from trl_diffusion_opd.losses.nft import nft_losses, noised, old_policy_decay, optimality_probability
from trl_diffusion_opd.sampling.transitions import transition


SIGMAS = [1.0, 0.9601, 0.7904, 0.2780, 0.0089]


def draw(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def two_policies(solver="flow", s=0.7904, t=0.2780, a=0.7, difference=0.01):
    """State, new and old velocity, the noise of the old policy's step, and both transitions, in float64."""
    x, v_old, noise = draw(0, 3, 4, 2, 2), draw(1, 3, 4, 2, 2), draw(2, 3, 4, 2, 2)
    v = v_old + difference * draw(3, 3, 4, 2, 2)
    new, old = (transition(solver, x, u, s, t, noise_level=a, sigma_max=SIGMAS[1]) for u in (v, v_old))
    return v, v_old, noise, new, old


class TestLogRatio:
    @pytest.mark.parametrize("solver", ["flow", "dance", "cps", "ddim"])
    @pytest.mark.parametrize(("s", "t"), [(1.0, 0.9601), (0.7904, 0.2780), (0.2780, 0.0089)])
    def test_grpo_is_the_difference_of_log_densities(self, solver, s, t):
        v, v_old, noise, new, old = two_policies(solver, s, t)
        reached = old.mean + old.std * noise
        expected = new.log_prob(reached) - old.log_prob(reached)
        got = log_ratio(mean_shift(v, v_old, new.coefficient), noise, new.std, loss_type="grpo")
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("solver", ["flow", "dance"])
    def test_ratio_norm_identity(self, solver):
        """(log p - log p_old + mean(dmu^2) / (2 s^2)) s = mean(dmu eps), for each sample alone."""
        v, v_old, noise, new, old = two_policies(solver)
        reached = old.mean + old.std * noise
        bias = (new.mean - old.mean).square().flatten(1).mean(1) / (2 * new.std**2)
        expected = (new.log_prob(reached) - old.log_prob(reached) + bias) * new.std
        got = log_ratio(mean_shift(v, v_old, new.coefficient), noise, new.std, loss_type="grpo_guard")
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-13)

    @pytest.mark.parametrize("loss_type", ["grpo", "grpo_guard"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_ratio_is_exactly_one_where_nothing_changed(self, loss_type, dtype):
        v, _, noise, _, _ = two_policies()
        v = v.to(dtype)
        step = transition("flow", v, v, 0.79, 0.28, noise_level=0.7, sigma_max=0.96)
        got = log_ratio(mean_shift(v, v.clone(), step.coefficient), noise.float(), step.std, loss_type=loss_type)
        assert torch.equal(got, torch.zeros(3))

    def test_ratio_norm_has_no_bias_and_grpo_has(self):
        shift = 0.05 * draw(5, 4000, 64)
        step = transition("flow", shift, shift, 0.79, 0.28, noise_level=0.7, sigma_max=0.96)
        noise = draw(6, 4000, 64)
        guard = log_ratio(shift, noise, step.std, loss_type="grpo_guard")
        plain = log_ratio(shift, noise, step.std, loss_type="grpo")
        assert abs(guard.mean()) < 4 * guard.std() / math.sqrt(4000)
        assert plain.mean() < -10 * plain.std() / math.sqrt(4000)


class TestSurrogate:
    @pytest.mark.parametrize("clip", [1e-4, 2e-6])
    def test_against_the_ratio_in_float64(self, clip):
        log = torch.tensor([-3.0, -1.5, -0.5, 0.0, 0.5, 1.5, 3.0], dtype=torch.float64) * clip
        log = log.repeat(2).requires_grad_()
        advantage = torch.tensor([1.7] * 7 + [-0.6] * 7, dtype=torch.float64)
        ratio = log.exp()
        expected = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))
        torch.testing.assert_close(surrogate_loss(log, advantage, clip), expected, rtol=1e-12, atol=0)
        (wanted,) = torch.autograd.grad(expected.sum(), log)
        (got,) = torch.autograd.grad(surrogate_loss(log, advantage, clip).sum(), log)
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)
        assert torch.equal(is_clipped(log, advantage, clip), wanted == 0)

    def test_float32_tells_apart_what_the_ratio_cannot(self):
        """One unit in the last place near 1 is 1.2e-7: with a range of 1e-8 every ratio would be on the bound."""
        log = torch.tensor([0.9e-8, 1.1e-8])
        assert torch.equal(log.exp(), torch.ones(2))
        assert is_clipped(log, torch.ones(2), 1e-8).tolist() == [False, True]

    def test_gradient_reweighting_gives_all_steps_one_scale(self):
        """d(loss) / dv of GRPO-Guard at the first pass is the same for every step of the schedule."""
        gradients = []
        for s, t in zip(SIGMAS[:-1], SIGMAS[1:], strict=True):
            v_old, noise = draw(1, 2, 4, 2, 2), draw(2, 2, 4, 2, 2)
            v = v_old.clone().requires_grad_()
            step = transition("flow", v, v, s, t, noise_level=0.7, sigma_max=SIGMAS[1])
            log = log_ratio(mean_shift(v, v_old, step.coefficient), noise, step.std, loss_type="grpo_guard")
            loss = surrogate_loss(log, torch.tensor([1.0, -2.0]), 1e-6) * step_weight(
                "flow", s, t, 0.7, loss_type="grpo_guard"
            )
            gradients.append(torch.autograd.grad(loss.sum(), v)[0])
        # At sigma = 1 the stand-in of the schedule changes the coefficient.
        for gradient in gradients[2:]:
            torch.testing.assert_close(gradient, gradients[1], rtol=1e-9, atol=0)
        advantage = torch.tensor([1.0, -2.0], dtype=torch.float64).reshape(2, 1, 1, 1)
        expected = advantage * (1 + 0.7**2 / 2) * draw(2, 2, 4, 2, 2) / 16
        torch.testing.assert_close(gradients[1], expected, rtol=1e-9, atol=0)
        assert step_weight("flow", 0.8, 0.3, 0.7, loss_type="grpo") == 1
        assert step_weight("dance", 0.8, 0.3, 0.7, loss_type="grpo_guard") == pytest.approx(
            (1 + 0.49 * 0.2 / 1.6) / 0.5
        )

    def test_reference_divergence(self):
        v, v_ref, _, new, ref = two_policies(s=0.79, t=0.28)
        got = reference_divergence(mean_shift(v, v_ref, new.coefficient), new.std, 0.79, 0.28)
        std_dev_t = 0.7 * math.sqrt(0.79 / (1 - 0.79))
        expected = (new.mean - ref.mean).square().flatten(1).mean(1) / (2 * std_dev_t**2)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=0)


class TestAdvantages:
    REWARDS = torch.tensor([0.0, 1.0, 0.5, 0.5, 20.0, 26.0, 22.0, 22.0])
    GROUPS = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    TASKS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])

    def test_each_task_has_statistics_of_its_own(self):
        got = group_advantages(self.REWARDS, self.GROUPS, self.TASKS)
        small, large = np.std([0, 1, 0.5, 0.5]) + 1e-4, np.std([20, 26, 22, 22]) + 1e-4
        expected = [-0.5 / small, 0.5 / small, 0, 0, -3 / large, 3 / large, 0, 0]
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-12)
        # alone, a task has the same advantages as together with the other
        alone = group_advantages(self.REWARDS[:4], self.GROUPS[:4], self.TASKS[:4])
        assert torch.equal(alone, got[:4])

    def test_scales(self):
        got = group_advantages(self.REWARDS, self.GROUPS, self.TASKS, scale="group")
        np.testing.assert_allclose(got.numpy()[:2], [-0.5 / (0.5 + 1e-4), 0.5 / (0.5 + 1e-4)])
        assert group_advantages(self.REWARDS, self.GROUPS, self.TASKS, scale="none").tolist()[4:6] == [-3, 3]
        with pytest.raises(ValueError, match="`scale_rewards` must be one of task, group, none, but is 'batch'"):
            group_advantages(self.REWARDS, self.GROUPS, self.TASKS, scale="batch")

    def test_equal_rewards_give_exactly_zero(self):
        rewards = torch.full((24,), 0.1) + 0.2  # whose float mean is not what each of them is
        zeros = torch.zeros(24, dtype=torch.long)
        assert group_advantages(rewards, zeros, zeros).tolist() == [0.0] * 24

    def test_a_failed_score_changes_nothing_for_the_others(self):
        rewards = torch.tensor([0.0, 1.0, torch.nan, 0.3])
        got = group_advantages(rewards, torch.tensor([0, 0, 0, 1]), torch.zeros(4, dtype=torch.long))
        std = np.std([0, 1, 0.3]) + 1e-4
        np.testing.assert_allclose(got.numpy(), [-0.5 / std, 0.5 / std, 0, 0], rtol=1e-6)
        failed = torch.full((2,), torch.nan)
        assert group_advantages(failed, torch.zeros(2), torch.zeros(2)).tolist() == [0, 0]


class TestForwardProcess:
    @pytest.mark.parametrize("beta", [1.0, 0.1])
    def test_against_numpy(self, beta):
        v, v_old, v_ref, x_0, eps = (draw(i, 3, 2, 2, 2) for i in range(5))
        t, r = torch.tensor([0.9, 0.5, 0.1]).double(), torch.tensor([1.0, 0.3, 0.0]).double()
        x_t = noised(x_0, eps, t)
        v.requires_grad_()
        policy, divergence = nft_losses(v, v_old, v_ref, x_t, x_0, t, r, beta=beta)
        for i in range(3):
            tt, rr = t[i].item(), r[i].item()
            state = (1 - tt) * x_0[i].numpy() + tt * eps[i].numpy()
            new, old = v[i].detach().numpy(), v_old[i].numpy()
            total = 0
            for sign, share in ((1, rr), (-1, 1 - rr)):
                implicit = old + sign * beta * (new - old)
                error = (state - tt * implicit) - x_0[i].numpy()
                total += share * np.mean(error**2) / max(1e-5, np.mean(np.abs(error))) / beta
            assert policy[i].item() == pytest.approx(total, rel=1e-12)
            assert divergence[i].item() == pytest.approx(np.mean((new - v_ref[i].numpy()) ** 2), rel=1e-12)

    def test_gradient_goes_to_a_good_image_and_away_from_a_bad_one(self):
        """At v = v_old the weights are constants: the gradient is (2 r - 1) (-2 t / (D W)) (x_0_hat - x_0)."""
        v_old, x_0, eps = (draw(i, 2, 2, 2, 2) for i in range(3))
        t = torch.tensor([0.6, 0.6], dtype=torch.float64)
        x_t = noised(x_0, eps, t)
        v = v_old.clone().requires_grad_()
        policy, _ = nft_losses(v, v_old, v_old, x_t, x_0, t, torch.tensor([1.0, 0.0]), beta=0.1)
        (gradient,) = torch.autograd.grad(policy.sum(), v)
        error = x_t - 0.6 * v_old - x_0
        weight = error.abs().flatten(1).mean(1).reshape(2, 1, 1, 1)
        sign = torch.tensor([1.0, -1.0], dtype=torch.float64).reshape(2, 1, 1, 1)
        expected = sign * -2 * 0.6 / (8 * weight) * error
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=0)

    def test_a_perfect_estimate_does_not_divide_by_zero(self):
        x_0, eps = draw(0, 1, 2, 2, 2), draw(1, 1, 2, 2, 2)
        t, true = torch.tensor([0.5]).double(), eps - x_0
        policy, _ = nft_losses(true, true, true, noised(x_0, eps, t), x_0, t, torch.ones(1), beta=1.0)
        assert torch.isfinite(policy).all() and policy.item() < 1e-9

    def test_optimality_probability(self):
        advantage = torch.tensor([-9.0, -5.0, -2.5, 0.0, 2.5, 9.0])
        assert optimality_probability(advantage).tolist() == [0, 0, 0.25, 0.5, 0.75, 1]

    def test_old_policy_schedules(self):
        assert [old_policy_decay(0, n) for n in (0, 1000)] == [0, 0]
        assert [old_policy_decay(1, n) for n in (0, 100, 500, 9999)] == pytest.approx([0, 0.1, 0.5, 0.5])
        assert [old_policy_decay(2, n) for n in (0, 74, 75, 85, 9999)] == pytest.approx([0, 0, 0, 0.075, 0.999])
