# SPDX-License-Identifier: Apache-2.0
"""Reading LoRA files, in the formats of diffusers and PEFT or converted to them, strictly: nothing is skipped."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError, safe_open

from ..hub.download import resolve
from ..hub.locations import (
    DIFFUSERS_WEIGHT_NAME,
    PEFT_CONFIG_NAME,
    PEFT_WEIGHT_NAME,
    Origin,
    Resolved,
    Source,
    check_not_pickle,
    parse_source,
)
from .checks import check_alphas, check_tensors, check_update, pop_alphas, some
from .foreign import TEXT_ENCODERS, from_peft, is_foreign
from .options import infer_config, make_config, parse_options
from .writing import DIFFUSERS_PREFIX, METADATA_KEY, PEFT_PREFIX


# Names the tensors of another program's LoRA as diffusers does, with `alpha` tensors.
Converter = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


# Options that LoHa and LoKr have in common with LoRA.
_SHARED_OPTIONS = (
    "r",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
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
            Format of the file, `"diffusers"`, `"peft"` or `"other"`.
        saved_options (`dict`, *optional*):
            The config as the file has it, with what `config` leaves out; not set if the file has none.
    """

    config: LoraConfig
    state_dict: dict[str, torch.Tensor]
    owner: str = "LoRA"
    saved_format: str = "diffusers"
    saved_options: dict[str, Any] | None = None


def read_lora(
    path: str | Path,
    *,
    weight_name: str | None = None,
    owner: str = "LoRA",
    convert: Converter | None = None,
) -> LoraWeights:
    """
    Reads a LoRA of the transformer; its format is told by the tensor names. PEFT's LoHa and LoKr become LoRAs.

    Args:
        path (`str` or `Path`):
            A safetensors file or a folder with one. A PEFT file needs its `adapter_config.json` beside it.
        weight_name (`str`, *optional*):
            File inside the folder. By default `adapter_model.safetensors` or `pytorch_lora_weights.safetensors`.
        owner (`str`, *optional*, defaults to `"LoRA"`):
            Whose weights these are, for the error messages.
        convert (`Callable`, *optional*):
            [`ModelFamily.convert_lora`], for files of other programs. Without it they are refused.

    Returns:
        [`LoraWeights`]: the tensors and their exact config. A diffusers file without metadata does not say its alpha:
        it is then scaled by 1, as `load_lora_weights` does, unless it holds `alpha` tensors.
    """
    file = _find_file(Path(path), weight_name, owner)
    tensors, header = _read_tensors(file, owner)
    if all(name.startswith(PEFT_PREFIX) for name in tensors):
        saved_format, where = "peft", repr(PEFT_CONFIG_NAME)
        options = _read_peft_options(file.with_name(PEFT_CONFIG_NAME), owner)
        state_dict = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in tensors.items()}
        if options.get("peft_type") in ("LOHA", "LOKR"):
            state_dict, options = _product(state_dict, options, where, file, owner), None
    else:
        saved_format, where, options = "diffusers", f"the metadata of {file.name!r}", None
        _check_text_encoders(tensors, file, owner)
        if convert is not None and is_foreign(tensors):
            if _diffusers_options(header, where, owner):
                raise ValueError(
                    f"{owner}: {file.name!r} has options of diffusers in its metadata, and tensors under the names of "
                    "another program, which has others. Remove the metadata, or save the LoRA again."
                )
            saved_format, tensors = "other", _converted(lambda: convert(tensors), file, owner)
        else:
            _check_diffusers_names(tensors, file, owner)
            options = _diffusers_options(header, where, owner)
        state_dict = {name.removeprefix(DIFFUSERS_PREFIX): tensor for name, tensor in tensors.items()}
    alphas = pop_alphas(state_dict, file, owner)
    if options is None:
        _check_kinds(state_dict, file, owner)
        config = infer_config(state_dict, alphas)
    else:
        config = make_config(options, where, owner)
        check_alphas(alphas, config, file, owner)
    check_update(state_dict, config, file, owner)
    return LoraWeights(config, state_dict, owner, saved_format, options)


