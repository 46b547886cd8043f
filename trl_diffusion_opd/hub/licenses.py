# SPDX-License-Identifier: Apache-2.0
"""The license of the base model, which a LoRA on it inherits."""

import logging
import re
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import metadata_load

from .download import fetch
from .errors import SourceError
from .locations import Origin, Source


logger = logging.getLogger(__name__)
# The ids that the Hub knows (https://huggingface.co/docs/hub/repositories-licenses), but for "other" and "unknown".
LICENSE_IDS = frozenset(
    """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl
    lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib
    pddl lgpl-lr deepfloyd-if-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma apple-amlr apple-ascl
    eupl-1.2 fair-noncommercial-research-license h-research intel-research
    """.split()
)


@dataclass
class License:
    """
    License of a model, in the terms of the Hub.

    Args:
        id (`str`, *optional*):
            Its id in the Hub's list; `"other"` if it is not there.
        name (`str`, *optional*):
            Its name, with the id `"other"`.
        link (`str`, *optional*):
            Where its text is, with the id `"other"`.
    """

    id: str | None = None
    name: str | None = None
    link: str | None = None


def read_license(origin: Origin, path: str | Path | None = None, token: str | None = None) -> License:
    """
    Reads the license of a model from the front matter of its card.

    Args:
        origin ([`Origin`]):
            Where the model comes from. For a Hub repository its `README.md` is fetched, at that commit, unless it is in
            the folder.
        path (`str` or `Path`, *optional*):
            Its folder, if it is local.
        token (`str`, *optional*):
            Token to use instead of the one of `hf auth login` or `HF_TOKEN`.

    Returns:
        [`License`]: an id of the Hub's list as it is; anything else as `"other"` with name and link. Empty if the card
        states none, or there is no card.
    """
    if origin.repo_id is None and not (path and (Path(path) / "README.md").is_file()):
        return License()
    try:
        if path and (Path(path) / "README.md").is_file():
            file = Path(path) / "README.md"
        else:
            source = Source(repo_id=origin.repo_id, revision=origin.commit)
            file = fetch(source, "README.md", "license of the base", token=token).path
        data = metadata_load(file) or {}
    except (SourceError, ValueError, yaml.YAMLError) as error:
        logger.warning(f"The license of the base is not known, and the model card will state none: {error}")
        return License()
    return as_license(data, origin)


def as_license(data: dict, origin: Origin) -> License:
    """The license in the front matter of a card, made such that it holds in another repository too."""
    stated = data.get("license") or "unknown"
    ids = stated if isinstance(stated, list) else [stated]
    if ids == ["unknown"]:
        return License()
    if len(ids) == 1 and ids[0] in LICENSE_IDS:
        return License(ids[0])
    # "other", several, or what is in no list
    page = f"https://huggingface.co/{origin.repo_id}" if origin.repo_id else None
    name = data.get("license_name") or " and ".join(name for name in ids if name != "other")
    link = data.get("license_link") or page
    if link and "://" not in link:
        link = f"{page}/blob/main/{link.removeprefix('./')}" if page else None
    return License("other", name or f"license-of-{_slug(origin.name)}", link)


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.partition("@")[0].split("/")[-1].lower())
