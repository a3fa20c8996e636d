"""What has been done in an output folder: stages are finished whole or not at all, and never done twice."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from dq_export.core.digest import file_digest
from dq_export.core.documents import YAML_LIMIT, DocumentError, parse_yaml, printable, read_json, read_text, shown, shown_path

from .output_folder import PARTIAL, OutputError, locked, make, move, names, remove, require_free, require_plain, write_text

RECIPE = "recipe.yaml"
LEDGER = "stages.json"
LEDGER_LIMIT = 64 << 20
"""Bytes: the ledger holds the audit of every GEMM, and the report is written from it."""


class Result(BaseModel):
    """What a stage leaves beside its files. A stage that leaves more has a subclass.

    Args:
        seconds: that the work took.
        summary: for the progress line.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    seconds: float = 0.0
    summary: str = ""


R = TypeVar("R", bound=Result)


class Record(BaseModel):
    """A finished stage."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    inputs: str
    """sha256 of all that the outputs depend on."""
    outputs: dict[str, str]
    """sha256 of every file that it made, by path in the output folder."""
    result: dict[str, Any]
    """What it returned, as JSON."""


class Ledger:
    """The finished stages of one output folder, kept in `stages.json`.

    A stage writes into a folder of its own, from which its outputs are renamed into place; then it is recorded with the
    hashes of its inputs and outputs. A run that was killed leaves no half output that a later run takes for whole.
    The file is not trusted: a stage that it describes badly is done again. So are all stages of a version that described
    them in another way.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stages = _read(folder / LEDGER)

    def stage(
        self, name: str, kind: type[R], inputs: Mapping[str, Any], outputs: tuple[str, ...], work: Callable[[Path], R]
    ) -> tuple[R, bool]:
        """The result of a stage, and whether it was done now rather than before.

        Args:
            kind: the type of its result.
            inputs: all that the outputs depend on, JSON values.
            outputs: files or folders that the stage makes.
            work: makes them in the folder that it gets.
        """
        key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
        earlier = self._reusable(name, kind, key, outputs)
        if earlier is not None:
            return earlier, False
        partial = self.folder / PARTIAL
        remove(partial)
        partial.mkdir()
        try:
            result = work(partial)
            if self.stages.pop(name, None) is not None:
                self._save()
            for output in outputs:
                move(partial / output, self.folder / output)
        finally:
            remove(partial)
        self.stages[name] = Record(inputs=key, outputs=self._hashes(outputs), result=result.model_dump(mode="json"))
        self._save()
        return result, True

    def _reusable(self, name: str, kind: type[R], key: str, outputs: tuple[str, ...]) -> R | None:
        """What an earlier run of the stage returned, if its inputs and outputs are the same."""
        record = self.stages.get(name)
        if record is None or record.inputs != key or record.outputs != self._hashes(outputs):
            return None
        try:
            return kind.model_validate(record.result)
        except ValidationError:
            return None

    def digest(self, name: str) -> str:
        """A hash of a finished stage's outputs, for the inputs of later stages."""
        return hashlib.sha256(json.dumps(self.stages[name].outputs, sort_keys=True).encode()).hexdigest()

    def _save(self) -> None:
        content = {name: stage.model_dump(mode="json") for name, stage in self.stages.items()}
        write_text(self.folder / LEDGER, json.dumps(content, indent=1, allow_nan=False) + "\n")

    def _hashes(self, outputs: tuple[str, ...]) -> dict[str, str]:
        hashes = {}
        for output in outputs:
            path = self.folder / output
            for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                if file.is_file():
                    hashes[str(file.relative_to(self.folder))] = file_digest(file)
        return hashes


def _read(path: Path) -> dict[str, Record]:
    """The stages that the file describes well."""
    stages = {}
    try:
        content = read_json(path, LEDGER_LIMIT, links=False)
    except DocumentError:
        return {}
    for name, value in content.items() if isinstance(content, dict) else ():
        try:
            stages[name] = Record.model_validate(value)
        except ValidationError:
            continue
    return stages


def require_usable(folder: Path) -> None:
    """Refuse early what `claim` would refuse whatever the recipe is. Nothing is made or changed.

    Raises:
        OutputError: the folder holds links, or files of something else; or another run writes to it.
    """
    if not os.path.isdir(folder):  # which, unlike Path.is_dir, takes any name
        return
    require_plain(folder)
    present = names(folder)
    if present and RECIPE not in present:
        raise OutputError(
            f"{shown_path(folder)} holds files of something else ({', '.join(present[:3])} …); pass an empty or a new folder "
            "with -o"
        )
    require_free(folder)


@contextmanager
def claim(folder: Path, recipe: str, *, overwrite: bool) -> Iterator[Ledger]:
    """The folder's ledger, while no other run writes to it.

    Args:
        recipe: the resolved recipe as YAML; written to `recipe.yaml`.
        overwrite: accept a folder that holds a run of another recipe; what differs is done again.

    Raises:
        OutputError: the path is not a folder, or holds links, other files, another run's results, or a run in progress.
    """
    require_usable(folder)
    make(folder)
    if (folder / RECIPE).exists() and not overwrite:
        _require_same(folder, recipe)
    with locked(folder):
        for path in folder.glob(".*.new"):  # of a run that was killed
            remove(path)
        write_text(folder / RECIPE, recipe)
        yield Ledger(folder)


def _require_same(folder: Path, recipe: str) -> None:
    try:
        earlier, source = read_text(folder / RECIPE, YAML_LIMIT, links=False), shown_path(folder / RECIPE)
        changed = [] if earlier == recipe else _differences(parse_yaml(earlier, source), parse_yaml(recipe, "the recipe"))
    except DocumentError as error:
        raise OutputError(f"{error}; pass another folder with -o, or --overwrite") from error
    if changed:
        raise OutputError(
            f"{shown_path(folder)} holds another run ({printable('; '.join(changed))}). Pass another folder with -o, or "
            "--overwrite to do again what differs"
        )


def _differences(old: object, new: object) -> list[str]:
    """What differs between two recipes, by key; null is as good as no key, so that an option may be added to the product."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return [f"{shown(old)} -> {shown(new)}"] if old != new else []
    keys = [*new, *(key for key in old if key not in new)]
    pairs = [(key, old.get(key), new.get(key)) for key in keys]
    return [f"{key}: {shown(before)} -> {shown(after)}" for key, before, after in pairs if before != after]
