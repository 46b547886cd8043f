# SPDX-License-Identifier: Apache-2.0
"""SSR-Merge: the closed form in float64, from inputs that other hooks recorded, and the least squares that it solves."""

import math
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from tests.support.tiny import random_lora, tiny_inputs, tiny_transformer, velocity
from trl_diffusion_opd.lora.adapters import add_lora, lora_state_dict, use_adapter
from trl_diffusion_opd.lora.files import LoraWeights
from trl_diffusion_opd.lora.merging import lora_of, merge_adapters, set_adapter
from trl_diffusion_opd.lora.ssr import SSRStatistics, ssr_factors, ssr_router


QUERY, LATER, CONV = "transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_q", "pos_embed.proj"
LORAS = {
    "one": {"rank": 3, "alpha": 6, "targets": ["attn.to_q", "pos_embed.proj"]},
    "two": {"rank": 2, "alpha": 5, "targets": ["attn.to_q", "attn.to_k", "pos_embed.proj"], "use_rslora": True},
    "three": {"rank": 4, "alpha": 2, "targets": ["attn.to_q"]},
}
SCALES = {"one": 6 / 3, "two": 5 / math.sqrt(2), "three": 2 / 4}
NAMES = list(LORAS)
STUDENT = {"rank": 5, "alpha": 20, "targets": ["attn.to_q", "attn.to_k", "pos_embed.proj"]}


def transformer_with(loras, dtype=torch.float32):
    transformer = tiny_transformer().to(dtype)
    for seed, (name, options) in enumerate(loras.items()):
        add_lora(transformer, LoraWeights(*random_lora(seed=seed + 1, scale=0.3, **options)), name)
    return transformer


def factors_of(transformer, module):
    """`A_k` and `s_k B_k` of those that have the module, in float64."""
    found = {}
    for name in NAMES:
        state = lora_state_dict(transformer, name)
        if f"{module}.lora_A.weight" in state:
            a, b = (state[f"{module}.lora_{kind}.weight"].flatten(1).double().numpy() for kind in "AB")
            found[name] = a, SCALES[name] * b
    return found


@contextmanager
def recording(transformer, module):
    """Inputs `[tokens, in]` of the base layer of a module, patches of a convolution as PyTorch unfolds them."""
    layer, seen = transformer.get_submodule(module).base_layer, []

    def record(_, inputs):
        x = inputs[0].double()
        if module == CONV:
            x = torch.nn.functional.unfold(x, 2, stride=2).mT
        seen.append(x.flatten(0, -2).numpy())

    hook = layer.register_forward_pre_hook(record)
    yield seen
    hook.remove()


def closed_form(factors, inputs, ridge=1e-4):
    """The update, token by token from the definitions: `factors` and the inputs `[tokens, in]` by LoRA."""
    a, b = np.concatenate([own[0] for own in factors.values()]), np.concatenate([f[1] for f in factors.values()], 1)
    rank, total = len(a), sum(len(inputs[name]) for name in factors)
    starts = np.cumsum([0, *(len(own[0]) for own in factors.values())])
    correlation, guide = ridge * np.eye(rank), np.zeros((rank, rank))
    for k, name in enumerate(factors):
        for x in inputs[name]:
            z = a @ x
            correlation += np.outer(z, z) / total
            guide[starts[k] : starts[k + 1]] += np.outer(z[starts[k] : starts[k + 1]], z) / total
    return b @ guide @ np.linalg.inv(correlation) @ a


def assert_near(found, expected, tolerance):
    np.testing.assert_allclose(np.asarray(found), expected, rtol=0, atol=tolerance * np.abs(expected).max())


def product(factors):
    a, b = (factor.flatten(1).double().numpy() for factor in factors)
    return b @ a


# Forwards of each LoRA: numbers of samples, and seeds.
FORWARDS = {"one": [(2, 1), (1, 2)], "two": [(1, 3)], "three": [(2, 4)]}


