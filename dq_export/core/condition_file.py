"""Conditions as one safetensors file: for each input a tensor [N, ...], and `null.<input>` [1, ...] for guidance."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from .documents import DocumentError, parse_json, shown, shown_path
from .network import Axis, Conditions, Feed, Input
from .tensor_file import load_tensors, save_tensors

CONDITIONS = "conditions.safetensors"
"""Its name in an output folder."""
NULL = "null."
"""Prefix of an input's name for its row without a condition."""
PROMPTS = "prompts"
"""Key of the metadata: a JSON list of the conditions' names."""


def save_conditions(path: Path, conditions: Conditions) -> None:
    """Write conditions; equal conditions give equal bytes."""
    null = {f"{NULL}{name}": rows for name, rows in conditions.null.items()}
    save_tensors(path, {**conditions.arrays, **null}, {PROMPTS: json.dumps(list(conditions.names))})


def load_conditions(path: Path) -> Conditions:
    """The conditions in a file of any origin. `misfit` says whether a network takes them.

    Conditions without names in the metadata are numbered, from 1.

    Raises:
        DocumentError: it is not a safetensors file, it has no conditions, or its arrays have different lengths.
    """
    tensors, metadata = load_tensors(path)
    arrays = {name: rows for name, rows in tensors.items() if not name.startswith(NULL)}
    null = {name.removeprefix(NULL): rows for name, rows in tensors.items() if name.startswith(NULL)}
    counts = {name: rows.shape[0] if rows.ndim else 0 for name, rows in arrays.items()}
    if not counts or 0 in counts.values():
        raise DocumentError(
            f"{shown_path(path)}: no conditions; expected a tensor [N, ...] for each of the network's condition inputs"
        )
    if len(set(counts.values())) > 1:
        first = sorted(counts.items())[:3]
        text = ", ".join(f"{count} of {shown(name)}" for name, count in first) + (" …" if len(counts) > 3 else "")
        raise DocumentError(f"{shown_path(path)}: rows: {text}; expected as many of each")
    names = _names(metadata.get(PROMPTS), next(iter(counts.values())), shown_path(path))
    return Conditions(names=names, arrays=arrays, null=null)


def misfit(conditions: Conditions, inputs: Sequence[Input], *, guided: bool) -> str:
    """Why a network does not take conditions; empty if it does.

    Args:
        inputs: the inputs of the network.
        guided: whether rows without a condition are needed.
    """
    if guided and not conditions.null:
        names = ", ".join(f"{NULL}{item.name} [1, ...]" for item in inputs if item.role == "condition")
        return f"no {names}, which guidance above 1 needs; add it, or pass --guidance-scale 1"
    return next(_misfits(conditions, [item for item in inputs if item.role == "condition"]), "")


def _misfits(conditions: Conditions, inputs: Sequence[Input]) -> Iterator[str]:
    sizes: dict[str, tuple[int, str]] = {}
    for arrays, front, count in ((conditions.arrays, "", len(conditions)), (conditions.null, NULL, 1)):
        if not arrays:  # a null row without guidance is not needed
            continue
        expected = {f"{front}{item.name}" for item in inputs}
        present = {f"{front}{name}" for name in arrays}
        if expected != present:
            yield f"holds {_listed(present)}; expected {_listed(expected)}, the network's condition inputs"
            return
        for item in inputs:
            yield from _row_misfits(f"{front}{item.name}", item, arrays, count, sizes)


def _row_misfits(name: str, item: Input, arrays: Feed, count: int, sizes: dict[str, tuple[int, str]]) -> Iterator[str]:
    """Of one tensor. Enters in `sizes` what each axis measures, and by which tensor."""
    rows = arrays[item.name]
    if rows.dtype != np.dtype(item.dtype):
        yield f"{name} is {rows.dtype}; expected {item.dtype}"
    fits = rows.ndim == len(item.shape) and len(rows) == count
    for axis, size in zip(item.shape[1:], rows.shape[1:], strict=False):
        fits = fits and (axis.takes(size) if isinstance(axis, Axis) else size == axis)
    if not fits:
        yield f"{name} has shape {shown(list(rows.shape))}; expected [{', '.join(map(str, (count, *item.shape[1:])))}]"
        return
    for axis, size in zip(item.shape[1:], rows.shape[1:], strict=True):
        if isinstance(axis, Axis):
            first, owner = sizes.setdefault(axis.name, (size, name))
            if first != size:
                yield f"{name} has {axis.name} {size}, and {owner} has {axis.name} {first}; expected the same"
    finite = np.isfinite(rows).reshape(count, -1).all(axis=1)
    if not finite.all():
        yield f"{name} has NaN or Inf in row {np.argmin(finite)}"


def _listed(names: set[str]) -> str:
    return ", ".join(shown(name) for name in sorted(names)[:6]) or "no tensor"


def _names(text: str | None, count: int, place: str) -> tuple[str, ...]:
    if text is None:
        return tuple(map(str, range(1, count + 1)))
    names = parse_json(text, f"{PROMPTS} of {place}")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DocumentError(f"{place}: {PROMPTS} in its metadata is not a JSON list of texts")
    if len(names) != count:
        raise DocumentError(f"{place}: {len(names)} {PROMPTS} in its metadata for {count} conditions")
    return tuple(names)
