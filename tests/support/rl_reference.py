# SPDX-License-Identifier: Apache-2.0
"""
Flow-GRPO, GRPO-Guard and DiffusionNFT written down once more from their formulas: literal log-densities, literal
ratios, one autograd pass for each step, plain gradient descent. Slow, in float64, without the trainers' code.
"""

import numpy as np
import torch

from trl_diffusion_opd.lora.adapters import base_only, use_adapter


def velocity(trainer, x, timestep, prompts):
    """Guided velocity of the active adapter, the two branches one after the other."""
    text = trainer.prompts.conditioning(prompts)
    timestep = timestep.expand(len(x)).double()

    def forward(prompt):
        embeds, pooled = prompt["prompt_embeds"].double(), prompt["pooled_prompt_embeds"].double()
        return trainer.transformer(x, embeds, pooled, timestep, return_dict=False)[0]

    positive = forward(text.positive)
    if trainer.args.guidance_scale <= 1:
        return positive
    negative = forward(text.negative)
    return negative + trainer.args.guidance_scale * (positive - negative)


def no_grad_velocity(trainer, x, timestep, prompts, adapter=None):
    """The same of an adapter, or of the base."""
    with torch.no_grad(), use_adapter(trainer.transformer, adapter) if adapter else base_only(trainer.transformer):
        return velocity(trainer, x, timestep, prompts)


def advantages(trainer, latents, batches, reward):
    """Standardised rewards of one task, 0 where a group has one reward only."""
    with torch.no_grad():
        vae = trainer.pipeline.vae
        decoded = vae.decode(latents.float() / vae.config.scaling_factor + vae.config.shift_factor).sample
    prompts = [prompt for batch in batches for prompt in batch.prompts]
    rewards = np.array(reward((decoded / 2 + 0.5).clamp(0, 1), prompts))
    groups = np.array(prompts)  # a prompt that is drawn twice is one group
    result = np.zeros(len(rewards))
    for group in set(groups):
        own = rewards[groups == group]
        scope = own if trainer.args.scale_rewards == "group" else rewards
        result[groups == group] = (own - own.mean()) / (scope.std() + 1e-4)
    clip = trainer.args.advantage_clip
    return torch.from_numpy(result.clip(-clip, clip))


def descend(trainer, loss):
    """One step of gradient descent on the student."""
    parameters = [p for name, p in trainer.transformer.named_parameters() if ".default." in name]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                parameter -= trainer.args.learning_rate * gradient


def per_image(x):
    return x.flatten(1).mean(1)


def like(values, x):
    return values.reshape(-1, *[1] * (x.ndim - 1))


def grpo_mean_and_std(args, sigmas, j, x, v):
    """Mean of a step, its standard deviation, and that per unit of time."""
    s, t = sigmas[j], sigmas[j + 1]
    dt = t - s
    if args.solver == "flow":
        rate = args.noise_level * (s / (1 - (sigmas[1] if s == 1 else s))) ** 0.5
        mean = x + (v + rate**2 / (2 * s) * (x + (1 - s) * v)) * dt
    else:
        rate = args.noise_level
        mean = x + dt * v + rate**2 / 2 * (x - (1 - s) * (x - s * v)) / s**2 * dt
    return mean, rate * (-dt) ** 0.5, rate


def log_density(x, mean, std):
    return per_image(-((x - mean) ** 2) / (2 * std**2) - np.log(std) - 0.5 * np.log(2 * np.pi))


def grpo_rollout(trainer, batch):
    """States, velocities, and the latents at the end."""
    args, sigmas, timesteps = trainer.args, trainer.schedule.sigmas.double().tolist(), trainer.schedule.timesteps
    generators = [torch.Generator().manual_seed(seed) for seed in batch.seeds]
    shape = trainer.latent_shape
    x = torch.stack([torch.randn(shape, generator=g) for g in generators]).double()
    states, velocities = [x], []
    for j in range(len(timesteps)):
        v = no_grad_velocity(trainer, x, timesteps[j], batch.prompts, "default")
        mean, std, _ = grpo_mean_and_std(args, sigmas, j, x, v)
        x = mean + std * torch.stack([torch.randn(shape, generator=g, dtype=torch.float64) for g in generators])
        states.append(x)
        velocities.append(v)
    return states, velocities


def grpo_loss(trainer, batch, states, velocities, advantage):
    """Mean over the trained steps, per image, and how many ratios were out of their range."""
    args, sigmas, timesteps = trainer.args, trainer.schedule.sigmas.double().tolist(), trainer.schedule.timesteps
    losses, clipped = [], 0
    for j in range(len(timesteps) - trainer.args.skip_last_steps):
        x, following, dt = states[j], states[j + 1], sigmas[j + 1] - sigmas[j]
        v = velocity(trainer, x, timesteps[j], batch.prompts)
        mean, std, rate = grpo_mean_and_std(args, sigmas, j, x, v)
        old_mean, _, _ = grpo_mean_and_std(args, sigmas, j, x, velocities[j])
        difference = log_density(following, mean, std) - log_density(following, old_mean, std)
        if args.loss_type == "grpo":
            ratio, weight = difference.exp(), 1.0
        else:
            bias = per_image((mean - old_mean) ** 2) / (2 * std**2)
            ratio = ((difference + bias) * std).exp()
            s = sigmas[j]
            weight = (1.0 if args.solver == "flow" else 1 + args.noise_level**2 * (1 - s) / (2 * s)) / -dt
        bounded = ratio.clamp(1 - args.epsilon, 1 + args.epsilon)
        loss = weight * torch.maximum(-advantage * ratio, -advantage * bounded)
        clipped += ((-advantage * bounded) > (-advantage * ratio)).sum().item()
        if args.beta:
            reference = no_grad_velocity(trainer, x, timesteps[j], batch.prompts)
            reference_mean, _, _ = grpo_mean_and_std(args, sigmas, j, x, reference)
            loss = loss + args.beta * per_image((mean - reference_mean) ** 2) / (2 * rate**2)
        losses.append(loss)
    return torch.stack(losses).mean(0), clipped


