# SPDX-License-Identifier: Apache-2.0
"""Write files and folders so that a kill at any moment leaves the old one or the new one, whole."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


STAGING_FOLDER = "_writing"


@contextmanager
def written_whole(folder: str | Path) -> Iterator[Path]:
    """
    Gives an empty folder to write files into. At the end each replaces the file of the same name in `folder`.

    Args:
        folder (`str` or `Path`):
            Where the files go; created if needed. It stays as it was if anything fails before all of them are written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    staging = folder / STAGING_FOLDER
    shutil.rmtree(staging, ignore_errors=True)  # of a process that was killed
    staging.mkdir()
    try:
        yield staging
        paths = sorted(staging.iterdir())
        for path in paths:
            sync(path)
        for path in paths:
            os.replace(path, folder / path.name)
        sync(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def aside_of(folder: Path) -> Path:
    """Where [`replace_folder`] keeps the old folder until the new one is in its place."""
    return folder.with_name(f"_replaced-{folder.name}")


def replace_folder(new: Path, folder: Path) -> None:
    """Renames `new` to `folder`. What was there is renamed first and removed last, so that one of the two is always there."""
    aside = aside_of(folder)
    if folder.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder, aside)
    os.replace(new, folder)
    sync(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


def recover_folders(parent: Path) -> None:
    """Ends what a kill interrupted in [`replace_folder`]: what was set aside goes back if nothing is in its place."""
    for aside in parent.glob("_replaced-*"):
        folder = aside.with_name(aside.name.removeprefix("_replaced-"))
        if folder.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.replace(aside, folder)


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk, so that a rename never survives what it renamed."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
