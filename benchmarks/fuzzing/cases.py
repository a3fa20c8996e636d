"""The description of one input of the fuzzer, and of one format."""

from __future__ import annotations

import hashlib
import random
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """A mutant in a folder, and the command that reads it.

    Args:
        words: words of the command line, which runs inside the mutant's folder.
        mutation: a description of what was changed.
        whole: whether an export runs to its end. Most exports stop before the float graph, which takes seconds.
        judge: called after a command that succeeded. It returns `""` if the result is right, `other` if nothing can tell,
            `equal` if the output must be that of the unmutated input, and otherwise the fault.
        writes: paths that the command may write, relative to the case's folder.
    """

    words: list[str]
    mutation: str
    whole: bool = True
    judge: Callable[[], str] = field(default=lambda: "other")
    writes: tuple[str, ...] = ("work/out",)


@dataclass(frozen=True)
class Format:
    """One format that a user can provide.

    Args:
        share: share of the inputs, relative to other formats.
        mutate: changes a fresh copy of the materials beside a guarded folder, and returns the case that reads it.
        accepts: exit statuses that are a verdict on a readable input.
    """

    name: str
    share: float
    mutate: Callable[[random.Random, Path, Path, Path], Case]
    accepts: tuple[int, ...] = (0,)


def guarded(root: Path) -> dict[str, str]:
    """Return kind, mode and content of everything under a folder by path. Links are not followed."""
    entries = {}
    for path in sorted(root.rglob("*")):
        info = path.lstat()
        text = f"{info.st_mode:o}"
        if stat.S_ISREG(info.st_mode):
            text += f" {info.st_size} {info.st_mtime_ns}"
            if info.st_size < 1 << 22:
                text += hashlib.sha256(path.read_bytes()).hexdigest()
        elif stat.S_ISLNK(info.st_mode):
            text += f" -> {path.readlink()}"
        entries[str(path.relative_to(root))] = text
    return entries
