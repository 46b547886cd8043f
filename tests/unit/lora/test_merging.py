# SPDX-License-Identifier: Apache-2.0
"""Merges of LoRAs: each method entry by entry in float64, the best of a rank, and what an adapter then does."""

import math

import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch import nn

from tests.support.tiny import random_lora, tiny_inputs, tiny_transformer, velocity
from trl_diffusion_opd.lora.adapters import add_lora, base_only, lora_scaling, lora_state_dict, use_adapter
from trl_diffusion_opd.lora.files import LoraWeights
from trl_diffusion_opd.lora.merging import (
    DARE_DROP,
    METHODS,
    TIES_DENSITY,
    adds_up,
    factorize,
    lora_of,
    merge_adapters,
    merge_updates,
    merged_lora,
    set_adapter,
)


# A LoRA of each kind of scaling, on overlapping modules: `pos_embed.proj` is a convolution.
LORAS = {
    "plain": {"rank": 4, "alpha": 8, "targets": ["attn.to_q", "attn.to_v", "pos_embed.proj"]},
    "patterned": {
        "rank": 3,
        "alpha": 5,
        "targets": ["attn.to_q", "attn.to_k"],
        "rank_pattern": {"transformer_blocks.0.attn.to_q": 2},
        "alpha_pattern": {"transformer_blocks.1.attn.to_q": 7},
    },
    "rank-stabilized": {"rank": 5, "alpha": 3, "targets": ["attn.to_q", "pos_embed.proj"], "use_rslora": True},
}
NAMES = list(LORAS)
ALL = {"targets": ["attn.to_q", "attn.to_k", "attn.to_v", "pos_embed.proj"]}


def transformer_with(loras=LORAS, dtype=torch.float32):
    transformer = tiny_transformer().to(dtype)
    for seed, (name, options) in enumerate(loras.items()):
        add_lora(transformer, LoraWeights(*random_lora(seed=seed + 1, scale=0.3, **options)), name)
    return transformer


def scale_of(options, module):
    """By the definitions: alpha / rank, or alpha / sqrt(rank); the patterns are the ones above."""
    rank = options.get("rank_pattern", {}).get(module, options["rank"])
    alpha = options.get("alpha_pattern", {}).get(module, options["alpha"])
    return alpha / (math.sqrt(rank) if options.get("use_rslora") else rank)


def updates_of(transformer, name, options):
    """`s B A` by module in float64, convolutions as matrices."""
    state, found = lora_state_dict(transformer, name), {}
    for key, tensor in state.items():
        if key.endswith(".lora_A.weight"):
            module = key.removesuffix(".lora_A.weight")
            b = state[f"{module}.lora_B.weight"].flatten(1).double().numpy()
            found[module] = scale_of(options, module) * b @ tensor.flatten(1).double().numpy()
    return found


def ties(updates):
    """Place by place, with Python's own sorting: trim, elect, average."""
    trimmed = []
    for update in updates:
        kept = round(TIES_DENSITY * update.size)
        by_size = sorted((-abs(value), place) for place, value in enumerate(update.ravel()))
        mask = np.zeros(update.size, dtype=bool)
        mask[[place for _, place in by_size[:kept]]] = True
        trimmed.append(np.where(mask.reshape(update.shape), update, 0.0))
    merged = np.zeros(updates[0].shape)
    for place in np.ndindex(*merged.shape):
        values = [update[place] for update in trimmed if update[place] != 0]
        agreeing = [value for value in values if value * sum(values) > 0]
        merged[place] = np.mean(agreeing) if agreeing else 0.0
    return merged