def train_grpo(trainer, reward, num_steps):
    """Trains in place of `trainer.train()`; returns the share of ratios that were clipped, by step."""
    trainer.prepare_prompts(0)
    clipped = []
    for first in range(0, num_steps, trainer.args.steps_per_rollout):
        steps = range(first, first + trainer.args.steps_per_rollout)
        batches = [batch for step in steps for batch in trainer.rounds.batches(step)]
        rollouts = [grpo_rollout(trainer, batch) for batch in batches]
        all_advantages = advantages(trainer, torch.cat([states[-1] for states, _ in rollouts]), batches, reward)
        shares = all_advantages.split([len(batch.prompts) for batch in batches])
        for batch, (states, velocities), advantage in zip(batches, rollouts, shares, strict=True):
            loss, count = grpo_loss(trainer, batch, states, velocities, advantage)
            useful = advantage != 0
            descend(trainer, loss[useful].sum() / useful.sum())
            clipped.append(count / (useful.sum().item() * (len(trainer.schedule) - trainer.args.skip_last_steps)))
    return clipped


def nft_rollout(trainer, batch):
    """Clean latents that the old policy draws by Euler steps."""
    sigmas, timesteps = trainer.schedule.sigmas.double(), trainer.schedule.timesteps
    generators = [torch.Generator().manual_seed(seed) for seed in batch.seeds]
    x = torch.stack([torch.randn(trainer.latent_shape, generator=g) for g in generators]).double()
    for j in range(len(timesteps)):
        x = x + (sigmas[j + 1] - sigmas[j]) * no_grad_velocity(trainer, x, timesteps[j], batch.prompts, "old")
    return x


def nft_loss(trainer, batch, clean, advantage):
    """Mean over the visited noise levels, per image."""
    args, sigmas, timesteps = trainer.args, trainer.schedule.sigmas.double(), trainer.schedule.timesteps
    r = (advantage / args.advantage_clip).clamp(-1, 1) / 2 + 0.5
    generators = [torch.Generator().manual_seed(seed + 1) for seed in batch.seeds]
    orders = torch.stack([torch.randperm(len(timesteps), generator=g) for g in generators])
    losses = []
    for j in range(len(timesteps) - trainer.args.skip_last_steps):
        t, timestep = like(sigmas[orders[:, j]], clean), timesteps[orders[:, j]]
        noise = torch.stack([torch.randn(clean.shape[1:], generator=g) for g in generators]).double()
        x_t = (1 - t) * clean + t * noise
        v = velocity(trainer, x_t, timestep, batch.prompts)
        v_old = no_grad_velocity(trainer, x_t, timestep, batch.prompts, "old")
        v_base = no_grad_velocity(trainer, x_t, timestep, batch.prompts)
        loss = args.kl_coef * per_image((v - v_base) ** 2)
        for implicit, share in (
            (args.nft_beta * v + (1 - args.nft_beta) * v_old, r),
            ((1 + args.nft_beta) * v_old - args.nft_beta * v, 1 - r),
        ):
            error = x_t - t * implicit - clean
            weight = per_image(error.detach().abs()).clamp(min=1e-5)
            loss = loss + args.advantage_clip * share / args.nft_beta * per_image(error**2 / like(weight, error))
        losses.append(loss)
    return torch.stack(losses).mean(0)


def train_nft(trainer, reward, num_steps, decay):
    """Trains in place of `trainer.train()`; `decay(n)` is that of the old policy after `n` steps."""
    trainer.prepare_prompts(0)
    named = dict(trainer.transformer.named_parameters())
    for first in range(0, num_steps, trainer.args.steps_per_rollout):
        kept = decay(first) if first else 0.0
        with torch.no_grad():
            for name, old in named.items():
                if ".old." in name:
                    old.copy_(kept * old + (1 - kept) * named[name.replace(".old.", ".default.")])
        steps = range(first, first + trainer.args.steps_per_rollout)
        batches = [batch for step in steps for batch in trainer.rounds.batches(step)]
        images = [nft_rollout(trainer, batch) for batch in batches]
        all_advantages = advantages(trainer, torch.cat(images), batches, reward)
        shares = all_advantages.split([len(batch.prompts) for batch in batches])
        for batch, clean, advantage in zip(batches, images, shares, strict=True):
            descend(trainer, nft_loss(trainer, batch, clean, advantage).mean())
