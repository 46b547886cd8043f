# SPDX-License-Identifier: Apache-2.0
"""LoRA files that cannot be right are refused in one line."""

import math
import re

import pytest
import torch

from tests.support.lora_files import (
    DIFFUSERS_FILE,
    LORA_A,
    LORA_B,
    MODULE,
    all_as,
    diffusers_lora,
    peft_lora,
    with_tensor,
)
from tests.support.tiny import random_lora
from trl_diffusion_opd.lora.convert import convert_lora
from trl_diffusion_opd.lora.files import read_lora


WRITERS = {"peft": peft_lora, "diffusers": diffusers_lora}
HUGE = 10**400

# Options -> what the message says of them.
OPTIONS = [
    ({"r": "4"}, "`r='4'`, but it must be a whole number of at least 1"),
    ({"r": 4.0}, "`r=4.0`, but it must be a whole number"),
    ({"r": 0}, "`r=0`, but it must be a whole number of at least 1"),
    ({"r": -1}, "`r=-1`, but it must be a whole number"),
    ({"r": None}, "`r=None`, but it must be a whole number"),
    ({"r": True}, "`r=True`, but it must be a whole number"),
    (
        {"r": 10**9},
        f"'{LORA_A.replace('to_k', 'add_k_proj')}' in .*has the shape [4, 16] and so the rank 4, but by `r` ",
    ),
    ({"lora_alpha": "8"}, "`lora_alpha='8'`, but it must be a finite number"),
    ({"lora_alpha": None}, "`lora_alpha=None`, but it must be a finite number"),
    ({"lora_alpha": math.nan}, "`lora_alpha=nan`, but it must be a finite number"),
    ({"lora_alpha": math.inf}, "`lora_alpha=inf`, but it must be a finite number"),
    ({"lora_alpha": -math.inf}, "`lora_alpha=-inf`, but it must be a finite number"),
    ({"lora_alpha": HUGE}, "`lora_alpha=1000"),
    (
        {"lora_alpha": 1e30},
        "has alpha 1e+30 and rank 4: it is multiplied by 2.5e+29, but more than 65504 cannot be right",
    ),
    ({"lora_alpha": -1e300}, "has alpha -1e+300 and rank 4: it is multiplied by -2.5e+299, but"),
    ({"lora_alpha": 3e5}, "has alpha 300000 and rank 4: it is multiplied by 75000, but more than 65504"),
    ({"alpha_pattern": {"attn.to_k": math.nan}}, "`alpha_pattern={'attn.to_k': nan}`, but it must be a mapping"),
    ({"alpha_pattern": {"attn.to_k": 1e30}}, f"the LoRA of '{MODULE}' has alpha 1e+30 and rank 4"),
    ({"alpha_pattern": {"attn.to_k": "8"}}, "`alpha_pattern={'attn.to_k': '8'}`, but it must be a mapping from"),
    ({"alpha_pattern": {"((": 8}}, "`alpha_pattern={'((': 8}`, but it must be a mapping from regular expressions"),
    ({"alpha_pattern": []}, "`alpha_pattern=[]`, but it must be a mapping from regular expressions to finite numbers"),
    (
        {"rank_pattern": ["to_k"]},
        "`rank_pattern=['to_k']`, but it must be a mapping from regular expressions to whole",
    ),
    ({"rank_pattern": None}, "`rank_pattern=None`, but it must be a mapping"),
    ({"rank_pattern": {"((": 2}}, "`rank_pattern={'((': 2}`, but it must be a mapping"),
    ({"rank_pattern": {"to_k": "4"}}, "`rank_pattern={'to_k': '4'}`, but it must be a mapping"),
    ({"rank_pattern": {"attn.to_k": 2}}, f"'{LORA_A}' in .*has the shape [4, 16] and so the rank 4, but by `r` and"),
    ({"target_modules": None}, "`target_modules=None`, but it must be a list of names of modules, or a regular"),
    ({"target_modules": "(("}, "`target_modules='(('`, but it must be a list of names of modules, or a regular"),
    ({"target_modules": []}, "`target_modules=[]`, but it must be"),
    ({"target_modules": [1]}, "`target_modules=[1]`, but it must be"),
    ({"target_modules": {"to_k": 1}}, "`target_modules={'to_k': 1}`, but it must be"),
    ({"exclude_modules": "(("}, "`exclude_modules='(('`, but it must be"),
    (
        {"exclude_modules": 5},
        "`exclude_modules=5`, but it must be a list of names of modules, a regular expression or",
    ),
    ({"layers_to_transform": "x"}, "`layers_to_transform='x'`, but it must be a whole number, a list of them or null"),
    (
        {"layers_to_transform": [0], "layers_pattern": 5},
        "`layers_pattern=5`, but it must be a name, a list of names or",
    ),
    ({"layers_to_transform": [0], "layers_pattern": ["(("]}, "`layers_pattern=['((']`, but it must be"),
    (
        {"layers_pattern": "x"},
        "PEFT refuses the options in .*`layers_to_transform` must also be specified. Correct them.",
    ),
    ({"use_rslora": "no"}, "`use_rslora='no'`, but it must be true or false"),
    ({"use_dora": "x"}, "`use_dora='x'`, but it must be true or false"),
    ({"lora_bias": 1}, "`lora_bias=1`, but it must be true or false"),
    ({"lora_bias": True, "use_dora": True}, "PEFT refuses the options in .*not supported for DoRA"),
    ({"base_model_name_or_path": 5}, "`base_model_name_or_path=5`, but it must be a name or null"),
    ({"bias": None}, "`bias=None`: it trains biases"),
    ({"peft_type": []}, "`peft_type=[]`, but only LoRA is supported"),
    ({"modules_to_save": 5}, "{'modules_to_save': 5}"),
]