def cut(update, rank):
    u, s, vh = np.linalg.svd(update, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def assert_near(found, expected, tolerance=2e-6):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    largest = expected.abs().max().item()
    torch.testing.assert_close(torch.as_tensor(found).double(), expected, atol=tolerance * largest, rtol=0)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Updates


def test_sum_and_mean():
    updates = [draw(6, 9, seed=k) for k in range(3)]
    assert_near(merge_updates(updates, "sum"), sum(update.numpy() for update in updates), 1e-14)
    assert_near(merge_updates(updates, "mean"), sum(update.numpy() for update in updates) / 3, 1e-14)


@pytest.mark.parametrize("number", [1, 2, 5])
def test_ties(number):
    updates = [draw(20, 30, seed=k) * (1 + k) for k in range(number)]
    merged = merge_updates(updates, "ties")
    assert_near(merged, ties([update.numpy() for update in updates]), 1e-14)
    assert (merged != 0).sum() >= TIES_DENSITY * 600


def test_ties_by_hand():
    """Of ten entries two stay in each update."""
    one, two, three = torch.zeros(2, 5), torch.zeros(2, 5), torch.zeros(2, 5)
    one[0] = torch.tensor([5.0, 4.0, 1.0, -1.0, 0.5])
    two[0] = torch.tensor([-7.0, 2.0, 0.0, 0.0, 0.5])
    three[0] = torch.tensor([1.0, 0.0, 0.0, 6.0, 0.5])
    three[1, 4] = -8.0
    # At the first place 5 - 7 elects minus; at the second 4 and 2 agree; the 1 and the 0.5s were trimmed.
    expected = torch.zeros(2, 5)
    expected[0, :4] = torch.tensor([-7.0, 3.0, 0.0, 6.0])
    expected[1, 4] = -8.0
    torch.testing.assert_close(merge_updates([one, two, three], "ties"), expected)
    torch.testing.assert_close(merge_updates([one, -one], "ties"), torch.zeros(2, 5))
    torch.testing.assert_close(merge_updates([torch.zeros(2, 5)] * 2, "ties"), torch.zeros(2, 5))


def test_dare_is_the_sum_on_average():
    updates = [draw(8, 10, seed=k) for k in range(3)]
    drawn = torch.stack([merge_updates(updates, "dare", seed=str(seed)) for seed in range(2000)])
    # An entry is 0 or twice itself, each with probability 1/2: its variance is its square.
    error = torch.stack(updates).square().sum(0).sqrt() / math.sqrt(2000)
    assert ((drawn.mean(0) - sum(updates)).abs() < 4.5 * error).all()
    torch.testing.assert_close(drawn.var(0), torch.stack(updates).square().sum(0), rtol=0.2, atol=0)


def test_dare_drops_each_entry_of_each_update_for_itself():
    updates = [torch.full((100, 100), 1.0), torch.full((100, 100), 10.0)]
    values, counts = merge_updates(updates, "dare", seed="x").unique(return_counts=True)
    scale = 1 / (1 - DARE_DROP)
    assert values.tolist() == [0.0, scale, 10 * scale, 11 * scale]
    assert all(abs(count - 2500) < 5 * math.sqrt(2500 * 0.75) for count in counts.tolist())


def test_dare_is_the_same_for_a_seed():
    updates = [draw(8, 10, seed=k) for k in range(2)]
    state = torch.get_rng_state()
    one, again, other = (merge_updates(updates, "dare", seed=seed) for seed in ("a", "a", "b"))
    assert one.equal(again) and not one.equal(other) and torch.get_rng_state().equal(state)


def test_half_precision_is_merged_in_float32():
    updates = [draw(6, 9, seed=k).bfloat16() for k in range(3)]
    merged = merge_updates(updates, "mean")
    assert merged.dtype == torch.float32
    assert_near(merged, sum(update.double() for update in updates) / 3, 1e-7)
    with pytest.raises(ValueError, match="merged by one of sum, mean, ties, dare, but not by 'soup'"):
        merge_updates(updates, "soup")


# Ranks


@pytest.mark.parametrize("shape", [(40, 70), (70, 40), (600, 30)])
def test_the_best_of_a_rank(shape):
    """The error is what the smallest singular values leave (Eckart and Young)."""
    update = draw(*shape)
    tail = np.linalg.svd(update.numpy(), compute_uv=False)[7:]
    a, b = factorize(update, 7)
    assert a.shape == (7, shape[1]) and b.shape == (shape[0], 7)
    assert torch.linalg.norm(update - b @ a) == pytest.approx(np.linalg.norm(tail), rel=1e-10)
    assert torch.linalg.matrix_norm(update - b @ a, 2) == pytest.approx(tail[0], rel=1e-10)
    # Both have the square roots of the singular values.
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))


