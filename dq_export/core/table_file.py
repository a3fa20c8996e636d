"""A file of scale tables and weights that another tool trained: its header, and its tensors one at a time. See docs/tables.md."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .documents import DocumentError, parse_json, printable, shown, shown_path
from .tensor_file import TensorFile, open_tensors, save_tensors
from .violations import ERRORS, nearest, violations

Array = npt.NDArray[Any]
Timestep = Annotated[float, Field(allow_inf_nan=False, ge=-1e9, le=1e9)]
KEY = "dq_export_import"
"""Of the metadata: the header, as JSON."""
FORMAT: Literal["dq-export import 1"] = "dq-export import 1"
PARTS: dict[str, tuple[str, ...]] = {
    "activation.scale": ("F32",),
    "activation.zero_point": ("F32",),
    "weight": ("F32",),
    "weight.codes": ("I8", "U8"),
    "weight.scale": ("F32",),
    "weight.zero_point": ("F32",),
    "weight.multiplier": ("I8",),
    "bias": ("F32",),
    "in_scale": ("F32",),
    "in_shift": ("F32",),
}
"""What follows a linear's name in the names of its tensors, and the element types that the tensor may have."""
NEEDS = {
    "activation.zero_point": "activation.scale",
    "weight.codes": "weight.scale",
    "weight.scale": "weight.codes",
    "weight.zero_point": "weight.codes",
    "weight.multiplier": "weight.codes",
}
"""A part, and another without which it says nothing."""
POSITIVE = ("activation.scale", "weight.scale", "weight.multiplier", "in_scale")


class Codes(BaseModel):
    """The codes of a tensor: x = scale * (code - zero_point).

    Args:
        bits: of a code.
        signed: codes are -2^(bits-1) … 2^(bits-1) - 1, else 0 … 2^bits - 1.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: int = Field(ge=2, le=8)
    signed: bool

    def __str__(self) -> str:
        return f"{self.bits} bits {'signed' if self.signed else 'unsigned'}, {self.lowest} … {self.greatest}"

    @property
    def lowest(self) -> int:
        """The lowest code."""
        return -(1 << self.bits - 1) if self.signed else 0

    @property
    def greatest(self) -> int:
        """The greatest code."""
        return self.lowest + (1 << self.bits) - 1


class Entry(BaseModel):
    """What the header says of a linear: the codes of its input and of its weight, where the file has them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    activation: Codes | None = None
    weight: Codes | None = None