def load_lora(
    source: Source | str | Path,
    *,
    weight_name: str | None = None,
    owner: str = "LoRA",
    found: Resolved | None = None,
    convert: Converter | None = None,
) -> tuple[LoraWeights, Origin]:
    """
    Finds a LoRA, on the Hub or on this machine, and reads it.

    Args:
        source ([`Source`], `str` or `Path`):
            A local file or folder, or `owner/repo[/sub/folder][@revision]` on the Hub.
        weight_name (`str`, *optional*):
            File inside of it, if it has not one of the usual names.
        owner (`str`, *optional*, defaults to `"LoRA"`):
            Whose weights these are, for the error messages.
        found ([`Resolved`], *optional*):
            What [`resolve`] returned for `source`, which is called if it is not given.
        convert (`Callable`, *optional*):
            [`ModelFamily.convert_lora`], for files of other programs.

    Returns:
        `tuple[LoraWeights, Origin]`: the LoRA, and where it came from, with the commit.

    Raises:
        `SourceError`: it cannot be found or fetched.
        `ValueError`: it cannot be right; the message names what is wrong and how to correct it.
    """
    source = source if isinstance(source, Source) else parse_source(source)
    found = found or resolve(source, weight_name=weight_name, owner=owner)
    weights = read_lora(found.path, weight_name=weight_name, owner=owner, convert=convert)
    return weights, Origin.of_source(source, found.commit)


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
    check_tensors(tensors, file, owner)
    return tensors, header


def _converted(convert: Callable[[], dict[str, torch.Tensor]], file: Path, owner: str) -> dict[str, torch.Tensor]:
    try:
        tensors = convert()
    except ValueError as error:
        raise ValueError(f"{owner}: {file.name!r} {str(error).removesuffix('.')}.") from error
    check_tensors(tensors, file, owner)
    return tensors


def _product(
    state_dict: dict[str, torch.Tensor], options: dict[str, Any], where: str, file: Path, owner: str
) -> dict[str, torch.Tensor]:
    """A LoHa or LoKr of PEFT as a LoRA. Its options are named as a LoRA's, but for alpha and the training's own."""
    known = {name: value for name, value in options.items() if name in _SHARED_OPTIONS}
    config = make_config({**known, "lora_alpha": options.get("alpha", 8)}, where, owner)
    return _converted(lambda: from_peft(state_dict, config), file, owner)


def _check_text_encoders(tensors: Iterable[str], file: Path, owner: str) -> None:
    encoder = [name for name in tensors if name.startswith(TEXT_ENCODERS)]
    if encoder:
        raise ValueError(
            f"{owner}: {file.name!r} also changes a text encoder ({some(encoder)}), but only the transformer may be "
            "changed, because all models are given the same text embeddings. Train or save it without them."
        )


def _check_diffusers_names(tensors: Iterable[str], file: Path, owner: str) -> None:
    unknown = [name for name in tensors if not name.startswith(DIFFUSERS_PREFIX)]
    if unknown:
        raise ValueError(
            f"{owner}: {file.name!r} is neither in the diffusers format (names start with {DIFFUSERS_PREFIX!r}) nor "
            f"in the PEFT format ({PEFT_PREFIX!r}): {some(unknown)}. If it is of kohya, ComfyUI or ai-toolkit, convert "
            "it (`trl-diffusion-opd convert --base`); if `load_lora_weights` of a diffusers pipeline can read it, load it "
            "there and save it with `save_lora_weights`."
        )


def _check_kinds(names: Iterable[str], file: Path, owner: str) -> None:
    """Without options, only names tell what the tensors are."""
    kinds = {name: name.rpartition(".lora_")[2] for name in names}
    for name, kind in kinds.items():
        if kind not in ("A.weight", "B.weight", "B.bias", "magnitude_vector"):
            raise ValueError(
                f"{owner}: {file.name!r} holds {name!r}, which is no tensor of a PEFT LoRA (`lora_A`, `lora_B`). Load "
                "it with `load_lora_weights` of a diffusers pipeline and save it with `save_lora_weights`."
            )
    if not {"A.weight", "B.weight"} & set(kinds.values()):
        raise ValueError(
            f"{owner}: {file.name!r} holds no `lora_A` and `lora_B`, only {some(sorted(kinds))}. Save the LoRA again."
        )


def _diffusers_options(header: dict[str, str], where: str, owner: str) -> dict[str, Any] | None:
    text = header.get(METADATA_KEY, "")
    options = parse_options(text, where, owner) if text.strip() not in ("", "null") else {}
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
    return parse_options(file.read_bytes(), repr(file.name), owner)
