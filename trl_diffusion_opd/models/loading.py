# SPDX-License-Identifier: Apache-2.0
"""Loading what a run starts from: the base pipeline and the student's LoRA on it."""

import inspect
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi, constants, get_cached_repo_tree
from huggingface_hub.errors import CachedRepoTreeNotFoundError
from peft import LoraConfig
from torch import nn

from ..hub.download import fetch, fetch_checked
from ..hub.errors import SourceError, hub_errors
from ..hub.locations import Origin, parse_source
from ..hub.options import check_init_kwargs
from ..lora.options import check_options
from .family import Configs, ModelFamily
from .registry import family_named, family_of


STUDENT = "default"  # the only adapter name that diffusers' LoRA metadata helpers know
INDEX = "model_index.json"
CONFIG_FILES = {"scheduler": "scheduler_config.json"}


def check_pipeline(
    model: str | Path | DiffusionPipeline, init_kwargs: dict[str, Any] | None = None, *, owner: str = "model"
) -> tuple[Origin, ModelFamily]:
    """
    Looks for a pipeline's index before anything large is fetched. diffusers' own errors do not tell a misspelt name
    from a gated model.

    Args:
        model (`str` or `Path` or [`~diffusers.DiffusionPipeline`]):
            `owner/repo[@revision]` on the Hub, local folder, or a pipeline in memory.
        init_kwargs (`dict`, *optional*):
            Arguments of `from_pretrained`.
        owner (`str`, *optional*, defaults to `"model"`):
            Who needs it, for the error messages.

    Returns:
        `tuple[Origin, ModelFamily]`: where the pipeline comes from, for the Hub with the commit to load; and its family.

    Raises:
        `ValueError`: a local folder without a pipeline, a pipeline of no known family, or nothing that names one.
        `SourceError`: the model cannot be found or fetched; the message says what to do.
    """
    if isinstance(model, DiffusionPipeline):
        return Origin.of_model(model), family_of(model, owner)
    if not isinstance(model, (str, Path)):
        raise ValueError(
            f"`{owner}` must be a Hub id, a local folder or a pipeline of diffusers, but is a {type(model)}."
        )
    source, kwargs = parse_source(model, kind="model"), dict(init_kwargs or {})
    if source.path is None:
        if source.subfolder is not None or (source.revision and "revision" in kwargs):
            raise ValueError(
                f"`model` must be `owner/repo` or `owner/repo@revision`, but is {model!r}"
                f"{' with a `revision` in `model_init_kwargs` too' if source.revision else ''}."
            )
        source = replace(source, revision=source.revision or kwargs.get("revision"))
        found = fetch(source, INDEX, owner, **_access(kwargs))
        index, commit = found.path, found.commit
    else:
        index, commit = _local_index(source.path, owner), None
    family = _family(index, owner)
    check_init_kwargs(kwargs, family.pipeline_class, owner=owner)
    return Origin.of_source(source, commit), family


def _local_index(folder: Path, owner: str) -> Path:
    if not folder.is_dir():
        raise SourceError(f"{owner}: there is no folder {str(folder)!r}. Check the spelling.")
    if not (folder / INDEX).is_file():
        raise ValueError(
            f"`{owner}`: the folder {str(folder)!r} has no `{INDEX}`. Pass the folder of a whole pipeline, as "
            "`pipeline.save_pretrained` writes it."
        )
    return folder / INDEX


def _family(index: Path, owner: str) -> ModelFamily:
    try:
        class_name = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"`{owner}`: {str(index)!r} is no index of a pipeline: {error!r}. Download it again."
        ) from error
    return family_named(class_name, owner)


def load_pipeline(
    model: str | Path | DiffusionPipeline,
    dtype: torch.dtype,
    init_kwargs: dict[str, Any] | None = None,
    *,
    origin: Origin,
    family: ModelFamily,
) -> DiffusionPipeline:
    """
    Loads the base pipeline, frozen; the VAE in float32 whatever the rest is in, as in the published recipe.

    Args:
        model (`str` or `Path` or [`~diffusers.DiffusionPipeline`]):
            Hub id, local folder, or a pipeline in memory. Its components are used as they are: they are frozen, the
            transformer gets adapters, the VAE is converted to float32, and the text encoders move between devices.
        dtype (`torch.dtype`):
            Precision of the weights, unless `init_kwargs` has a `dtype` (a `torch.dtype` or its name).
        init_kwargs (`dict`, *optional*):
            Passed on to `from_pretrained`.
        origin ([`Origin`]), family ([`ModelFamily`]):
            What [`check_pipeline`] returned. The commit of the origin is loaded.

    Raises:
        `ValueError`: the transformer has adapters already.
        `SourceError`: the model cannot be found or fetched.
    """
    if isinstance(model, DiffusionPipeline):
        taken = inspect.signature(family.pipeline_class.__init__).parameters
        settings = {
            name: model.config[name] for name in taken if name in model.config and name not in model.components
        }
        pipeline = family.pipeline_class(**model.components, **settings)
    else:
        kwargs = dict(init_kwargs or {})
        chosen = kwargs.pop("dtype", kwargs.pop("torch_dtype", dtype))
        if isinstance(chosen, str):
            if not isinstance(getattr(torch, chosen, None), torch.dtype):
                raise ValueError(
                    f"`dtype` in `model_init_kwargs` must be a dtype of torch, such as bfloat16, but is {chosen!r}."
                )
            chosen = getattr(torch, chosen)
        dtypes = chosen if isinstance(chosen, dict) else {"default": chosen, "vae": torch.float32}
        kwargs.pop("revision", None)
        local = parse_source(model, kind="model").path  # the cache of the Hub, if `origin` names a repository too
        folder = local or fetch_pipeline(origin, family, kwargs)
        pipeline = family.pipeline_class.from_pretrained(folder, dtype=dtypes, **kwargs)
        pipeline.register_to_config(_name_or_path=origin.repo_id or str(model))
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


def sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers and switches in the config of a model, by which its shape is told, and nothing else of it."""
    return {name: value for name, value in config.items() if isinstance(value, int | float)}


def read_configs(
    model: str | Path | DiffusionPipeline, origin: Origin, init_kwargs: dict[str, Any] | None = None
) -> Configs:
    """
    The configs of a pipeline and its components, each read when it is asked for, without loading anything large. One
    that is damaged is empty: loading it will tell why.

    Args:
        model (`str`, `Path` or [`~diffusers.DiffusionPipeline`]), init_kwargs (`dict`, *optional*):
            As of [`check_pipeline`].
        origin ([`Origin`]):
            What [`check_pipeline`] returned.
    """
    init_kwargs = init_kwargs or {}

    def read(component: str) -> Mapping[str, Any]:
        if component in init_kwargs:  # in the place of the pipeline's own
            return getattr(init_kwargs[component], "config", {})
        if isinstance(model, DiffusionPipeline):
            return getattr(model, component).config if component else model.config
        source = parse_source(model, kind="model")
        name = f"{component}/{CONFIG_FILES.get(component, 'config.json')}" if component else INDEX
        if source.path is None:
            access = _access(init_kwargs)
            file = fetch(parse_source(origin.name), name, "model", commit=origin.commit, **access).path
        else:
            file = source.path / name
        try:
            return dict(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return {}

    return read


def fetch_pipeline(origin: Origin, family: ModelFamily, init_kwargs: dict[str, Any], *, owner: str = "model") -> Path:
    """
    Makes sure that the files which `from_pretrained` needs are on this machine, and returns their folder. What is
    downloaded now is checked; to read all that was in the cache again would take long for models of many gigabytes.
    """
    source, access = parse_source(origin.name), _access(init_kwargs)
    index = fetch(source, INDEX, owner, commit=origin.commit, **access).path
    cached = set(index.parent.rglob("*"))

    def download() -> Path:
        return Path(family.pipeline_class.download(origin.repo_id, revision=origin.commit, **init_kwargs))

    with hub_errors(source, owner):
        _keep_list_of_files(origin, access)
        return fetch_checked(download, source, owner, lambda folder: sorted(set(folder.rglob("*")) - cached))


def _keep_list_of_files(origin: Origin, access: dict[str, Any]) -> None:
    """
    Has the cache know which files a repository has. If it does not, and the Hub does not answer diffusers' question,
    then diffusers takes the files that are in the cache for all there are.
    """
    api = HfApi(token=access.get("token"))
    try:
        get_cached_repo_tree(origin.repo_id, revision=origin.commit, cache_dir=access.get("cache_dir"))
    except CachedRepoTreeNotFoundError:
        if not constants.HF_HUB_OFFLINE and not access.get("local_files_only"):
            for _ in api.list_repo_tree(origin.repo_id, recursive=True, revision=origin.commit):
                pass  # raises if the Hub does not answer, which the next call does not
            api.snapshot_download(
                origin.repo_id,
                revision=origin.commit,
                cache_dir=access.get("cache_dir"),
                allow_patterns=INDEX,
            )


def _access(init_kwargs: dict[str, Any]) -> dict[str, Any]:
    return {key: init_kwargs[key] for key in ("token", "cache_dir", "local_files_only") if key in init_kwargs}


def default_lora(target_modules: str | list[str] | None = None, **overrides: Any) -> LoraConfig:
    """
    The student's LoRA of the published recipe.

    Args:
        target_modules (`str` or `list[str]`, *optional*):
            Modules that get a LoRA, such as the `lora_targets` of a [`ModelFamily`].
        overrides:
            Fields of [`~peft.LoraConfig`] to replace.
    """
    settings = {"r": 32, "lora_alpha": 64, "init_lora_weights": "gaussian", "target_modules": target_modules}
    return LoraConfig(**{**settings, **overrides})


def student_config(
    peft_config: LoraConfig | dict[str, Any] | None, family: ModelFamily, transformer: Mapping[str, Any]
) -> LoraConfig:
    """
    The student's LoRA.

    Args:
        peft_config (`LoraConfig` or `dict`, *optional*):
            The LoRA, or the fields in which it differs from [`default_lora`] where the family has it, the default.
        family ([`ModelFamily`]):
            Family of the base.
        transformer (`Mapping`):
            Config of its transformer.
    """
    if isinstance(peft_config, LoraConfig):
        return peft_config
    options = peft_config or {}
    where = {} if "target_modules" in options else family.lora_options(transformer)
    return default_lora(**{**where, **options})


def add_student(transformer: nn.Module, peft_config: LoraConfig) -> dict[str, nn.Parameter]:
    """
    Adds the student's LoRA as the active, trainable adapter `"default"`, in float32 whatever the base is in.

    Args:
        transformer (`torch.nn.Module`):
            The base transformer, frozen.
        peft_config (`LoraConfig`):
            From [`student_config`].

    Returns:
        `dict[str, torch.nn.Parameter]`: the parameters to train, by name.

    Raises:
        `ValueError`: a config that trains or changes anything beside LoRA matrices, or with dropout.
    """
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
