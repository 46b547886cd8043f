# SPDX-License-Identifier: Apache-2.0
"""What is compared: the base, LoRAs on it and their merges, each at a guidance scale. One row of a table each."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...hub.locations import Origin
from ...lora.files import LoraWeights, load_lora
from ...lora.fingerprints import lora_sha256
from ...lora.merging import METHODS
from ...models.family import ModelFamily


BASE = "base"
_RESERVED = (BASE, *(f"merge_{method}" for method in METHODS), "prompts")


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
            Names of the LoRAs whose updates are merged on the base.
        weight (`float`, *optional*, defaults to `1.0`):
            Weight of each of these updates.
        method (`str`, *optional*):
            How they are merged, as [`merge_updates`] names it; by default they are added up, each with its weight.
    """

    name: str
    guidance_scale: float
    loras: tuple[str, ...] = ()
    weight: float = 1.0
    method: str | None = None


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
            `"sum"` adds the row `merge_sum`, the updates of all LoRAs added up, and `"mean"`, `"ties"` and `"dare"` the
            rows of these merges; `"sum=a,b"` those of the LoRAs `a` and `b` alone.

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
    models: dict[str, tuple[tuple[str, ...], float, str | None]] = {BASE: ((), 1.0, None)} if base else {}
    models |= {name: ((name,), 1.0, None) for name in names}
    for how, own in _merges(merge, names):
        weight = 1 / len(own) if how == "mean" else 1.0
        models[f"merge_{how}"] = (own, weight, None if how in ("sum", "mean") else how)
    if not models:
        raise ValueError("There is nothing to evaluate. Pass `--lora`, or leave out `--no_base`.")
    if unknown := [name for name in scales if name is not None and name not in models]:
        raise ValueError(f"`--guidance_scale` names {unknown[0]!r}, but the models are {', '.join(models)}.")
    rows = []
    for name, what in models.items():
        own = list(dict.fromkeys(scales.get(name, scales.get(None, [default_scale]))))
        rows += [Entry(f"{name}, guidance {g:g}" if len(own) > 1 else name, float(g), *what) for g in own]
    return rows


def _merges(words: Sequence[str], names: Sequence[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """How to merge, and the names of what is merged."""
    for word in dict.fromkeys(words):
        how, _, chosen = word.partition("=")
        own = tuple(dict.fromkeys(chosen.split(","))) if chosen else tuple(names)
        if how not in METHODS:
            raise ValueError(f"`--merge` takes {', '.join(METHODS)}, or several of them, but not {how!r}.")
        if sum(other.partition("=")[0] == how for other in words) > 1:
            raise ValueError(f"`--merge` has {how!r} twice. Keep one, or use another `--output_dir` for the other.")
        if unknown := [name for name in own if name not in names]:
            raise ValueError(f"`--merge {word}` names {unknown[0]!r}, but the LoRAs are {', '.join(names)}.")
        if len(own) < 2:
            raise ValueError("`--merge` merges LoRAs and needs two or more of them. Pass them to `--lora`.")
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


def check_merges(entries: Sequence[Entry], loras: Mapping[str, Lora]) -> None:
    """
    Checks that what is merged can be.

    Raises:
        `ValueError`: a LoRA is more than an update of weights, which is all that a merge is of.
    """
    for entry in entries:
        for name in entry.loras if len(entry.loras) > 1 else ():
            config = loras[name].weights.config
            if config.use_dora or (config.lora_bias and entry.method):
                what = "magnitudes (DoRA)" if config.use_dora else "biases"
                raise ValueError(
                    f"The LoRA {name!r} has {what}, but only updates `B A` of weights can be merged into {entry.name!r}. "
                    "Name the other LoRAs: `--merge HOW=NAME,NAME`."
                )
