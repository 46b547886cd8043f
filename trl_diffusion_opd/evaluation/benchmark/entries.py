# SPDX-License-Identifier: Apache-2.0
"""What is compared: the base, LoRAs on it and their merges, each at a guidance scale. One row of a table each."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...hub.locations import Origin
from ...lora.files import LoraWeights, load_lora
from ...lora.fingerprints import lora_sha256
from ...models.family import ModelFamily


BASE = "base"
MERGES = ("sum", "mean")
_RESERVED = (BASE, *(f"merge_{merge}" for merge in MERGES), "prompts")


@dataclass(frozen=True)
class Entry:
    """
    A row of the table.

    Args:
        name (`str`):
            Its name, also that of its folder.
        guidance_scale (`float`):
            Classifier-free guidance.
        loras (`tuple[str, ...]`, *optional*):
            Names of the LoRAs whose updates are added up on the base.
        weight (`float`, *optional*, defaults to `1.0`):
            Weight of each of these updates.
    """

    name: str
    guidance_scale: float
    loras: tuple[str, ...] = ()
    weight: float = 1.0


@dataclass(frozen=True)
class Lora:
    """
    A LoRA read from its file.

    Args:
        weights ([`LoraWeights`]):
            Its tensors and options.
        origin ([`Origin`]):
            Where it comes from.
        sha256 (`str`):
            Its fingerprint, see [`lora_sha256`].
    """

    weights: LoraWeights
    origin: Origin
    sha256: str


def choose_entries(
    names: Sequence[str],
    guidance_scale: float | Mapping[str | None, Sequence[float]],
    *,
    default_scale: float = 1.0,
    base: bool = True,
    merge: Sequence[str] = (),
) -> list[Entry]:
    """
    The rows of the table, the base first.

    Args:
        names (`Sequence[str]`):
            Names of the LoRAs.
        guidance_scale (`float` or `Mapping[str | None, Sequence[float]]`):
            Of all models, or by name; under `None` those of all others. A model with several scales gets several rows.
        default_scale (`float`, *optional*, defaults to `1.0`):
            Of the models that have none.
        base (`bool`, *optional*, defaults to `True`):
            Whether the base itself is one.
        merge (`Sequence[str]`, *optional*):
            `"sum"` adds the row `merge_sum`, the updates of all LoRAs added up, and `"mean"` the row `merge_mean`;
            `"sum=a,b"` those of the LoRAs `a` and `b` alone.

    Raises:
        `ValueError`: nothing to compare, a name that cannot be a folder's, a merge that is not known, or a guidance scale
            of no model.
    """
    scales = dict(guidance_scale) if isinstance(guidance_scale, Mapping) else {None: [guidance_scale]}
    for name in names:
        if name in _RESERVED or not re.fullmatch(r"[\w+][\w .,+-]*", name):
            raise ValueError(
                f"A LoRA cannot be called {name!r}. Name it in letters, digits and `._+-`, and not "
                f"{', '.join(_RESERVED)}: `--lora NAME=SOURCE`."
            )
    models = {BASE: ((), 1.0)} if base else {}
    models |= {name: ((name,), 1.0) for name in names}
    models |= {f"merge_{how}": (own, 1.0 if how == "sum" else 1 / len(own)) for how, own in _merges(merge, names)}
    if not models:
        raise ValueError("There is nothing to evaluate. Pass `--lora`, or leave out `--no_base`.")
    if unknown := [name for name in scales if name is not None and name not in models]:
        raise ValueError(f"`--guidance_scale` names {unknown[0]!r}, but the models are {', '.join(models)}.")
    rows = []
    for name, (loras, weight) in models.items():
        own = list(dict.fromkeys(scales.get(name, scales.get(None, [default_scale]))))
        rows += [Entry(f"{name}, guidance {g:g}" if len(own) > 1 else name, float(g), loras, weight) for g in own]
    return rows


def _merges(words: Sequence[str], names: Sequence[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """How to merge, and the names of what is merged."""
    for word in dict.fromkeys(words):
        how, _, chosen = word.partition("=")
        own = tuple(dict.fromkeys(chosen.split(","))) if chosen else tuple(names)
        if how not in MERGES:
            raise ValueError(f"`--merge` is one of {', '.join(MERGES)}, or both, but not {how!r}.")
        if sum(other.partition("=")[0] == how for other in words) > 1:
            raise ValueError(f"`--merge` has {how!r} twice. Keep one, or use another `--output_dir` for the other.")
        if unknown := [name for name in own if name not in names]:
            raise ValueError(f"`--merge {word}` names {unknown[0]!r}, but the LoRAs are {', '.join(names)}.")
        if len(own) < 2:
            raise ValueError("`--merge` adds LoRAs up and needs two or more of them. Pass them to `--lora`.")
        yield how, own


def load_loras(sources: Mapping[str, str | Path], family: ModelFamily) -> dict[str, Lora]:
    """
    Fetches and reads LoRAs, those of other programs under the names that they give to the modules of this family.

    Raises:
        `SourceError`: one cannot be found or fetched.
        `ValueError`: one cannot be read.
    """
    loras = {}
    for name, source in sources.items():
        weights, origin = load_lora(source, owner=f"LoRA {name!r} ({source})", convert=family.convert_lora)
        loras[name] = Lora(weights, origin, lora_sha256(weights))
    return loras