RAW = [
    ("[]", "must be a mapping of options (a JSON object), but is []"),
    ('"x"', "must be a mapping of options (a JSON object), but is 'x'"),
    ("3", "must be a mapping of options (a JSON object), but is 3"),
    ("true", "must be a mapping of options (a JSON object), but is True"),
    ("{", "is not valid JSON: Expecting property name"),
    ("[" * 100_000, "is not valid JSON"),
]


def half(tensor):
    return tensor[:2]


def value(number, dtype=torch.float32):
    return lambda tensor: torch.full_like(tensor, number, dtype=dtype)


# Changes of the tensors -> what the message says of them.
TENSORS = {
    **{
        str(dtype): (
            all_as(dtype),
            f"add_k_proj.lora_A.weight is {str(dtype).removeprefix('torch.')}, .*Save it again",
        )
        for dtype in (torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool, torch.complex64)
    },
    "one int": (
        with_tensor(LORA_A, value(1, torch.int32)),
        f"not floating-point weights: .*{LORA_A} is int32. A LoRA",
    ),
    "e8m0": (
        with_tensor(LORA_A, lambda t: t.abs().to(torch.float8_e8m0fnu)),
        f"{LORA_A} is float8_e8m0fnu. A LoRA is",
    ),
    "0-D": (
        with_tensor(LORA_A, torch.tensor(1.0)),
        f"wrong shape: .*{LORA_A} is [], but `lora_A` and `lora_B` are matr",
    ),
    "1-D": (
        with_tensor(LORA_B, torch.ones(16)),
        f"wrong shape: .*{LORA_B} is [16], but `lora_A` and `lora_B` are matric",
    ),
    "empty": (with_tensor(LORA_A, lambda t: t[:0]), f"wrong shape: .*{LORA_A} is [0, 16], but"),
    "3-D": (
        with_tensor(LORA_A, lambda t: t[None]),
        f"'{LORA_A}' in .*has the shape [1, 4, 16] and so the rank 1, but",
    ),
    "rank of A": (with_tensor(LORA_A, half), f"'{LORA_A}' in .*has the shape [2, 16] and so the rank 2, but"),
    "rank of B": (
        with_tensor(LORA_B, lambda t: t[:, :2]),
        f"'{LORA_B}' in .*has the shape [16, 2] and so the rank 2, b",
    ),
    "1e300": (with_tensor(LORA_A, value(1e300, torch.float64)), f"some beyond float32: .*{LORA_A} (1e+300) in"),
    "all 1e300": (
        lambda tensors: {name: value(1e300, torch.float64)(tensor) for name, tensor in tensors.items()},
        "some beyond float32: .*add_k_proj.lora_A.weight (1e+300), .* and 27 more in",
    ),
    "NaN in float8": (with_tensor(LORA_B, value(math.nan, torch.float8_e4m3fn)), f"NaN.*{LORA_B} (nan) in"),
    "infinity": (with_tensor(LORA_B, value(-math.inf)), f"infinite values.*{LORA_B} (-inf) in"),
    "update": (
        with_tensor(LORA_A, value(1e30)),
        f"LoRA of '{MODULE}' changes a weight by .*e+29 (alpha 8, rank 4), but more",
    ),
    "overflow": (
        lambda tensors: tensors | {LORA_A: value(1e30)(tensors[LORA_A]), LORA_B: value(1e30)(tensors[LORA_B])},
        f"LoRA of '{MODULE}' changes a weight by inf (alpha 8, rank 4), but more than 65504 cannot be right. Correct its",
    ),
    "alpha without LoRA": (
        with_tensor("transformer_blocks.0.nowhere.alpha", torch.tensor(8.0)),
        "holds 'transformer_blocks.0.nowhere.alpha' (value 8), but no `lora_A` and `lora_B` of this module",
    ),
    "alpha NaN": (with_tensor(f"{MODULE}.alpha", torch.tensor(math.nan)), f"NaN.*{MODULE}.alpha (nan) in"),
    "alpha of 3 values": (
        with_tensor(f"{MODULE}.alpha", torch.ones(3)),
        f"'{MODULE}.alpha' in .*is float32 of the shape [3], but an alpha is one number",
    ),
    "alpha bool": (
        with_tensor(f"{MODULE}.alpha", torch.tensor(True)),
        f"'{MODULE}.alpha' in .*is bool of the shape []",
    ),
}


