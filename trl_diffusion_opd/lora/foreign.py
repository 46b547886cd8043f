# SPDX-License-Identifier: Apache-2.0
"""LoRAs of other programs (kohya, ComfyUI, ai-toolkit, LyCORIS) as the tensors that diffusers would have."""

from collections.abc import Iterable, Mapping

import torch
from peft import LoraConfig

from .fused import Update, split
from .names import NameTable
from .options import module_alpha, module_rank
from .products import loha, lokr
from .writing import DIFFUSERS_PREFIX


# End of a tensor's name -> what it is. The longest that fits counts.
_DOWN, _UP, _MAGNITUDE = "lora_down", "lora_up", "dora_scale"
_KINDS = {
    **{f".{kind}": kind for kind in ("alpha", _MAGNITUDE, "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")},
    **{f".lokr_w{number}{end}": f"lokr_w{number}{end}" for number in (1, 2) for end in ("", "_a", "_b")},
    **{
        f".{kind}.weight": _DOWN
        for kind in ("lora_A", "lora_down", "lora.down", "lora_A.default", "lora_linear_layer.down", "down")
    },
    **{
        f".{kind}.weight": _UP
        for kind in ("lora_B", "lora_up", "lora.up", "lora_B.default", "lora_linear_layer.up", "up")
    },
    ".lora_magnitude_vector": _MAGNITUDE,
    ".lora_magnitude_vector.weight": _MAGNITUDE,
}
_MERGE = "Merge it into its base and pass the full model."
_FULL = f"which changes weights directly and is no product of small matrices. {_MERGE}"
_CONVOLUTION = f"a decomposition for convolutions, which the transformer does not have. {_MERGE}"
_REFUSED = {
    **dict.fromkeys((".diff", ".diff_b", ".set_weight", ".w_norm", ".b_norm", ".reshape_weight"), _FULL),
    **dict.fromkeys((".lora_mid.weight", ".hada_t1", ".hada_t2", ".lokr_t2"), _CONVOLUTION),
}
_PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "lora_transformer_",
    "lora_unet_",
    "lycoris_",
)
TEXT_ENCODERS = (
    "text_encoder",
    "lora_te",
    "lycoris_text",
    "lycoris_te",
    "lora_clip",
    "clip_",
    "t5xxl",
    "cond_stage_model",
    "conditioner",
)


def is_foreign(names: Iterable[str]) -> bool:
    """Whether a name is one that other programs give to a LoRA's tensors, and this package and diffusers do not."""
    own = (".lora_A.weight", ".lora_B.weight", ".alpha", ".lora_magnitude_vector", None)
    return any(not name.startswith(DIFFUSERS_PREFIX) or _kind(name) not in own for name in names)


def to_diffusers(tensors: Mapping[str, torch.Tensor], table: NameTable) -> dict[str, torch.Tensor]:
    """
    Names the tensors of a LoRA as diffusers does, with `alpha` tensors; LoHa and LoKr become LoRAs of a larger rank.

    The product `alpha / rank * B @ A` of every module is what the other program has, of a fused projection of queries,
    keys and values that of each.

    Args:
        tensors (`Mapping[str, torch.Tensor]`):
            All tensors of a file.
        table ([`NameTable`]):
            The names of the family.

    Returns:
        `dict[str, torch.Tensor]`: the tensors of a diffusers file.

    Raises:
        `ValueError`: one that has no place or cannot be held exactly. No tensor is left out.
    """
    found = {}
    for module, kinds in _by_module(tensors).items():
        place = table.find(_without_prefix(module))
        if place is None:
            raise ValueError(
                f"holds a LoRA of {module!r}, which no module of this family is called. It was trained for another base "
                "model"
            )
        try:
            found[module] = split(_update(kinds), place)
        except ValueError as error:
            raise ValueError(f"has a LoRA of {module!r} that cannot be used: {error}") from error
    return _named(found)


def from_peft(state_dict: Mapping[str, torch.Tensor], config: LoraConfig) -> dict[str, torch.Tensor]:
    """
    Makes a LoRA of PEFT's LoHa or LoKr, with `alpha` tensors.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`):
            Its tensors, as `peft.get_peft_model_state_dict` names them.
        config (`LoraConfig`):
            Its ranks, alphas and patterns.

    Raises:
        `ValueError`: one that cannot be held exactly, or ranks that contradict the config.
    """
    found = {}
    for module, kinds in _by_module(state_dict).items():
        try:
            rank, (up, down) = _factors(kinds)
        except ValueError as error:
            raise ValueError(f"has an adapter of {module!r} that cannot be used: {error}") from error
        wanted = module_rank(config, module)
        if rank not in (None, wanted):
            raise ValueError(
                f"has the rank {rank} in {module!r}, but by its options the rank is {wanted}. Correct them"
            )
        found[module] = {module: Update(up, down, module_alpha(config, module) / wanted * down.shape[0])}
    return {name.removeprefix(DIFFUSERS_PREFIX): tensor for name, tensor in _named(found).items()}


