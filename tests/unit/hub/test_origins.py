# SPDX-License-Identifier: Apache-2.0
"""Where something came from is told also where it was given by its place in the cache of the Hub."""

import pytest

from trl_diffusion_opd.hub.licenses import License, read_license
from trl_diffusion_opd.hub.locations import Origin, parse_source
from trl_diffusion_opd.models.loading import check_pipeline, load_pipeline


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    "place, expected",
    [
        ("models--them--base/snapshots/{}", Origin("them/base", "them/base", COMMIT)),
        ("models--them--my--base.v1_x/snapshots/{}/", Origin("them/my--base.v1_x", "them/my--base.v1_x", COMMIT)),
        ("models--a--loras/snapshots/{}/ocr/v2", Origin("a/loras/ocr/v2", "a/loras", COMMIT)),
        ("models--a--loras/snapshots/{}/ocr/x.safetensors", Origin("a/loras/ocr", "a/loras", COMMIT)),
        ("datasets--me--texts/snapshots/{}/a.txt", Origin("me/texts", "me/texts", COMMIT, "dataset")),
        ("models--them--base/snapshots/{}x", Origin("snapshots/" + COMMIT + "x")),
        ("models--them/snapshots/{}", Origin("snapshots/" + COMMIT)),
        ("models--them--base/refs/main", Origin("refs/main")),
    ],
)
def test_the_cache_of_the_hub_names_the_repository(tmp_path, place, expected):
    path = tmp_path / place.format(COMMIT)
    if path.suffix in (".txt", ".safetensors"):  # the cache links to blobs, whose names tell nothing
        path.parent.mkdir(parents=True)
        (tmp_path / "blob").write_bytes(b"")
        path.symlink_to(tmp_path / "blob")
    else:
        path.mkdir(parents=True)
    assert Origin.local(path) == Origin.of_source(parse_source(str(path)), None) == expected


def test_a_base_in_the_cache_is_loaded_from_there_and_named(tmp_path, monkeypatch):
    import torch

    from tests.support.tiny import tiny_pipeline

    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody is asked
    folder = tmp_path / "models--them--base" / "snapshots" / COMMIT
    tiny_pipeline().save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    origin, family = check_pipeline(str(folder))
    assert origin == Origin("them/base", "them/base", COMMIT)
    pipeline = load_pipeline(str(folder), torch.float32, origin=origin, family=family)
    assert Origin.of_model(pipeline) == origin
    assert read_license(origin, folder) == License("mit")
