# SPDX-License-Identifier: Apache-2.0
"""A transformer without the rest of its pipeline: found and looked at before anything large is fetched, then loaded."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from torch import nn

from ..hub.download import fetch, fetch_checked
from ..hub.errors import AbsentError, SourceError, hub_errors
from ..hub.locations import Origin, Source, check_inside, check_not_pickle, parse_source
from .family import ModelFamily
from .loading import INDEX, check_pipeline, sizes


CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
WEIGHTS_INDEX = f"{WEIGHTS}.index.json"  # of weights in several files


@dataclass(frozen=True)
class TransformerPlace:
    """
    Where a transformer is, and what its config says.

    Args:
        owner (`str`):
            Who needs it, for the error messages.
        origin ([`Origin`]):
            Where it comes from, with the Hub commit and without naming this machine.
        config (`Mapping`):
            Its config.
        source ([`Source`], *optional*):
            Its folder, on the Hub or on this machine; not set for one in memory.
        model (`torch.nn.Module`, *optional*):
            The transformer itself, if it is in memory.
        vae_config (`Mapping`, *optional*):
            Config of the VAE beside it, if it is part of a pipeline.
    """

    owner: str
    origin: Origin
    config: Mapping[str, Any] = field(repr=False)
    source: Source | None = None
    model: nn.Module | None = field(default=None, repr=False)
    vae_config: Mapping[str, Any] | None = field(default=None, repr=False)

    @property
    def key(self) -> tuple:
        """Equal for places of the same weights: to be loaded once."""
        if self.model is not None:
            return (id(self.model),)
        return place_key(self.source, self.origin.commit)

    def told(self) -> dict[str, Any]:
        """What tells it apart before it is loaded: its repository, if it has one, and its sizes."""
        return {**({"repository": self.origin.repo_id} if self.origin.repo_id else {}), **sizes(self.config)}


def place_key(source: Source, commit: str | None) -> tuple:
    """Tells folders of models apart; one in the cache of the Hub is that of the repository."""
    if source.path is None:
        return source.repo_id, commit, source.subfolder
    origin = Origin.local(source.path)
    if origin.repo_id is not None:
        return origin.repo_id, origin.commit, "/".join(origin.name.split("/")[2:]) or None
    return (os.path.realpath(source.path),)


def base_key(model: str | Path | DiffusionPipeline, origin: Origin, init_kwargs: Mapping[str, Any] | None) -> tuple:
    """The key of the transformer of a run's base, as of [`TransformerPlace`]."""
    if isinstance(model, DiffusionPipeline):
        return (id(model.transformer),)
    if "transformer" in (init_kwargs or {}):  # in the place of the pipeline's own
        return (id(init_kwargs["transformer"]),)
    source = _component(parse_source(model, kind="model"), "transformer", origin.commit)
    return place_key(source, origin.commit)


def find_transformer(
    source: Source, owner: str, family: ModelFamily, *, cached_only: bool = False
) -> TransformerPlace | None:
    """
    Looks for a transformer, or a whole pipeline that has one.

    Args:
        source ([`Source`]):
            Folder of either, on the Hub or on this machine.
        owner (`str`):
            Who needs it, for the error messages.
        family ([`ModelFamily`]):
            Family that it must be of.
        cached_only (`bool`, *optional*, defaults to `False`):
            Whether to look in the cache of the Hub only.

    Returns:
        [`TransformerPlace`] or `None`: where it is; `None` if there is neither.

    Raises:
        `ValueError`: it is of another class, its config cannot be read, or its weights are no safetensors.
    """
    access = {"local_files_only": True} if cached_only else {}
    index, commit = _look(source, INDEX, owner, **access)
    if index is not None:
        return _in_pipeline(source, commit, owner, family, **access)
    config, commit = _look(source, CONFIG, owner, **access)
    if config is None or "_class_name" not in _read_config(config, owner):  # as beside a LoRA with an unusual name
        return None
    return _place(source, config, commit, owner, family)


def find_base(base: str | Path | DiffusionPipeline | ModelMixin, owner: str, family: ModelFamily) -> TransformerPlace:
    """
    Looks for the transformer of a pipeline.

    Args:
        base (`str`, `Path`, [`~diffusers.DiffusionPipeline`] or [`~diffusers.ModelMixin`]):
            The pipeline: `owner/repo[@revision]` on the Hub, a local folder, or in memory; or the transformer itself.
        owner (`str`), family ([`ModelFamily`]):
            As of [`find_transformer`].

    Raises:
        `SourceError`: it cannot be found or fetched.
        `ValueError`: it is of another family.
    """
    if isinstance(base, ModelMixin):
        return TransformerPlace(owner, Origin.of_model(base), base.config, model=base)
    origin, theirs = check_pipeline(base, owner=owner)
    if theirs.transformer_class is not family.transformer_class:
        raise ValueError(
            f"{owner}: {origin.name!r} is a {theirs.pipeline_class.__name__}, but the student's base is a "
            f"{family.pipeline_class.__name__}. Use a teacher of the same model family."
        )
    if isinstance(base, DiffusionPipeline):
        vae = getattr(base, "vae", None)
        vae_config = None if vae is None else vae.config
        return TransformerPlace(owner, origin, base.transformer.config, model=base.transformer, vae_config=vae_config)
    place = _in_pipeline(parse_source(base, kind="model"), origin.commit, owner, family)
    return replace(place, origin=origin)