def _by_module(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        end = _kind(name)
        if end in _REFUSED:
            raise ValueError(f"holds {name!r}, {_REFUSED[end]}")
        if end is None:
            raise ValueError(
                f"holds {name!r}, which is no tensor of a LoRA, LoHa, LoKr or DoRA that is known. If `load_lora_weights` "
                "of a diffusers pipeline can read it, load it there and save it with `save_lora_weights`"
            )
        kinds = modules.setdefault(name.removesuffix(end), {})
        if _KINDS[end] in kinds:
            raise ValueError(f"holds {name!r} twice, under two names. Remove one")
        kinds[_KINDS[end]] = tensor
    return modules


def _kind(name: str) -> str | None:
    ends = [end for end in (*_KINDS, *_REFUSED) if name.endswith(end) and len(name) > len(end)]
    return max(ends, key=len, default=None)


def _without_prefix(module: str) -> str:
    return module.removeprefix(next((prefix for prefix in _PREFIXES if module.startswith(prefix)), ""))


def _update(kinds: dict[str, torch.Tensor]) -> Update:
    """What the tensors of one module do to its weights."""
    kinds = dict(kinds)
    alpha, magnitude = kinds.pop("alpha", None), kinds.pop(_MAGNITUDE, None)
    rank, (up, down) = _factors(kinds)
    scale = 1.0 if alpha is None or rank is None else _number(alpha) / rank
    # With the same rank alpha is exactly the one of the file.
    value = _number(alpha) if alpha is not None and rank == down.shape[0] else scale * down.shape[0]
    return Update(up, down, value, None if magnitude is None else _magnitude(magnitude, up))


def _factors(kinds: dict[str, torch.Tensor]) -> tuple[int | None, tuple[torch.Tensor, torch.Tensor]]:
    """The rank by which alpha is divided (`None`: alpha does not count), and the update as `B` and `A`."""
    names = set(kinds)
    if names == {_DOWN, _UP}:
        up, down = (_matrix(kinds[name]) for name in (_UP, _DOWN))
        if up.shape[1] != down.shape[0]:
            raise ValueError(f"its matrices have the shapes {list(up.shape)} and {list(down.shape)}, and so two ranks")
        return down.shape[0], (up, down)
    if names == {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}:
        first, second = ((kinds[f"hada_w{number}_a"], kinds[f"hada_w{number}_b"]) for number in (1, 2))
        pair = loha(first, second)
        return first[1].shape[0], pair
    for first in ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"}):
        for second in ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"}):
            if names == first | second:
                factors = [tuple(kinds[name] for name in sorted(own)) for own in (first, second)]
                pair = lokr(*factors)
                ranks = [factor[1].shape[0] for factor in factors if len(factor) == 2]
                return ranks[-1] if ranks else None, pair
    raise ValueError(f"its matrices are {', '.join(sorted(names)) or 'missing'}, which is not one LoRA, LoHa or LoKr")


def _matrix(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.ndim < 2 or tensor.numel() == 0 or tensor.shape[2:].numel() != 1:
        raise ValueError(
            f"a tensor has the shape {list(tensor.shape)}, but only those of linear layers, matrices, are supported"
        )
    return tensor.flatten(1)


def _number(alpha: torch.Tensor) -> float:
    if alpha.numel() != 1 or alpha.dtype == torch.bool or alpha.dtype.is_complex:
        raise ValueError(f"its alpha has the shape {list(alpha.shape)} and the dtype {alpha.dtype}, but is one number")
    return float(alpha)


def _magnitude(tensor: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    if tuple(tensor.shape) not in {(up.shape[0],), (up.shape[0], 1)}:
        raise ValueError(
            f"its `dora_scale` has the shape {list(tensor.shape)}, but only magnitudes of the {up.shape[0]} outputs "
            f"([{up.shape[0]}, 1]) are supported: PEFT has no others. {_MERGE.removesuffix('.')}"
        )
    return tensor.flatten()


def _named(found: Mapping[str, Mapping[str, Update]]) -> dict[str, torch.Tensor]:
    named: dict[str, torch.Tensor] = {}
    owners: dict[str, str] = {}
    for original, updates in found.items():
        for module, update in updates.items():
            if module in owners:
                raise ValueError(f"holds two LoRAs of {module!r}, {owners[module]!r} and {original!r}. Remove one")
            owners[module] = original
            key = f"{DIFFUSERS_PREFIX}{module}"
            named |= {f"{key}.lora_A.weight": update.down, f"{key}.lora_B.weight": update.up}
            named[f"{key}.alpha"] = torch.tensor(update.alpha, dtype=torch.float64)
            if update.magnitude is not None:
                named[f"{key}.lora_magnitude_vector"] = update.magnitude
    magnitudes = {name.rpartition(".")[0] for name in named if name.endswith(".lora_magnitude_vector")}
    if magnitudes and (without := sorted({f"{DIFFUSERS_PREFIX}{module}" for module in owners} - magnitudes)):
        raise ValueError(
            f"has magnitudes (DoRA), but none for {owners[without[0].removeprefix(DIFFUSERS_PREFIX)]!r}: PEFT has them for "
            f"all modules or for none. {_MERGE}"
        )
    return named