def test_large_matrices_are_near_the_best_and_the_same_each_time():
    # What TIES and DARE leave is slow to decay: a signal of rank 24 and noise of a third of its size.
    signal = draw(640, 24) @ draw(24, 560, seed=1) / math.sqrt(24)
    update = signal + draw(640, 560, seed=2) / 3
    best = np.linalg.norm(np.linalg.svd(update.numpy(), compute_uv=False)[24:])
    state = torch.get_rng_state()
    a, b = factorize(update, 24)
    error = torch.linalg.norm(update - b @ a)
    assert best <= error * (1 + 1e-12) and error < 1.002 * best
    again = factorize(update, 24)
    assert torch.get_rng_state().equal(state) and a.equal(again[0]) and b.equal(again[1])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        assert factorize(update, 24)[0].equal(a)
    a, b = factorize(signal, 24)
    assert torch.linalg.norm(signal - b @ a) < 1e-10 * torch.linalg.norm(signal)
    # Nearly the whole rank, with more probes than columns.
    a, b = factorize(update[:, :530], 520)
    tail = np.linalg.svd(update[:, :530].numpy(), compute_uv=False)[520:]
    assert torch.linalg.norm(update[:, :530] - b @ a) == pytest.approx(np.linalg.norm(tail), rel=1e-10)


@pytest.mark.parametrize("size", [(30, 40), (600, 700)])
def test_directions_that_are_zero_are_left_out(size):
    update = (draw(size[0], 3) @ draw(3, size[1], seed=1)).float()
    a, b = factorize(update, 12)
    assert a.shape == (3, size[1]) and b.shape == (size[0], 3)
    assert_near(b @ a, update, 5e-6)
    a, b = factorize(torch.zeros(size), 12)
    assert len(a) == 1 and not a.any() and not b.any()


# Adapters


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_gets_the_merge_at_its_rank(method, dtype):
    """Another rank and alpha than any of the merged, patterns, rsLoRA, a convolution, a bfloat16 base."""
    transformer = transformer_with({**LORAS, "student": {"rank": 6, "alpha": 9, **ALL}}, dtype)
    updates = {name: updates_of(transformer, name, options) for name, options in LORAS.items()}
    merge_adapters(transformer, NAMES, method, "student")
    found = updates_of(transformer, "student", {"rank": 6, "alpha": 9})
    assert len(found) == 7 and {len(own) for own in updates.values()} == {5, 4, 3}
    for module, update in found.items():
        own = [updates[name].get(module, np.zeros_like(update)) for name in NAMES]
        if method == "dare":
            merged = merge_updates([torch.from_numpy(each).float() for each in own], "dare", seed=module).numpy()
        else:
            merged = {"sum": sum(own), "mean": sum(own) / 3, "ties": ties(own)}[method]
        assert np.linalg.matrix_rank(merged) > 6 or "to_q" not in module, "something is cut off"
        assert_near(update, cut(merged, 6), 1e-5)


def test_float32_factors_are_not_rounded_to_the_base():
    for dtype in (torch.float32, torch.bfloat16):
        transformer = transformer_with({**LORAS, "student": {"rank": 12, "alpha": 3, **ALL}}, dtype)
        merge_adapters(transformer, NAMES, "sum", "student")
        state = lora_state_dict(transformer, "student")
        assert {tensor.dtype for tensor in state.values()} == {torch.float32}
        updates = [updates_of(transformer, name, options) for name, options in LORAS.items()]
        found = updates_of(transformer, "student", {"rank": 12, "alpha": 3})
        for module, update in found.items():
            # bfloat16 would be off by 4e-3.
            assert_near(update, sum(own.get(module, 0) for own in updates), 3e-6)


def test_half_precision_factors_are_multiplied_in_float32():
    transformer = transformer_with({**LORAS, "student": {"rank": 12, "alpha": 3, **ALL}})
    for module in transformer.modules():
        for name in NAMES:
            if name in getattr(module, "scaling", {}):
                module.lora_A[name].bfloat16()
                module.lora_B[name].bfloat16()
    merge_adapters(transformer, NAMES, "sum", "student")
    updates = [updates_of(transformer, name, options) for name, options in LORAS.items()]
    for module, update in updates_of(transformer, "student", {"rank": 12, "alpha": 3}).items():
        assert_near(update, sum(own.get(module, 0) for own in updates), 3e-6)


