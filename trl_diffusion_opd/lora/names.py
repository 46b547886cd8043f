# SPDX-License-Identifier: Apache-2.0
"""What the modules of each family's transformer are called in its original checkpoint and in diffusers."""

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """
    Where a module of an original checkpoint is in diffusers.

    Args:
        original (`str`):
            Its name there, as ComfyUI has it.
        modules (`tuple[str, ...]`):
            The modules of diffusers that share its rows, in their order.
        shares (`tuple[int, ...]`):
            Their shares of the rows.
        swapped (`bool`):
            Whether the two halves of the rows are the other way around, if there are twice as many as columns: the
            original has shift and scale, diffusers scale and shift.
    """

    original: str
    modules: tuple[str, ...]
    shares: tuple[int, ...]
    swapped: bool = False


class NameTable:
    """
    The names of one family's modules.

    Args:
        modules (`Mapping[str, str]`):
            Name in the original checkpoint -> names in diffusers, several with spaces between. `{}` is a block's number.
        same (`str`, *optional*):
            Names that are the same in both.
        swapped (`str`, *optional*):
            Original names of the modules that are [`Place.swapped`].
        others (`Mapping[str, str]`, *optional*):
            As `modules`, for names that only some trainers use: they are read and never written.
    """

    def __init__(
        self, modules: Mapping[str, str], same: str = "", swapped: str = "", others: Mapping[str, str] | None = None
    ):
        self._places: dict[str, Place] = {}
        self._originals: dict[str, Place] = {}
        for original, names in {**modules, **{name: name for name in same.split()}}.items():
            place = _place(original, names, original in swapped.split())
            self._add(original, place)
            self._originals |= dict.fromkeys(place.modules, place)
            for name in place.modules:
                self._add(name, Place(name, (name,), (1,)))
        for original, names in (others or {}).items():
            self._add(original, _place(original, names, False))

    def _add(self, name: str, place: Place) -> None:
        # Trainers write the names with dots, or with underscores instead of them.
        for form in (name, name.replace(".", "_")):
            self._places.setdefault(form, place)

    def find(self, name: str) -> Place | None:
        """The place of a module, by a name of the original checkpoint or of diffusers, with dots or underscores."""
        return _find(self._places, name)

    def original(self, module: str) -> Place | None:
        """The place of a module of diffusers in the original checkpoint."""
        return _find(self._originals, module)


def _place(original: str, names: str, swapped: bool) -> Place:
    modules = tuple(names.split())
    # FLUX.1 has its MLP four times as wide as the model.
    return Place(original, modules, tuple(4 if name.endswith("proj_mlp") else 1 for name in modules), swapped)


def _find(places: Mapping[str, Place], name: str) -> Place | None:
    if "{}" in name:
        return None
    if name in places:
        return places[name]
    number = re.search(r"(?<=[._])(0|[1-9][0-9]*)(?=[._])", name)
    if number is None:
        return None
    place = places.get(f"{name[: number.start()]}{{}}{name[number.end() :]}")
    if place is None:
        return None
    modules = tuple(module.format(number[0]) for module in place.modules)
    return Place(place.original.format(number[0]), modules, place.shares, place.swapped)


def _attention(original: str, modules: str) -> dict[str, str]:
    """A fused projection of queries, keys and values, and that of the output."""
    return {f"{original}.qkv": " ".join(modules.split()[:3]), f"{original}.proj": modules.split()[3]}


_IMAGE = " ".join(f"transformer_blocks.{{}}.attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0"))
_TEXT = " ".join(
    f"transformer_blocks.{{}}.attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
)
_TIME = "time_text_embed.timestep_embedder.linear"

_SD3 = NameTable(
    {
        **_attention("joint_blocks.{}.x_block.attn", _IMAGE),
        **_attention("joint_blocks.{}.x_block.attn2", _IMAGE.replace("attn", "attn2")),
        **_attention("joint_blocks.{}.context_block.attn", _TEXT),
        "joint_blocks.{}.x_block.mlp.fc1": "transformer_blocks.{}.ff.net.0.proj",
        "joint_blocks.{}.x_block.mlp.fc2": "transformer_blocks.{}.ff.net.2",
        "joint_blocks.{}.x_block.adaLN_modulation.1": "transformer_blocks.{}.norm1.linear",
        "joint_blocks.{}.context_block.mlp.fc1": "transformer_blocks.{}.ff_context.net.0.proj",
        "joint_blocks.{}.context_block.mlp.fc2": "transformer_blocks.{}.ff_context.net.2",
        "joint_blocks.{}.context_block.adaLN_modulation.1": "transformer_blocks.{}.norm1_context.linear",
        "t_embedder.mlp.0": f"{_TIME}_1",
        "t_embedder.mlp.2": f"{_TIME}_2",
        "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
        "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
    },
    same="context_embedder",
    # The text stream of the last block has two of the six modulations, in this order.
    swapped="joint_blocks.{}.context_block.adaLN_modulation.1 final_layer.adaLN_modulation.1",
)

