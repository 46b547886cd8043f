# SPDX-License-Identifier: Apache-2.0
"""Reading LoRA files in the formats of diffusers and PEFT, strictly: nothing is skipped."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError, safe_open

from ..hub.locations import DIFFUSERS_WEIGHT_NAME, PEFT_CONFIG_NAME, PEFT_WEIGHT_NAME, check_not_pickle


DIFFUSERS_PREFIX = "transformer."
PEFT_PREFIX = "base_model.model."
METADATA_KEY = "lora_adapter_metadata"
# These initializations leave the base weights as they are, so a trained adapter does not depend on them.
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")
# Options that add or change something outside of the LoRA matrices.
_UNSUPPORTED_OPTIONS = (
    "modules_to_save",
    "trainable_token_indices",
    "layer_replication",
    "target_parameters",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
    "megatron_config",
)


@dataclass
class LoraWeights:
    """
    A LoRA read from disk.

    Args:
        config (`LoraConfig`):
            How to apply the tensors: targets, ranks and scaling.
        state_dict (`dict[str, torch.Tensor]`):
            The tensors, named as `peft.get_peft_model_state_dict` names them.
        owner (`str`, *optional*, defaults to `"LoRA"`):
            Whose weights these are, for the error messages.
        saved_format (`str`, *optional*, defaults to `"diffusers"`):
            Format of the file, `"diffusers"` or `"peft"`.
        saved_options (`dict`, *optional*):
            The config as the file has it, with what `config` leaves out; not set if the file has none.
    """

    config: LoraConfig
    state_dict: dict[str, torch.Tensor]
    owner: str = "LoRA"
    saved_format: str = "diffusers"
    saved_options: dict[str, Any] | None = None


def read_lora(path: str | Path, *, weight_name: str | None = None, owner: str = "LoRA") -> LoraWeights:
    """
    Reads a LoRA of the transformer in the diffusers or the PEFT format; which one is told by the tensor names.

    Args:
        path (`str` or `Path`):
            A safetensors file or a folder with one. A PEFT file needs its `adapter_config.json` beside it.
        weight_name (`str`, *optional*):
            File inside the folder. By default `adapter_model.safetensors` or `pytorch_lora_weights.safetensors`.
        owner (`str`, *optional*, defaults to `"LoRA"`):
            Whose weights these are, for the error messages.

    Returns:
        [`LoraWeights`]: the tensors and their exact config. A diffusers file without metadata does not say its alpha:
        it is then scaled by 1, as `load_lora_weights` does, unless it holds `alpha` tensors.
    """
    file = _find_file(Path(path), weight_name, owner)
    tensors, header = _read_tensors(file, owner)
    if all(name.startswith(PEFT_PREFIX) for name in tensors):
        saved_format = "peft"
        state_dict = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in tensors.items()}
        options = _read_peft_options(file.with_name(PEFT_CONFIG_NAME), owner)
        config = _make_config(options, repr(PEFT_CONFIG_NAME), owner)
    else:
        saved_format = "diffusers"
        _check_diffusers_names(tensors, file, owner)
        state_dict = {name.removeprefix(DIFFUSERS_PREFIX): tensor for name, tensor in tensors.items()}
        options = _diffusers_options(header)
        if options is None:
            config = _infer_config(state_dict, file, owner)
            state_dict = {name: tensor for name, tensor in state_dict.items() if not name.endswith(".alpha")}
        else:
            config = _make_config(options, f"the metadata of {file.name!r}", owner)
    return LoraWeights(config, state_dict, owner, saved_format, options)


def _find_file(path: Path, weight_name: str | None, owner: str) -> Path:
    if path.is_dir():
        default = PEFT_WEIGHT_NAME if (path / PEFT_CONFIG_NAME).exists() else DIFFUSERS_WEIGHT_NAME
        file = path / (weight_name or default)
    else:
        file = path
    check_not_pickle(file, owner)
    if file.is_file():
        return file
    if not path.is_dir():
        raise FileNotFoundError(f"{owner}: there is no file or folder {str(path)!r}. Check the spelling.")
    names = sorted(other.name for other in path.iterdir())
    if any(name in ("model_index.json", "config.json") for name in names):
        raise ValueError(
            f"{owner}: {str(path)!r} holds a full model, not a LoRA. Load it with `from_pretrained` and pass the "
            "transformer or the pipeline itself."
        )
    weights = [name for name in names if name.endswith(".safetensors")]
    if not weights:
        for name in names:
            check_not_pickle(name, owner)
    hint = f"Pass one of {weights} as `weight_name`." if weights else f"The folder holds {names or 'nothing'}."
    raise FileNotFoundError(f"{owner}: there is no {file.name!r} in {str(path)!r}. {hint}")


def _read_tensors(file: Path, owner: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
            header = opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{owner}: {str(file)!r} is not a readable safetensors file: {error}.") from error
    if not tensors:
        raise ValueError(f"{owner}: {str(file)!r} holds no tensors.")
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(f"{owner}: tensors hold NaN or infinite values: {some(broken)}. Save the LoRA again.")
    return tensors, header


def _check_diffusers_names(tensors: Iterable[str], file: Path, owner: str) -> None:
    encoder = [name for name in tensors if name.startswith("text_encoder")]
    if encoder:
        raise ValueError(
            f"{owner}: {file.name!r} also changes a text encoder ({some(encoder)}), but only the transformer may be "
            "changed, because all models are given the same text embeddings. Train or save it without them."
        )
    unknown = [name for name in tensors if not name.startswith(DIFFUSERS_PREFIX)]
    if unknown:
        raise ValueError(
            f"{owner}: {file.name!r} is neither in the diffusers format (names start with {DIFFUSERS_PREFIX!r}) nor "
            f"in the PEFT format ({PEFT_PREFIX!r}): {some(unknown)}. If `load_lora_weights` of a diffusers pipeline "
            "can read it, load it there and save it with `save_lora_weights`."
        )


def _diffusers_options(header: dict[str, str]) -> dict[str, Any] | None:
    options = json.loads(header.get(METADATA_KEY, "{}"))
    return {
        name.removeprefix(DIFFUSERS_PREFIX): value
        for name, value in options.items()
        if name.startswith(DIFFUSERS_PREFIX)
    } or None


def _read_peft_options(file: Path, owner: str) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(
            f"{owner}: the weights are in the PEFT format but {file.name!r}, which holds their scaling, is not beside "
            f"them in {str(file.parent)!r}. Copy it there."
        )
    return json.loads(file.read_text(encoding="utf-8"))


def check_options(options: dict[str, Any], where: str, owner: str) -> None:
    """Raises a `ValueError` if a LoRA config asks for anything that changes more than the LoRA's own matrices."""
    peft_type = options.get("peft_type", "LORA")
    if peft_type != "LORA":
        raise ValueError(f"{owner}: {where} has `peft_type={peft_type!r}`, but only LoRA is supported.")
    init = options.get("init_lora_weights", True)
    if init not in _PLAIN_INITS:
        raise ValueError(
            f"{owner}: {where} has `init_lora_weights={init!r}`, which changes the base weights during training, so "
            "the LoRA does not fit the original base model. Convert it to a plain LoRA: save it again with "
            "`PeftModel.save_pretrained(..., path_initial_model_for_weight_conversion=...)`."
        )
    if options.get("bias", "none") != "none":
        raise ValueError(
            f"{owner}: {where} has `bias={options['bias']!r}`: it trains biases of the base model. Only `bias='none'` "
            "is supported; merge the LoRA and pass the full model instead."
        )
    unsupported = {name: options[name] for name in _UNSUPPORTED_OPTIONS if options.get(name)}
    if unsupported:
        raise ValueError(
            f"{owner}: {where} uses options that change more than LoRA matrices: {unsupported}. Merge the LoRA and "
            "pass the full model instead."
        )