def test_the_sum_draws_what_the_adapters_draw_together():
    transformer = transformer_with({**LORAS, "student": {"rank": 12, "alpha": 3, **ALL}})
    before = {name: lora_state_dict(transformer, name) for name in NAMES}
    before = {name: {key: tensor.clone() for key, tensor in state.items()} for name, state in before.items()}
    merge_adapters(transformer, NAMES, "sum", "student")
    with torch.no_grad():
        with use_adapter(transformer, *NAMES):
            together = velocity(transformer, tiny_inputs())
        with use_adapter(transformer, "student"):
            student = velocity(transformer, tiny_inputs())
        with base_only(transformer):
            base = velocity(transformer, tiny_inputs())
    assert (together - base).abs().max() > 0.1
    torch.testing.assert_close(student, together, rtol=1e-4, atol=2e-5)
    for name, state in before.items():
        assert all(lora_state_dict(transformer, name)[key].equal(tensor) for key, tensor in state.items())


def test_rank_that_is_left_can_learn():
    """With both factors zero a direction would have no gradient: `A` stays as it was drawn, and `B` is zero there."""
    one = {"one": {"rank": 2, "alpha": 2, "targets": ["attn.to_q"]}}
    two = {"two": {"rank": 3, "alpha": 4, "targets": ["attn.to_q"]}}
    transformer = transformer_with({**one, **two, "student": {"rank": 8, "alpha": 4, **ALL}})
    before = {key: tensor.clone() for key, tensor in lora_state_dict(transformer, "student").items()}
    merge_adapters(transformer, ["one", "two"], "sum", "student")
    after = lora_state_dict(transformer, "student")
    for key, tensor in after.items():
        used = 5 if "attn.to_q" in key else 0
        if "lora_B" in key:
            assert not tensor[:, used:].any() and tensor[:, :used].any() == (used > 0)
        else:
            assert tensor[used:].equal(before[key][used:]) and tensor[used:].any()
    for module in ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_v"):
        layer = transformer.get_submodule(module)
        layer.set_adapter("student")
        layer(torch.ones(1, 16)).sum().backward()
        assert layer.lora_B["student"].weight.grad.abs().amin() > 0


def test_a_merge_as_a_lora_of_its_own():
    transformer = transformer_with()
    updates = {name: updates_of(transformer, name, options) for name, options in LORAS.items()}
    ranks = {name: lora_state_dict(transformer, name) for name in NAMES}
    for method in ("sum", "mean", "ties"):
        weights = merged_lora(transformer, NAMES, method)
        add_lora(transformer, weights, method)
        assert set(lora_scaling(transformer, method).values()) == {1.0}
        found = updates_of(transformer, method, {"rank": 1, "alpha": 1})
        assert len(found) == 7
        for module, update in found.items():
            own = [updates[name].get(module, np.zeros_like(update)) for name in NAMES]
            rank = sum(
                len(state[f"{module}.lora_A.weight"]) for state in ranks.values() if f"{module}.lora_A.weight" in state
            )
            merged = {"sum": sum(own), "mean": sum(own) / 3, "ties": cut(ties(own), rank)}[method]
            assert len(weights.state_dict[f"{module}.lora_A.weight"]) == min(rank, *update.shape)
            assert_near(update, merged, 1e-5)
    parameters = [p for name, p in transformer.named_parameters() if ".ties." in name]
    assert parameters and not any(parameter.requires_grad for parameter in parameters)


def test_given_factors_are_set_exactly_or_cut():
    transformer = transformer_with(
        {
            "small": {"rank": 2, "alpha": 6, **ALL},
            "large": {"rank": 9, "alpha": 3, "use_rslora": True, **ALL},
        }
    )
    linear, conv = "transformer_blocks.1.attn.to_k", "pos_embed.proj"
    factors = {
        linear: (draw(5, 16).float(), draw(16, 5, seed=1).float()),
        conv: (draw(3, 4, 2, 2, seed=2).float(), draw(16, 3, 1, 1, seed=3).float()),
    }
    updates = {name: (b.flatten(1).double() @ a.flatten(1).double()).numpy() for name, (a, b) in factors.items()}
    set_adapter(transformer, factors, "large")
    state = lora_state_dict(transformer, "large")
    assert state[f"{linear}.lora_A.weight"][:5].equal(factors[linear][0])
    assert state[f"{conv}.lora_A.weight"][:3].equal(factors[conv][0])
    for name, rank, options in (
        ("large", 5, {"rank": 9, "alpha": 3, "use_rslora": True}),
        ("small", 2, {"rank": 2, "alpha": 6}),
    ):
        set_adapter(transformer, factors, name)
        for module, update in updates_of(transformer, name, options).items():
            if module in updates:
                assert_near(update, cut(updates[module], rank))
            else:
                assert not update.any()
    add_lora(transformer, lora_of(factors), "own")
    assert {name: own.shape for name, own in updates_of(transformer, "own", {"rank": 1, "alpha": 1}).items()} == {
        linear: (16, 16),
        conv: (16, 16),
    }
    for module, update in updates_of(transformer, "own", {"rank": 1, "alpha": 1}).items():
        assert_near(update, updates[module])