_FLUX = NameTable(
    {
        **_attention("double_blocks.{}.img_attn", _IMAGE),
        **_attention("double_blocks.{}.txt_attn", _TEXT),
        "double_blocks.{}.img_mlp.0": "transformer_blocks.{}.ff.net.0.proj",
        "double_blocks.{}.img_mlp.2": "transformer_blocks.{}.ff.net.2",
        "double_blocks.{}.img_mod.lin": "transformer_blocks.{}.norm1.linear",
        "double_blocks.{}.txt_mlp.0": "transformer_blocks.{}.ff_context.net.0.proj",
        "double_blocks.{}.txt_mlp.2": "transformer_blocks.{}.ff_context.net.2",
        "double_blocks.{}.txt_mod.lin": "transformer_blocks.{}.norm1_context.linear",
        "single_blocks.{}.linear1": " ".join(
            f"single_transformer_blocks.{{}}.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
        ),
        "single_blocks.{}.linear2": "single_transformer_blocks.{}.proj_out",
        "single_blocks.{}.modulation.lin": "single_transformer_blocks.{}.norm.linear",
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in.in_layer": f"{_TIME}_1",
        "time_in.out_layer": f"{_TIME}_2",
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
        "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
        "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
    },
    swapped="final_layer.adaLN_modulation.1",
    others={
        "double_blocks.{}.processor.qkv_lora1": " ".join(_IMAGE.split()[:3]),
        "double_blocks.{}.processor.proj_lora1": _IMAGE.split()[3],
        "double_blocks.{}.processor.qkv_lora2": " ".join(_TEXT.split()[:3]),
        "double_blocks.{}.processor.proj_lora2": _TEXT.split()[3],
        "single_blocks.{}.processor.qkv_lora": " ".join(
            f"single_transformer_blocks.{{}}.attn.{name}" for name in ("to_q", "to_k", "to_v")
        ),
        "single_blocks.{}.processor.proj_lora": "single_transformer_blocks.{}.proj_out",
    },
)

# Without `final_layer.adaLN_modulation.1`: diffusers swaps its halves in a checkpoint, and not in a LoRA.
_FLUX2 = NameTable(
    {
        **_attention("double_blocks.{}.img_attn", _IMAGE),
        **_attention("double_blocks.{}.txt_attn", _TEXT),
        "double_blocks.{}.img_mlp.0": "transformer_blocks.{}.ff.linear_in",
        "double_blocks.{}.img_mlp.2": "transformer_blocks.{}.ff.linear_out",
        "double_blocks.{}.txt_mlp.0": "transformer_blocks.{}.ff_context.linear_in",
        "double_blocks.{}.txt_mlp.2": "transformer_blocks.{}.ff_context.linear_out",
        "single_blocks.{}.linear1": "single_transformer_blocks.{}.attn.to_qkv_mlp_proj",
        "single_blocks.{}.linear2": "single_transformer_blocks.{}.attn.to_out",
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
        "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
        "single_stream_modulation.lin": "single_stream_modulation.linear",
        "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
        "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
        "final_layer.linear": "proj_out",
    },
)

_BLOCKS = ("layers.{}", "noise_refiner.{}", "context_refiner.{}")
_Z_IMAGE = NameTable(
    {
        **{f"{block}.attention.qkv": " ".join(f"{block}.attention.to_{x}" for x in "qkv") for block in _BLOCKS},
        **{f"{block}.attention.out": f"{block}.attention.to_out.0" for block in _BLOCKS},
        "x_embedder": "all_x_embedder.2-1",
        "final_layer.linear": "all_final_layer.2-1.linear",
        "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
    },
    same=" ".join(
        [
            *(f"{block}.feed_forward.w{number}" for block in _BLOCKS for number in (1, 2, 3)),
            *(f"{block}.adaLN_modulation.0" for block in _BLOCKS[:2]),
            "t_embedder.mlp.0 t_embedder.mlp.2 cap_embedder.1",
        ]
    ),
)

_STREAMS = ("img", "txt")
_QWEN = NameTable(
    {},
    same=" ".join(
        [
            *_IMAGE.split(),
            *_TEXT.split(),
            *(f"transformer_blocks.{{}}.{stream}_mod.1" for stream in _STREAMS),
            *(f"transformer_blocks.{{}}.{stream}_mlp.net.0.proj" for stream in _STREAMS),
            *(f"transformer_blocks.{{}}.{stream}_mlp.net.2" for stream in _STREAMS),
            f"img_in txt_in {_TIME}_1 {_TIME}_2 norm_out.linear proj_out",
        ]
    ),
)

# Class of the pipeline -> its table.
TABLES = {
    "StableDiffusion3Pipeline": _SD3,
    "FluxPipeline": _FLUX,
    "Flux2KleinPipeline": _FLUX2,
    "ZImagePipeline": _Z_IMAGE,
    "QwenImagePipeline": _QWEN,
}


def names_of(pipeline_class: str) -> NameTable:
    """
    The table of a family.

    Raises:
        `ValueError`: there is none for this class of pipelines.
    """
    if pipeline_class not in TABLES:
        raise ValueError(
            f"is of another program, and the names that these give to the modules of a {pipeline_class} are not known, "
            f"only those of {', '.join(TABLES)}. Load it with `load_lora_weights` and save it with `save_lora_weights`"
        )
    return TABLES[pipeline_class]
