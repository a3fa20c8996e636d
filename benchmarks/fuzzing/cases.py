"""One input of the fuzzer: what every format's mutants share."""

from __future__ import annotations

import hashlib
import random
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """A mutant that lies in a folder, and the command that reads it.

    Args:
        words: of the command line; run inside the mutant's folder.
        what: the mutation in words.
        whole: whether an export goes beyond loading; most stop before the float graph, which takes seconds.
        judge: after a command that succeeded: `""` where its result is right, `other` where no second opinion is at hand,
            `equal` where its output must be that of the unmutated input, else what is wrong.
        writes: where the command may write, relative to the folder that holds all.
    """

    words: list[str]
    what: str
    whole: bool = True
    judge: Callable[[], str] = field(default=lambda: "other")
    writes: tuple[str, ...] = ("work/out",)


@dataclass(frozen=True)
class Format:
    """One format that a user can bring.

    Args:
        share: of the inputs, relative to other formats.
        mutate: changes a fresh copy of the materials, with a guarded folder beside it, and says how it is to be read.
        accepts: exit statuses that are a verdict of the product on a readable input.
    """

    name: str
    share: float
    mutate: Callable[[random.Random, Path, Path, Path], Case]
    accepts: tuple[int, ...] = (0,)


def guarded(root: Path) -> dict[str, str]:
    """Path -> kind, mode and content of everything under a folder; links are not followed."""
    functions = {}
    for path in sorted(root.rglob("*")):
        info = path.lstat()
        text = f"{info.st_mode:o}"
        if stat.S_ISREG(info.st_mode):
            text += f" {info.st_size} {info.st_mtime_ns}"
            if info.st_size < 1 << 22:
                text += hashlib.sha256(path.read_bytes()).hexdigest()
        elif stat.S_ISLNK(info.st_mode):
            text += f" -> {path.readlink()}"
        functions[str(path.relative_to(root))] = text
    return functions