# What cannot be merged


def test_a_module_that_the_student_has_not():
    transformer = transformer_with({**LORAS, "student": {"targets": ["attn.to_q", "pos_embed.proj"]}})
    before = {key: tensor.clone() for key, tensor in lora_state_dict(transformer, "student").items()}
    with pytest.raises(
        ValueError, match="changes 'transformer_blocks.0.attn.to_k', which the LoRA 'student' does not"
    ):
        merge_adapters(transformer, NAMES, "sum", "student")
    with pytest.raises(ValueError, match="one of sum, mean, ties, dare, but not by 'soup'"):
        merge_adapters(transformer, ["rank-stabilized", "student"], "soup", "student")
    with pytest.raises(ValueError, match="no adapter called 'teacher'; it has: .*'student'"):
        merge_adapters(transformer, ["plain", "teacher"], "sum", "student")
    factors = {"proj_out": (draw(1, 16), draw(16, 1))}
    with pytest.raises(
        ValueError, match="What is merged changes 'proj_out', which the LoRA 'student' does not. Add it to"
    ):
        set_adapter(transformer, factors, "student")
    with pytest.raises(ValueError, match="no adapter called 'pupil'"):
        merge_adapters(transformer, NAMES, "sum", "pupil")
    assert all(lora_state_dict(transformer, "student")[key].equal(tensor) for key, tensor in before.items())


@pytest.mark.parametrize(
    ("options", "what"),
    [({"use_dora": True}, r"magnitudes \(DoRA\)"), ({"lora_bias": True}, "a bias")],
)
@pytest.mark.filterwarnings("ignore:Adapter .* LoRA tensor")
def test_more_than_factors(options, what):
    transformer = transformer_with({**LORAS, "more": {"targets": ["attn.to_q"], **options}})
    message = f"The LoRA 'more' has {what} at 'transformer_blocks.0.attn.to_q'.* Leave it out"
    for call in (
        lambda: merge_adapters(transformer, ["plain", "more"], "mean", "plain"),
        lambda: merge_adapters(transformer, ["rank-stabilized"], "mean", "more"),
        lambda: merged_lora(transformer, ["plain", "more"], "mean"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_other_layers():
    transformer = tiny_transformer()
    transformer.grouped, transformer.words = nn.Conv2d(4, 4, 3, groups=2), nn.Embedding(4, 4)
    for name, what in {"grouped": "a convolution in groups", "words": "embeddings"}.items():
        transformer.add_adapter(LoraConfig(r=2, target_modules=[name]), name)
        with pytest.raises(ValueError, match=f"The LoRA '{name}' has {what} at '{name}'"):
            merged_lora(transformer, [name], "sum")


def test_magnitudes_do_not_add_up():
    """Why they are refused: active together, PEFT's DoRA rescales what the adapters before it gave."""
    transformer = transformer_with(
        {"a": {"targets": ["attn.to_q"]}, "b": {"targets": ["attn.to_q"], "use_dora": True}}
    )
    layer, x = transformer.get_submodule("transformer_blocks.0.attn.to_q"), draw(5, 16).float()
    with torch.no_grad():

        def gain(*names):
            with use_adapter(transformer, *names):
                found = layer(x)
            with base_only(transformer):
                return found - layer(x)

        assert (gain("a", "b") - gain("a") - gain("b")).abs().max() > 0.1
        torch.testing.assert_close(gain("b", "a"), gain("a") + gain("b"), rtol=1e-4, atol=1e-5)
    assert adds_up(transformer, ["a"]) and not adds_up(transformer, ["a", "b"])
