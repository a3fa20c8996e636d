"""Folders that several processes share."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


def made_once(root: Path, name: str, make: Callable[[Path], object]) -> Path:
    """A folder of `root` that the first process that asks for it makes for all of them.

    Args:
        make: writes the folder, which does not exist yet.
    """
    folder, done = root / name, root / f"{name}.done"
    with FileLock(root / f"{name}.lock"):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a process that failed half-way
            make(folder)
            done.touch()
    return folder
