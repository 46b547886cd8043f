# SPDX-License-Identifier: Apache-2.0
"""The options of a LoRA: read from JSON, checked, and made into a `LoraConfig`."""

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key


# These initializations leave the base weights as they are, so a trained adapter does not depend on them.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
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
# What only matters for starting or running the training of a LoRA.
_DROPPED_OPTIONS = {
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


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_alpha(value: Any) -> bool:
    # The comparison also leaves out NaN, and whole numbers that no float can hold.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_regex(value: Any, form: str = "{}") -> bool:
    try:
        re.compile(form.format(value))
    except re.error:
        return False
    return isinstance(value, str)


def _is_modules(value: Any) -> bool:
    """A regular expression, or names of modules."""
    if isinstance(value, str):
        return _is_regex(value)
    return isinstance(value, list | tuple | set) and all(isinstance(name, str) for name in value)


def _is_pattern(value: Any, is_right: Callable[[Any], bool]) -> bool:
    # The form in which PEFT matches a key.
    form = r"(.*\.)?({})$"
    return isinstance(value, dict) and all(_is_regex(key, form) and is_right(item) for key, item in value.items())


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


# Option -> (whether a value is right, what is right).
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_rank, "a whole number of at least 1"),
    "lora_alpha": (_is_alpha, "a finite number"),
    "rank_pattern": (
        lambda value: _is_pattern(value, _is_rank),
        "a mapping from regular expressions to whole numbers of at least 1",
    ),
    "alpha_pattern": (
        lambda value: _is_pattern(value, _is_alpha),
        "a mapping from regular expressions to finite numbers",
    ),
    "target_modules": (
        lambda value: bool(value) and _is_modules(value),
        "a list of names of modules, or a regular expression",
    ),
    "exclude_modules": (
        lambda value: value is None or _is_modules(value),
        "a list of names of modules, a regular expression or null",
    ),
    "layers_to_transform": (
        lambda value: value is None or all(isinstance(index, int) for index in _as_list(value)),
        "a whole number, a list of them or null",
    ),
    "layers_pattern": (
        lambda value: value is None or (_is_modules(value) and all(map(_is_regex, _as_list(value)))),
        "a name, a list of names or null",
    ),
    "use_rslora": (_is_flag, "true or false"),
    "use_dora": (_is_flag, "true or false"),
    "lora_bias": (_is_flag, "true or false"),
    "fan_in_fan_out": (_is_flag, "true or false"),
    "base_model_name_or_path": (lambda value: value is None or isinstance(value, str), "a name or null"),
}


def parse_options(text: str | bytes, where: str, owner: str) -> dict[str, Any]:
    """
    Reads the options of a LoRA from JSON.

    Args:
        text (`str` or `bytes`):
            The JSON.
        where (`str`), owner (`str`):
            Where it stands and whose it is, for the error messages.

    Returns:
        `dict`: the options.

    Raises:
        `ValueError`: it is no JSON, or no mapping.
    """
    try:
        options = json.loads(text)
    except (ValueError, RecursionError) as error:  # invalid UTF-8 and invalid JSON are both a `ValueError`
        raise ValueError(
            f"{owner}: {where} is not valid JSON: {str(error) or type(error).__name__}. Save the LoRA again, or download "
            "it again."
        ) from error
    if not isinstance(options, dict):
        raise ValueError(
            f"{owner}: {where} must be a mapping of options (a JSON object), but is {_short(options)}. Save the LoRA "
            "again."
        )
    return options


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


def make_config(options: dict[str, Any], where: str, owner: str) -> LoraConfig:
    """
    Makes the config of a teacher from saved options: what only matters for training is left out.

    Raises:
        `ValueError`: an option is missing, has a wrong type or value, or changes more than the LoRA's own matrices.
    """
    check_options(options, where, owner)
    for name, (is_right, rule) in _RULES.items():
        if name in options and not is_right(options[name]):
            raise ValueError(
                f"{owner}: {where} has `{name}={_short(options[name])}`, but it must be {rule}. Correct it, or save the "
                "LoRA again."
            )
    if "target_modules" not in options:
        raise ValueError(
            f"{owner}: {where} has no `target_modules`, which say where the LoRA belongs. Save the LoRA again, or "
            "download it again."
        )
    return build_config({**options, **_DROPPED_OPTIONS}, where, owner)


def build_config(options: dict[str, Any], where: str, owner: str) -> LoraConfig:
    """Makes a `LoraConfig` of `options`; a `ValueError` says which of them PEFT refuses."""
    # It says how a machine is used and is no part of the LoRA; PEFT makes nothing of one that comes from a file.
    options = {name: value for name, value in options.items() if name != "runtime_config"}
    try:
        return LoraConfig.from_peft_type(**{**options, "peft_type": "LORA"})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{owner}: PEFT refuses the options in {where}: {reason} Correct them.") from error


def infer_config(state_dict: dict[str, torch.Tensor], alphas: dict[str, float]) -> LoraConfig:
    """
    Builds the config of a file without options from the names and shapes of its tensors, as diffusers does.

    Args:
        state_dict (`dict[str, torch.Tensor]`):
            The tensors.
        alphas (`dict[str, float]`):
            Values of the `alpha` tensors, by module. Without one the scaling of a module is 1, that is alpha = rank.
    """
    ranks: dict[str, int] = {}
    for name, tensor in state_dict.items():
        module, _, kind = name.rpartition(".lora_")
        if kind == "A.weight":
            ranks[module] = tensor.shape[0]
        elif kind == "B.weight":
            ranks.setdefault(module, tensor.shape[1])
    alphas = {module: alphas.get(module, rank) for module, rank in ranks.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    targets: str | list[str] = sorted(ranks)
    if any("." not in module for module in targets):
        # As a name in a list, `proj_out` would also be the `proj_out` of each block.
        targets = "|".join(map(re.escape, targets))
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=targets,
        rank_pattern={f"^{re.escape(module)}": value for module, value in ranks.items() if value != rank},
        alpha_pattern={f"^{re.escape(module)}": value for module, value in alphas.items() if value != alpha},
        use_dora=any("lora_magnitude_vector" in name for name in state_dict),
        lora_bias=any(name.endswith("lora_B.bias") for name in state_dict),
    )


def module_rank(config: LoraConfig, module: str) -> int:
    """The rank of one module, by PEFT's own matching of the patterns."""
    return config.rank_pattern.get(get_pattern_key(config.rank_pattern, module), config.r)


def module_alpha(config: LoraConfig, module: str) -> float:
    """Alpha of one module where `alpha / rank` is the factor before `B @ A`, also with rsLoRA."""
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, module), config.lora_alpha)
    return alpha * math.sqrt(module_rank(config, module)) if config.use_rslora else alpha


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
