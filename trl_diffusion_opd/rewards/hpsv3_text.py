# SPDX-License-Identifier: Apache-2.0
"""
The text that HPSv3 was trained with, around the prompt. It belongs to the model as its weights do, so that it is fetched
as they are: from the authors' source, of which two texts are read and nothing is run.
"""

import ast
import hashlib
import os
import urllib.request
from contextlib import suppress
from pathlib import Path

from huggingface_hub import constants

from ..hub.errors import SourceError
from ..utils.serialization import write_text


# MIT license. The commit is one of the authors' main branch.
ADDRESS = (
    "https://raw.githubusercontent.com/MizzenAI/HPSv3/d232ff8669a0b00759766067c6c3a26e2e717fac/hpsv3/dataset/"
    "data_collator_qwen.py"
)
# Of both texts, one after the other, in UTF-8. A model reads the text it was trained with, or its scores mean nothing.
SHA256 = "f6ee57479d4e9eee76b49c00dc962e1e696a5a2b3cc32cebd9b1fa76fe27502c"
PLACE = "{text_prompt}"  # where the prompt goes
_NAMES = ("INSTRUCTION", "prompt_with_special_token")
_TIMEOUT = 30


def load_text(path: str | Path | None = None) -> str:
    """
    What HPSv3 is told, with [`PLACE`] in the place of the prompt.

    Args:
        path (`str` or `Path`, *optional*):
            A local copy of the file at [`ADDRESS`]. By default it is fetched once and kept in the cache of the Hub
            (`HF_HOME`).

    Raises:
        `SourceError`: the file cannot be found or fetched.
        `ValueError`: it does not hold the text that the published model was trained with.
    """
    if path is not None:
        path = Path(path).expanduser()
        if not path.is_file():
            raise SourceError(f"hpsv3: there is no local file {str(path)!r}. Check the spelling of `text_path`.")
        return _read(path.read_text(encoding="utf-8"), str(path))
    kept = Path(constants.HF_HOME) / "trl_diffusion_opd" / f"hpsv3-{SHA256[:8]}.py"
    if kept.is_file():
        return _read(kept.read_text(encoding="utf-8"), str(kept))
    source = _fetch()
    text = _read(source, ADDRESS)
    # Several processes may do this at once. Without the cache, it is fetched again.
    with suppress(OSError):
        write_text(kept.with_name(f"{kept.name}.{os.getpid()}"), source).replace(kept)
    return text


def _fetch() -> str:
    remedy = f"Download {ADDRESS} elsewhere, and pass the file as `text_path`."
    if constants.HF_HUB_OFFLINE:
        raise SourceError(f"hpsv3: the model's text is not in the cache and HF_HUB_OFFLINE is set. {remedy}")
    try:
        with urllib.request.urlopen(ADDRESS, timeout=_TIMEOUT) as response:
            return response.read().decode("utf-8")
    except (OSError, ValueError) as error:
        raise SourceError(f"hpsv3: the model's text cannot be fetched ({error}). {remedy}") from error


def _read(source: str, where: str) -> str:
    try:
        statements = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ValueError(
            f"hpsv3: {where!r} is not the source with the model's text: {error}. Get {ADDRESS}."
        ) from error
    texts = {
        statement.targets[0].id: statement.value.value
        for statement in statements
        if isinstance(statement, ast.Assign)
        and isinstance(statement.targets[0], ast.Name)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    }
    if missing := [name for name in _NAMES if name not in texts]:
        raise ValueError(f"hpsv3: {where!r} has no text {missing[0]!r}. Get {ADDRESS}.")
    text = "".join(texts[name] for name in _NAMES)
    if (found := hashlib.sha256(text.encode()).hexdigest()) != SHA256:
        raise ValueError(
            f"hpsv3: the text in {where!r} is not that of the published model: its SHA-256 is {found[:8]}... and not "
            f"{SHA256[:8]}... Get {ADDRESS}."
        )
    return text