def gather(transformer, modules=(QUERY, LATER, CONV), forwards=FORWARDS):
    """The statistics, and by LoRA and module what was seen."""
    statistics, seen = SSRStatistics(transformer, NAMES), {module: {} for module in modules}
    for name, batches in forwards.items():
        for module in modules:
            with recording(transformer, module) as inputs, torch.no_grad(), use_adapter(transformer, name):
                for number, seed in batches:
                    velocity(transformer, tiny_inputs(number, seed, dtype=transformer.dtype))
            seen[module][name] = np.concatenate(inputs)
        for number, seed in batches:
            with statistics.of(name):
                velocity(transformer, tiny_inputs(number, seed, dtype=transformer.dtype))
    return statistics, seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_closed_form(dtype):
    """Of LoRAs of other ranks and scalings, and another number of tokens each."""
    transformer = transformer_with(LORAS, dtype)
    statistics, seen = gather(transformer)
    found = ssr_factors(statistics)
    for module in (QUERY, LATER, CONV):
        factors = factors_of(transformer, module)
        assert len(found[module][0]) == sum(len(a) for a, _ in factors.values())
        assert_near(product(found[module]), closed_form(factors, seen[module]), 5e-7)
        plain = sum(b @ a for a, b in factors.values())
        assert np.abs(product(found[module]) - plain / len(factors)).max() > 0.1 * np.abs(plain).max()


def test_it_is_the_least_squares_solution():
    """No other `R` is nearer to what each LoRA does on what it sees, but for the ridge."""
    transformer = transformer_with(LORAS)
    statistics, seen = gather(transformer)
    found = ssr_factors(statistics)
    for module in (QUERY, LATER):
        factors = factors_of(transformer, module)
        wanted = np.concatenate([x @ (factors[name][1] @ factors[name][0]).T for name, x in seen[module].items()])
        x = np.concatenate(list(seen[module].values()))
        z = x @ found[module][0].double().numpy().T

        def error(update, x=x, wanted=wanted):
            return np.square(x @ update.T - wanted).sum()

        best = np.square(z @ np.linalg.lstsq(z, wanted, rcond=None)[0] - wanted).sum()
        parts = [b @ a for a, b in factors.values()]
        own = error(product(found[module]))
        assert best <= own < 1.002 * best
        assert own < 0.9 * min(error(sum(parts)), error(sum(parts) / 3), *map(error, parts))


def test_with_the_same_tokens_it_is_the_mean():
    """
    Exactly `C (C + 1e-4 I)^-1 / K` between the factors, with `C` the mean of `z z^T`. Only where the inputs do not depend
    on which LoRA is active are the tokens of the same prompts the same.
    """
    transformer = transformer_with(LORAS)
    statistics, seen = gather(transformer, forwards={name: [(4, 1), (3, 2)] for name in NAMES})
    found = ssr_factors(statistics)
    factors = factors_of(transformer, CONV)
    x = seen[CONV]["one"]
    assert all(np.array_equal(x, seen[CONV][name]) for name in factors)
    a, b = np.concatenate([f[0] for f in factors.values()]), np.concatenate([f[1] for f in factors.values()], 1)
    moment = (x @ a.T).T @ (x @ a.T) / len(x)
    assert_near(product(found[CONV]), b @ moment @ np.linalg.inv(moment + 1e-4 * np.eye(5)) @ a / 2, 2e-5)
    assert_near(product(found[CONV]), b @ a / 2, 2e-3)
    assert not np.allclose(seen[LATER]["one"], seen[LATER]["two"], atol=0.1)


def test_more_tokens_weigh_more():
    """Of the same inputs, `one` has three times as many."""
    transformer = transformer_with(LORAS)
    statistics, _ = gather(transformer, forwards={"one": [(4, 1)] * 3, "two": [(4, 1)], "three": [(1, 1)]})
    parts = factors_of(transformer, CONV)
    expected = sum(share * b @ a for share, (a, b) in zip((3 / 4, 1 / 4), parts.values(), strict=True))
    assert_near(product(ssr_factors(statistics)[CONV]), expected, 2e-3)