def _make_config(options: dict[str, Any], where: str, owner: str) -> LoraConfig:
    check_options(options, where, owner)
    # What only matters for starting or running the training of this LoRA is dropped.
    dropped = {
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "task_type": None,
        "inference_mode": False,
        "base_model_name_or_path": None,
        "revision": None,
        "auto_mapping": None,
        "loftq_config": {},
        "eva_config": None,
        "corda_config": None,
        "lora_ga_config": None,
    }
    return LoraConfig.from_peft_type(**{**options, "peft_type": "LORA", **dropped})


def _infer_config(state_dict: dict[str, torch.Tensor], file: Path, owner: str) -> LoraConfig:
    """Builds the config of a diffusers file without metadata from the names and shapes of its tensors."""
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, tensor in state_dict.items():
        module, dot, kind = name.rpartition(".lora_")
        if kind == "A.weight":
            ranks[module] = tensor.shape[0]
        elif kind == "B.weight":
            ranks.setdefault(module, tensor.shape[1])
        elif name.endswith(".alpha"):
            alphas[name.removesuffix(".alpha")] = float(tensor)
        elif kind not in ("B.bias", "magnitude_vector"):
            raise ValueError(
                f"{owner}: {file.name!r} holds {name!r}, which is no tensor of a PEFT LoRA (`lora_A`, `lora_B`). Load "
                "it with `load_lora_weights` of a diffusers pipeline and save it with `save_lora_weights`."
            )
    # Without an alpha the scaling is 1, that is alpha = rank.
    alphas = {module: alphas.get(module, rank) for module, rank in ranks.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=sorted(ranks),
        rank_pattern={f"^{re.escape(module)}": value for module, value in ranks.items() if value != rank},
        alpha_pattern={f"^{re.escape(module)}": value for module, value in alphas.items() if value != alpha},
        use_dora=any("lora_magnitude_vector" in name for name in state_dict),
        lora_bias=any(name.endswith("lora_B.bias") for name in state_dict),
    )


def some(names: list[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{rest}"
