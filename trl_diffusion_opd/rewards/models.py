# SPDX-License-Identifier: Apache-2.0
"""What the model-based rewards share: loading from a folder or the Hub, CLIP's cosine, the linear score head."""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..hub.download import fetch
from ..hub.errors import SourceError, hub_errors
from ..hub.locations import PICKLE_SUFFIXES, parse_source


def load_pretrained(
    loader: Any, location: str | Path, owner: str, *, probe: str = "config.json", **kwargs: Any
) -> Any:
    """
    `loader.from_pretrained` with errors that say what to do; all files are of one commit.

    Args:
        loader (`type`):
            A class of transformers.
        location (`str` or `Path`):
            A local folder, or `owner/repo[/subfolder][@revision]` on the Hub.
        owner (`str`):
            Who needs it, for the error messages.
        probe (`str`, *optional*, defaults to `"config.json"`):
            A small file of the folder, fetched first.
        kwargs:
            Passed on to `from_pretrained`.

    Raises:
        `SourceError`: the model cannot be found or fetched.
    """
    source = parse_source(location)
    if source.path is not None:
        if not (source.path / probe).is_file():
            raise SourceError(f"{owner}: there is no {probe!r} in the local folder {str(source.path)!r}.")
        return loader.from_pretrained(source.path, **kwargs)
    commit = fetch(source, probe, owner).commit
    with hub_errors(source, owner):
        return loader.from_pretrained(source.repo_id, revision=commit, subfolder=source.subfolder or "", **kwargs)


def find_file(location: str | Path, name: str, owner: str) -> Path:
    """
    The path of one file: `location` itself if that is a local file, else `name` in a local folder or on the Hub.

    Raises:
        `SourceError`: it cannot be found or fetched.
    """
    source = parse_source(location)
    if source.path is None:
        return fetch(source, name, owner).path
    path = source.path / name if source.path.is_dir() else source.path
    if not path.is_file():
        raise SourceError(f"{owner}: there is no local file {str(path)!r}. Check the spelling.")
    return path


def read_weights(path: Path) -> dict[str, Any]:
    """
    Reads a file of weights onto the CPU. A pickle (`.pt`, `.pth`, ...) is read with `weights_only=True`, which makes
    tensors and containers and runs no code of the file.

    Raises:
        `ValueError`: a pickle that holds anything else.
    """
    if path.suffix in PICKLE_SUFFIXES:
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            # torch's own message advises to read it without `weights_only`.
            raise ValueError(
                f"{path.name!r} is a pickle with more than tensors in it and is not loaded, because reading it could "
                "run code hidden in it. Download it again from its publisher, or pass the weights as safetensors."
            ) from error
    from safetensors.torch import load_file

    return load_file(path)


def from_weights(model_class: Any, config: Any, weights: dict[str, torch.Tensor], owner: str, **kwargs: Any) -> Any:
    """
    Builds a transformers model from a config and weights, which must fit to the last tensor; `kwargs` are passed on to
    `from_pretrained`.

    Raises:
        `ValueError`: weights that are missing, left over or of another shape.
    """
    model, info = model_class.from_pretrained(
        None, config=config, state_dict=weights, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
    )
    wrong = {what.replace("_keys", ""): sorted(map(str, names)) for what, names in info.items() if names}
    if wrong:
        first = "; ".join(f"{what}: {', '.join(names[:3])} ({len(names)})" for what, names in wrong.items())
        raise ValueError(f"{owner}: the weights do not fit {model_class.__name__}: {first}.")
    return model


def features(output: Any) -> torch.Tensor:
    """The tensor of `CLIPModel.get_image_features` or `get_text_features`, normalized, in float32."""
    # transformers 5 returns an output object, with the projected features as `pooler_output`.
    tensor = getattr(output, "pooler_output", output).float()
    return tensor / tensor.norm(dim=-1, keepdim=True)


def cosines(model: nn.Module, tokenizer: Any, pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """The cosine between each image and its own text, by a CLIP model of transformers: B values in float32."""
    tokens = tokenizer(
        prompts,
        padding=True,
        truncation=True,
        max_length=model.config.text_config.max_position_embeddings,
        return_tensors="pt",
    )
    image = features(model.get_image_features(pixels.to(model.device, model.dtype)))
    text = features(
        model.get_text_features(
            tokens["input_ids"].to(model.device), attention_mask=tokens["attention_mask"].to(model.device)
        )
    )
    return (image * text).sum(-1)


class ScoreHead(nn.Module):
    """
    Five linear layers without activations, from an embedding to one number; the head of the aesthetic predictor and
    of ImageReward. In training there was dropout between them, which scoring does not need.

    Args:
        width (`int`, *optional*, defaults to 768):
            Size of the embedding.
    """

    def __init__(self, width: int = 768):
        super().__init__()
        sizes = (width, 1024, 128, 64, 16, 1)
        linears = [nn.Linear(before, after) for before, after in zip(sizes, sizes[1:], strict=False)]
        # The places of the dropouts keep the names of the published weights: layers.0, 2, 4, 6, 7.
        one, two, three, four, five = linears
        self.layers = nn.Sequential(one, nn.Identity(), two, nn.Identity(), three, nn.Identity(), four, five)

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        return self.layers(embedding).squeeze(-1)