def load_transformer(place: TransformerPlace, dtype: torch.dtype, family: ModelFamily) -> nn.Module:
    """
    Loads a transformer, frozen and on the CPU; of the Hub, its files of one commit are downloaded and checked first.

    Args:
        place ([`TransformerPlace`]):
            Where it is. One in memory is used as it is.
        dtype (`torch.dtype`):
            Precision of its weights.
        family ([`ModelFamily`]):
            Its family.
    """
    model = place.model
    if model is None:
        folder = place.source.path or _fetch_weights(place)
        try:
            model = family.transformer_class.from_pretrained(folder, dtype=dtype, use_safetensors=True)
        except (OSError, ValueError) as error:
            raise SourceError(
                f"{place.owner}: the transformer in {str(folder)!r} cannot be loaded: {' '.join(str(error).split())}"
            ) from error
    return model.eval().requires_grad_(False)


def _component(pipeline: Source, name: str, commit: str | None) -> Source:
    """The folder of a pipeline's component."""
    if pipeline.path is not None:
        return Source(path=pipeline.path / name)
    folder = f"{pipeline.subfolder}/{name}" if pipeline.subfolder else name
    return replace(pipeline, subfolder=folder, revision=commit or pipeline.revision)


def _look(source: Source, name: str, owner: str, **kwargs: Any) -> tuple[Path | None, str | None]:
    """A file of a folder and its commit; nothing if it is not there."""
    if source.path is not None:
        return (source.path / name if (source.path / name).is_file() else None), None
    try:
        found = fetch(source, name, owner, **kwargs)
    except AbsentError:
        return None, None
    except SourceError:
        if kwargs.get("local_files_only"):
            return None, None
        raise
    return found.path, found.commit


def _in_pipeline(
    pipeline: Source, commit: str | None, owner: str, family: ModelFamily, **access: Any
) -> TransformerPlace:
    source = _component(pipeline, "transformer", commit)
    config, _ = _look(source, CONFIG, owner, **access)
    if config is None:
        raise SourceError(f"{owner}: the pipeline {pipeline} has no 'transformer/{CONFIG}'. Check the spelling.")
    vae, _ = _look(_component(pipeline, "vae", commit), CONFIG, owner, **access)
    place = _place(source, config, commit, owner, family)
    return replace(
        place,
        origin=Origin.of_source(pipeline, commit),
        vae_config=None if vae is None else _read_config(vae, owner),
    )


def _place(source: Source, file: Path, commit: str | None, owner: str, family: ModelFamily) -> TransformerPlace:
    config = _read_config(file, owner)
    wanted = family.transformer_class.__name__
    if config.get("_class_name") != wanted:
        raise ValueError(
            f"{owner}: {CONFIG!r} in {str(source)!r} is that of a {config.get('_class_name')!r}, but the student is a "
            f"{wanted}. Use a teacher of the same model family."
        )
    if source.path is not None:
        _check_weights(source.path, owner)
    return TransformerPlace(owner, Origin.of_source(source, commit), config, source=source)


def _read_config(file: Path, owner: str) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{owner}: {str(file)!r} cannot be read: {error}. Download it again.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{owner}: {str(file)!r} is no config of a model. Download it again.")
    return config


def _check_weights(folder: Path, owner: str) -> None:
    if (folder / WEIGHTS).is_file() or (folder / WEIGHTS_INDEX).is_file():
        return
    names = sorted(path.name for path in folder.iterdir())
    for name in names:
        check_not_pickle(name, owner)
    raise SourceError(
        f"{owner}: there is no {WEIGHTS!r} in {str(folder)!r}, which holds {names}. Save it with `save_pretrained`."
    )


def _fetch_weights(place: TransformerPlace) -> Path:
    """Fetches the weights that a config is of; only what is downloaded now is checked, as it is of a base."""
    source, commit = place.source, place.origin.commit
    index, _ = _look(source, WEIGHTS_INDEX, place.owner, commit=commit)
    names = [WEIGHTS]
    if index is not None:
        names = sorted(set(_read_config(index, place.owner).get("weight_map", {}).values()))
    return [_fetch_large(source, name, commit, place.owner) for name in names][-1].parent


def _fetch_large(source: Source, name: str, commit: str | None, owner: str) -> Path:
    check_inside(name, "weights")  # which the index names
    filename = f"{source.subfolder}/{name}" if source.subfolder else name
    cached = isinstance(try_to_load_from_cache(source.repo_id, filename, revision=commit), str)

    def download() -> Path:
        return Path(hf_hub_download(source.repo_id, filename, revision=commit))

    with hub_errors(source, owner):
        try:
            return fetch_checked(download, source, owner, lambda path: [] if cached else [path])
        except LocalEntryNotFoundError:  # no answer of the Hub
            raise
        except EntryNotFoundError as error:
            raise AbsentError(
                f"{owner}: there is no file {name!r} in {source}, and only safetensors is loaded. Pass a model that was "
                "saved with `save_pretrained`."
            ) from error