def test_loras_that_see_nothing_in_common_stay_whole():
    """Inputs in subspaces of their own: the router is the identity, and each LoRA does what it did alone."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 200, 4, generator=generator, dtype=torch.float64)
    correlation = torch.block_diag(*(part.mT @ part / 600 for part in x))
    router = ssr_router(correlation, correlation)
    torch.testing.assert_close(router, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-3)
    exact = correlation.numpy() @ np.linalg.inv(correlation.numpy() + 1e-4 * np.eye(12))
    np.testing.assert_allclose(router, exact, rtol=0, atol=1e-12)
    assert ssr_router(correlation.float(), correlation.float()).dtype == torch.float64


def test_a_module_of_one_lora_keeps_its_update():
    transformer = transformer_with(LORAS)
    statistics, _ = gather(transformer)
    found, alone = ssr_factors(statistics), "transformer_blocks.0.attn.to_k"
    ((a, b),) = factors_of(transformer, alone).values()
    assert_near(product(found[alone]), b @ a, 1e-6)
    assert found.keys() == statistics.sums.keys() and len(found) == 5


def test_it_becomes_an_adapter():
    """Exactly at the whole rank, by an SVD at a lower one; and what is exact draws what the LoRAs' mean would not."""
    transformer = transformer_with({**LORAS, "student": STUDENT, "wide": {**STUDENT, "rank": 12}})
    statistics, _ = gather(transformer)
    factors = ssr_factors(statistics)
    add_lora(transformer, lora_of(factors, "ssr"), "ssr")
    set_adapter(transformer, factors, "wide")
    set_adapter(transformer, factors, "student")
    with torch.no_grad():
        drawn = {}
        for name in ("ssr", "wide"):
            with use_adapter(transformer, name):
                drawn[name] = velocity(transformer, tiny_inputs())
        torch.testing.assert_close(drawn["ssr"], drawn["wide"], rtol=1e-4, atol=1e-5)
        merge_adapters(transformer, NAMES, "mean", "wide")
        with use_adapter(transformer, "wide"):
            assert (velocity(transformer, tiny_inputs()) - drawn["ssr"]).abs().max() > 0.01
    state = lora_state_dict(transformer, "student")
    u, s, vh = np.linalg.svd(product(factors[QUERY]))
    a, b = (state[f"{QUERY}.lora_{kind}.weight"].double().numpy() for kind in "AB")
    assert_near(20 / 5 * b @ a, (u[:, :5] * s[:5]) @ vh[:5], 1e-5)


def test_autocast_does_not_round_what_is_seen():
    transformer = transformer_with(LORAS)
    exact, rounded = (SSRStatistics(transformer, NAMES) for _ in range(2))
    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    for name in NAMES:
        with exact.of(name):
            transformer.get_submodule(QUERY)(x)
        with rounded.of(name), torch.autocast("cpu", torch.bfloat16):
            transformer.get_submodule(QUERY)(x)
    for kind in ("correlation", "guide"):
        assert getattr(exact.sums[QUERY], kind).equal(getattr(rounded.sums[QUERY], kind))
    assert exact.sums[QUERY].tokens == dict.fromkeys(NAMES, 40)


def test_the_model_is_as_it_was():
    transformer = transformer_with(LORAS)
    statistics = SSRStatistics(transformer, [*NAMES, "one"])
    before = velocity(transformer, tiny_inputs()).detach()
    with pytest.raises(RuntimeError, match="stop"), statistics.of("one"):
        assert not torch.is_grad_enabled() and (velocity(transformer, tiny_inputs()) - before).abs().max() > 0.01
        raise RuntimeError("stop")
    assert torch.is_grad_enabled() and velocity(transformer, tiny_inputs()).equal(before)
    # Two samples of 16 patches, once.
    assert statistics.sums[QUERY].tokens == {"one": 32, "two": 0, "three": 0}
    assert statistics.sums[QUERY].adapters == tuple(NAMES)
    assert not any(sums.layer._forward_pre_hooks for sums in statistics.sums.values())


def test_what_is_wrong():
    transformer = transformer_with({**LORAS, "dora": {"targets": ["attn.to_q"], "use_dora": True}})
    statistics = SSRStatistics(transformer, ["one", "two"])
    with pytest.raises(ValueError, match="'three' is none of those that are merged: one, two"):
        with statistics.of("three"):
            pass
    with statistics.of("one"):
        velocity(transformer, tiny_inputs())
    with pytest.raises(ValueError, match=r"no forward through '.*' with the LoRA 'two' .* `statistics.of\('two'\)`"):
        ssr_factors(statistics)
    with pytest.raises(ValueError, match=r"'dora' has magnitudes \(DoRA\)"):
        SSRStatistics(transformer, ["one", "dora"])
    with pytest.raises(ValueError, match="no adapter called 'four'"):
        SSRStatistics(transformer, ["one", "four"])
