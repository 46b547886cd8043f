# SPDX-License-Identifier: Apache-2.0
"""Loading what a run starts from: the base pipeline and the student's LoRA on it."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig
from torch import nn

from .lora_files import check_options
from .pipeline import StableDiffusion3SDEPipeline
from .sources import Source, fetch, hub_errors


STUDENT = "default"  # the only adapter name that diffusers' LoRA metadata helpers know

# The attention projections of image and text stream: what the published teachers were trained on.
ATTENTION_TARGETS = [
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
]


def load_pipeline(
    model: str | Path | StableDiffusion3Pipeline, dtype: torch.dtype, init_kwargs: dict[str, Any] | None = None
) -> StableDiffusion3SDEPipeline:
    """
    Loads the base pipeline, frozen; the VAE in float32 whatever the rest is in, as in the published recipe.

    Args:
        model (`str` or `Path` or [`~diffusers.StableDiffusion3Pipeline`]):
            Hub id, local folder, or a pipeline in memory. Its components are used as they are: they are frozen, the
            transformer gets adapters, the VAE is converted to float32, and the text encoders move between devices.
        dtype (`torch.dtype`):
            Precision of the weights, unless `init_kwargs` has a `dtype` (a `torch.dtype` or its name).
        init_kwargs (`dict`, *optional*):
            Passed on to `from_pretrained`.

    Raises:
        `ValueError`: the model is no SD3 pipeline, or its transformer has adapters already.
        `SourceError`: the model cannot be found or fetched.
    """
    if isinstance(model, (str, Path)):
        kwargs = dict(init_kwargs or {})
        chosen = kwargs.pop("dtype", kwargs.pop("torch_dtype", dtype))
        chosen = getattr(torch, chosen) if isinstance(chosen, str) else chosen
        kwargs["dtype"] = chosen if isinstance(chosen, dict) else {"default": chosen, "vae": torch.float32}
        check_pipeline(model, init_kwargs)
        local = Path(model).is_dir()
        source = Source(repo_id=str(model), revision=kwargs.get("revision"))
        with nullcontext() if local else hub_errors(source, "model"):
            pipeline = StableDiffusion3SDEPipeline.from_pretrained(model, **kwargs)
    elif isinstance(model, StableDiffusion3Pipeline):
        pipeline = StableDiffusion3SDEPipeline(**model.components)
    else:
        raise ValueError(
            f"`model` must be a Hub id, a local folder or a `StableDiffusion3Pipeline`, but is a {type(model)}."
        )
    if adapters := getattr(pipeline.transformer, "peft_config", None):
        raise ValueError(
            f"`model`: its transformer has adapters already ({', '.join(adapters)}). Merge them "
            "(`pipe.fuse_lora(); pipe.unload_lora_weights()`) or load the pipeline without them."
        )
    pipeline.set_progress_bar_config(disable=True)
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False)
            component.eval()
    if pipeline.vae.dtype != torch.float32:
        pipeline.vae.to(torch.float32)
    return pipeline


def check_pipeline(model: str | Path, init_kwargs: dict[str, Any] | None = None) -> None:
    """
    Looks for a pipeline's index before anything large is fetched. diffusers' own errors do not tell a misspelt name
    from a gated model.

    Raises:
        `ValueError`: a local folder without a pipeline.
        `SourceError`: the model cannot be found or fetched; the message says what to do.
    """
    if not Path(model).is_dir():
        kwargs = dict(init_kwargs or {})
        access = {key: kwargs[key] for key in ("token", "cache_dir", "local_files_only") if key in kwargs}
        fetch(Source(repo_id=str(model), revision=kwargs.get("revision")), "model_index.json", "model", **access)
    elif not (Path(model) / "model_index.json").is_file():
        raise ValueError(
            f"`model`: the folder {str(model)!r} has no `model_index.json`. Pass the folder of a whole pipeline, as "
            "`pipeline.save_pretrained` writes it."
        )


def default_lora(**overrides: Any) -> LoraConfig:
    """The student's LoRA of the published recipe, with fields of [`~peft.LoraConfig`] replaced by `overrides`."""
    settings = {"r": 32, "lora_alpha": 64, "init_lora_weights": "gaussian", "target_modules": ATTENTION_TARGETS}
    return LoraConfig(**{**settings, **overrides})


def add_student(transformer: nn.Module, peft_config: LoraConfig | None) -> dict[str, nn.Parameter]:
    """
    Adds the student's LoRA as the active, trainable adapter `"default"`, in float32 whatever the base is in.

    Args:
        transformer (`torch.nn.Module`):
            The base transformer, frozen.
        peft_config (`LoraConfig`, *optional*):
            By default [`default_lora`].

    Returns:
        `dict[str, torch.nn.Parameter]`: the parameters to train, by name.

    Raises:
        `ValueError`: a config that trains or changes anything beside LoRA matrices, or with dropout.
    """
    peft_config = peft_config or default_lora()
    check_options(peft_config.to_dict(), "`peft_config`", "the student")
    if peft_config.lora_dropout:
        raise ValueError(
            f"`peft_config` has `lora_dropout={peft_config.lora_dropout}`, but the student is rolled out and trained in "
            "one pass: dropout would be noise in its trajectory and in what it is compared by. Set `lora_dropout=0`."
        )
    transformer.add_adapter(peft_config, adapter_name=STUDENT)
    parameters = {name: p for name, p in transformer.named_parameters() if f".{STUDENT}." in name}
    for parameter in parameters.values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return parameters