class Header(BaseModel):
    """The header of a file.

    Args:
        method: what trained it, for the report.
        timesteps: of the tables' rows, ascending, as the network's timestep input receives them.
        linears: by module name; everything that the file says of a linear is beside its name here.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["dq-export import 1"] = FORMAT
    method: str = Field(min_length=1, max_length=60)
    timesteps: tuple[Timestep, ...] = Field(min_length=1, max_length=1000)
    linears: dict[str, Entry] = Field(min_length=1)


@dataclass(frozen=True, kw_only=True, eq=False)
class TableFile:
    """A file whose header and tensors fit each other. Whether a network takes it, `calibration/table_checks.py` says."""

    tensors: TensorFile
    header: Header

    def shape(self, linear: str, part: str) -> tuple[int, ...] | None:
        """The shape of a part; None where the file does not have it."""
        kind = self.tensors.kinds.get(f"{linear}.{part}")
        return None if kind is None else kind[1]

    def read(self, linear: str, part: str) -> Array | None:
        """A part; None where the file does not have it.

        Raises:
            DocumentError: the file changed since it was opened.
        """
        name = f"{linear}.{part}"
        return self.tensors.read(name) if name in self.tensors.kinds else None


def save_table_file(path: Path, header: Header, tensors: Mapping[str, Array]) -> None:
    """Write a file; `tensors` by `<linear>.<part>`, parts and types as in PARTS."""
    save_tensors(path, tensors, {KEY: json.dumps(header.model_dump(exclude_none=True), sort_keys=True)})


def load_table_file(path: Path) -> TableFile:
    """Open a file, whoever wrote it, and look at every tensor once.

    Raises:
        DocumentError: no safetensors file, no header, or tensors that are not what the header says; a line for each fault, the
            first ten.
    """
    tensors = open_tensors(path)
    file = TableFile(tensors=tensors, header=_header(tensors))
    faults = [*_schedule_faults(file.header), *_name_faults(file)]
    if not faults:  # then every tensor is of a type that can be read
        faults = [fault for name, entry in file.header.linears.items() for fault in _value_faults(file, name, entry)]
    if faults:
        raise DocumentError(listed(faults, shown_path(path)))
    return file


def listed(faults: list[str], place: str) -> str:
    """A line for each fault, the first ERRORS."""
    more = [f"and {len(faults) - ERRORS} more"] * (len(faults) > ERRORS)
    return "\n".join(f"{place}: {fault}" for fault in [*faults[:ERRORS], *more])


def _header(tensors: TensorFile) -> Header:
    place = shown_path(tensors.path)
    text = tensors.metadata.get(KEY)
    if text is None:
        raise DocumentError(f"{place}: no '{KEY}' in its metadata; a file of tables has its header there, see docs/tables.md")
    values = parse_json(text, f"header of {place}")
    if not isinstance(values, dict):
        raise DocumentError(f"{place}: its header is not a JSON object")
    try:
        return Header.model_validate(values)
    except ValidationError as error:
        valid = {"": list(Header.model_fields), "linears": ["activation", "weight", *Codes.model_fields]}
        raise DocumentError(violations(error, f"header of {place}", valid)) from error


def _schedule_faults(header: Header) -> Iterator[str]:
    """The graph compares timesteps in float32, with edges half way between them."""
    steps = np.asarray(header.timesteps, dtype=np.float32)
    edges = ((np.asarray(header.timesteps)[1:] + np.asarray(header.timesteps)[:-1]) / 2).astype(np.float32)
    wrong = np.flatnonzero((np.diff(steps) <= 0) | (np.diff(edges, prepend=np.float32(-np.inf)) <= 0))
    if len(wrong):
        first = int(wrong[0])
        yield (
            f"timesteps must be distinct and ascend, found {header.timesteps[first]:g} before {header.timesteps[first + 1]:g}; "
            "sort the rows of every table by timestep"
        )


def _name_faults(file: TableFile) -> Iterator[str]:
    """Tensors of no linear and no part, of other types, or without what they need."""
    kinds, linears = file.tensors.kinds, file.header.linears
    part_of = {f"{linear}.{part}": (linear, part) for linear in linears for part in PARTS}
    for name, (dtype, _) in kinds.items():
        if name not in part_of:
            yield f"tensor {shown(name)} is of no linear of the header.{nearest(name, list(part_of))}"
            continue
        linear, part = part_of[name]
        if dtype not in PARTS[part]:
            yield f"tensor {shown(name)} is {dtype}; expected {' or '.join(PARTS[part])}"
        if (needed := NEEDS.get(part)) and f"{linear}.{needed}" not in kinds:
            yield f"tensor {shown(name)} needs '{linear}.{needed}', which is not there"
        if part == "weight" and f"{linear}.weight.codes" in kinds:
            yield f"{shown(linear)} has a weight and codes of one; give one of them"
    for linear, entry in linears.items():
        yield from _entry_faults(linear, entry, [part for part in PARTS if f"{linear}.{part}" in kinds])


def _entry_faults(linear: str, entry: Entry, parts: list[str]) -> Iterator[str]:
    if not parts:
        yield f"the header lists {shown(linear)}, of which there is no tensor"
    for key, part, present in (
        ("activation", "activation.scale", entry.activation is not None),
        ("weight", "weight.codes", entry.weight is not None),
    ):
        if present != (part in parts):
            stated, missing = (f"'{key}' in the header", f"tensor '{part}'")
            if not present:
                stated, missing = missing, stated
            yield f"{shown(linear)} has {stated} and no {missing}"


def _value_faults(file: TableFile, linear: str, entry: Entry) -> Iterator[str]:
    for part in PARTS:
        values = file.read(linear, part)
        if values is None:
            continue
        name = printable(f"{linear}.{part}", 120)
        if not values.size:
            yield f"{name} is empty"
        elif not np.isfinite(values).all():
            yield f"{name} has NaN or Inf"
        elif part in POSITIVE and not (values > 0).all():
            yield f"{name} has {float(values.min()):g}; expected > 0"
        elif part in ("weight.codes", "weight.zero_point", "activation.zero_point"):
            codes = entry.activation if part.startswith("activation") else entry.weight
            assert codes is not None  # `_entry_faults`
            low, high = float(values.min()), float(values.max())
            if part.endswith("zero_point"):
                low, high = round(low), round(high)
            if low < codes.lowest or high > codes.greatest:
                yield f"{name} reaches {low:g} … {high:g}; its codes are {codes}: state the right bits and sign in the header"
