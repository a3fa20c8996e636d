"""What has been done in an output folder: stages are finished whole or not at all, and never done twice."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

RECIPE = "recipe.yaml"
LEDGER = "stages.json"
PARTIAL = ".partial"
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)


class OutputError(Exception):
    """The output folder cannot be used; the message says why. Nothing in it was changed."""


class Ledger:
    """The finished stages of one output folder, kept in `stages.json`.

    A stage writes into a folder of its own, from which its outputs are renamed into place; then it is recorded with the
    hashes of its inputs and outputs. A run that was killed leaves no half output that a later run takes for whole.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.stages: dict[str, Any] = json.loads((folder / LEDGER).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            self.stages = {}

    def stage(
        self, name: str, inputs: Mapping[str, Any], outputs: tuple[str, ...], work: Callable[[Path], dict[str, Any]]
    ) -> tuple[dict[str, Any], bool]:
        """The result of a stage, and whether it was done now rather than before.

        Args:
            inputs: all that the outputs depend on, JSON values.
            outputs: files or folders that the stage makes.
            work: makes them in the folder that it is given, and returns a JSON result.
        """
        key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
        done = self.stages.get(name)
        if done and done["inputs"] == key and done["outputs"] == self._hashes(outputs):
            return done["result"], False
        partial = self.folder / PARTIAL
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            result = work(partial)
            self._forget(name)
            for output in outputs:
                target = self.folder / output
                target.parent.mkdir(exist_ok=True)
                if target.is_dir():
                    shutil.rmtree(target)
                os.replace(partial / output, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        self.stages[name] = {"inputs": key, "outputs": self._hashes(outputs), "result": result}
        self._save()
        return result, True

    def digest(self, name: str) -> str:
        """A hash of a finished stage's outputs, for the inputs of later stages."""
        return hashlib.sha256(json.dumps(self.stages[name]["outputs"], sort_keys=True).encode()).hexdigest()

    def _forget(self, name: str) -> None:
        if self.stages.pop(name, None) is not None:
            self._save()

    def _save(self) -> None:
        write_text(self.folder / LEDGER, json.dumps(self.stages, indent=1) + "\n")

    def _hashes(self, outputs: tuple[str, ...]) -> dict[str, str]:
        found = {}
        for output in outputs:
            path = self.folder / output
            for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                if file.is_file():
                    found[str(file.relative_to(self.folder))] = file_digest(file)
        return found


def file_digest(path: Path) -> str:
    """sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.new")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def claim(folder: Path, recipe: str, *, overwrite: bool) -> Iterator[Ledger]:
    """The folder's ledger, while no other run writes to it.

    Args:
        recipe: the resolved recipe as YAML; written to `recipe.yaml`.
        overwrite: accept a folder that holds a run of another recipe; what differs is done again.

    Raises:
        OutputError: the folder is no folder, holds other files, another run's results, or a run that is still going.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; pass a folder with -o")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be made ({error.strerror})") from error
    kept = folder / RECIPE
    present = {path.name for path in folder.iterdir()} - {".lock", f".{RECIPE}.new"}
    if present and RECIPE not in present:
        names = ", ".join(sorted(present)[:3])
        raise OutputError(f"{folder} holds files of something else ({names} …); pass an empty or a new folder with -o")
    if RECIPE in present and not overwrite and kept.read_text(encoding="utf-8") != recipe:
        changed = _differences(kept.read_text(encoding="utf-8"), recipe)
        raise OutputError(
            f"{folder} holds another run ({changed}). Pass another folder with -o, or --overwrite to do again what differs"
        )
    with _open_lock(folder) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(f"{folder} is being written by another dq-export; wait for it, or pass another folder") from error
        write_text(kept, recipe)
        yield Ledger(folder)


def _open_lock(folder: Path) -> TextIO:
    try:
        return (folder / ".lock").open("w")
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        raise OutputError(f"{folder}: cannot be written ({error.strerror}); pass another folder with -o") from error


def _differences(old: str, new: str) -> str:
    before, after = old.splitlines(), new.splitlines()
    return "; ".join(f"{a.strip()} -> {b.strip()}" for a, b in zip(before, after, strict=False) if a != b)[:300] or "other rules"