def in_one_line(message):
    """The message as a regular expression, in which `.*` alone is special, from the owner to the end of the line."""
    parts = [re.escape(part) for part in ["", *message.split(".*"), ""]]
    return r"\Amine: " + r"[^\n]*".join(parts) + r"\Z"


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=[str(options)[:50] for options, _ in OPTIONS])
@pytest.mark.parametrize("form", WRITERS)
def test_options(tmp_path, form, options, message):
    WRITERS[form](tmp_path, options)
    with pytest.raises(ValueError, match=in_one_line(message)) as caught:
        read_lora(tmp_path, owner="mine")
    assert re.search("adapter_config.json|adapter_model|pytorch_lora_weights", str(caught.value))
    with pytest.raises(ValueError):
        convert_lora(tmp_path, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize(("raw", "message"), RAW, ids=[raw[:5] for raw, _ in RAW])
@pytest.mark.parametrize("form", WRITERS)
def test_no_options_at_all(tmp_path, form, raw, message):
    WRITERS[form](tmp_path, raw=raw)
    where = "'adapter_config.json' " if form == "peft" else f"the metadata of '{DIFFUSERS_FILE}' "
    with pytest.raises(ValueError, match=in_one_line(where + message)):
        read_lora(tmp_path, owner="mine")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("null", "'adapter_config.json' must be a mapping of options (a JSON object), but is None"),
        ("", "'adapter_config.json' is not valid JSON: Expecting value"),
        ("{}", "'adapter_config.json' has no `target_modules`"),
        ('{"r": 4}', "'adapter_config.json' has no `target_modules`"),
    ],
)
def test_no_options_of_peft(tmp_path, raw, message):
    peft_lora(tmp_path, raw=raw)
    with pytest.raises(ValueError, match=in_one_line(message)):
        read_lora(tmp_path, owner="mine")


def test_options_that_are_no_text(tmp_path):
    peft_lora(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(b"\x80\x81{}")
    with pytest.raises(ValueError, match=in_one_line("'adapter_config.json' is not valid JSON")):
        read_lora(tmp_path, owner="mine")


@pytest.mark.parametrize("case", TENSORS)
@pytest.mark.parametrize("form", WRITERS)
def test_tensors(tmp_path, form, case):
    change, message = TENSORS[case]
    WRITERS[form](tmp_path, change=change)
    with pytest.raises(ValueError, match=in_one_line(message)) as caught:
        read_lora(tmp_path, owner="mine")
    assert {"peft": "adapter_model", "diffusers": "pytorch_lora_weights"}[form] in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (TENSORS["0-D"][0], TENSORS["0-D"][1]),
        (TENSORS["1-D"][0], TENSORS["1-D"][1]),
        (TENSORS["update"][0], f"LoRA of '{MODULE}' changes a weight by .*e+29 (alpha 4, rank 4), but more"),
        (
            with_tensor(f"{MODULE}.alpha", torch.tensor(1e30)),
            f"LoRA of '{MODULE}' has alpha 1e+30 and rank 4: it is multi",
        ),
        (TENSORS["alpha without LoRA"][0], TENSORS["alpha without LoRA"][1]),
        (TENSORS["alpha of 3 values"][0], TENSORS["alpha of 3 values"][1]),
        (with_tensor(LORA_B, lambda t: t[:, :2]), f"'{LORA_B}' in .*has the shape [16, 2] and so the rank 2, but"),
        (lambda t: {f"{MODULE}.lora_magnitude_vector": t[LORA_B][:, 0]}, "holds no `lora_A` and `lora_B`, only"),
    ],
)
def test_tensors_without_options(tmp_path, change, message):
    diffusers_lora(tmp_path, metadata=False, change=change)
    with pytest.raises(ValueError, match=in_one_line(message)):
        read_lora(tmp_path, owner="mine")


@pytest.mark.parametrize(
    ("alpha", "contradicts"), [(8.0, False), (8.02, False), (8.1, True), (16.0, True), (0.0, True)]
)
@pytest.mark.parametrize("form", WRITERS)
def test_alpha_tensors_beside_options(tmp_path, form, alpha, contradicts):
    WRITERS[form](tmp_path, change=with_tensor(f"{MODULE}.alpha", torch.tensor(alpha)))
    if contradicts:
        message = f"contradicts itself: '{MODULE}.alpha' is {alpha:g}, but by its options alpha is 8. Remove the one"
        with pytest.raises(ValueError, match=in_one_line(message)):
            read_lora(tmp_path, owner="mine")
    else:
        weights = read_lora(tmp_path, owner="mine")
        assert (weights.config.lora_alpha, weights.config.alpha_pattern) == (8, {})
        assert weights.state_dict.keys() == random_lora()[1].keys()


def test_a_large_lora_that_fits_is_loaded(tmp_path):
    """The bound is on the update, and the product of the largest values alone says too little."""

    def change(tensors):
        left, right = torch.zeros(4, 16), torch.zeros(16, 4)
        left[0], right[:, 1] = 1e20, 1e20
        return tensors | {LORA_A: left, LORA_B: right}

    weights = read_lora(diffusers_lora(tmp_path, change=change))
    assert float(weights.state_dict[LORA_A].max()) == pytest.approx(1e20)
