"""Samplers as tables of coefficients, read by value and without any library but numpy."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
COLUMNS = ("timestep", "noise", "input", "x", "e", "x_before", "e_before", "clean_x", "clean_e")
"""Of one step, in order; see `Step`."""
FILE = "schedules.npy"
HEADER = re.compile(rb"\{'descr': '<f8', 'fortran_order': False, 'shape': \(([0-9]{1,9}), ([0-9]{1,9}), ([0-9]{1,9})\), \} *\n")
"""What `save` writes before the numbers, after ten bytes."""


class ScheduleError(ValueError):
    """No such sampler, or none of so many steps; the message names what there is."""


@dataclass(frozen=True)
class Step:
    """One step of a sampler that is linear in what it has seen, two steps deep.

    With latents X and the output E of the network, which is called with `input` * X at `timestep`, and X', E' of the step before:

        next X = x * X + e * E + x_before * X' + e_before * E'
        predicted picture = clean_x * X + clean_e * E

    Args:
        timestep: what the network receives.
        noise: factor of the unit noise that the first step starts from; the same in all steps.
        input: factor of the latents that the network receives.
    """

    timestep: float
    noise: float
    input: float
    x: float
    e: float
    x_before: float
    e_before: float
    clean_x: float
    clean_e: float

    def advance(self, x: Float32, e: Float32, x_before: Float32, e_before: Float32) -> Float32:
        """The next latents, of the shape of `x`.

        Exactness: float32, a rounding a term.
        """
        moved = self.x * x + self.e * e
        if self.x_before or self.e_before:
            moved += self.x_before * x_before + self.e_before * e_before
        return moved

    def clean(self, x: Float32, e: Float32) -> Float32:
        """The picture that the network predicts at this step, of the shape of `x`."""
        return self.clean_x * x + self.clean_e * e


@dataclass(frozen=True)
class Schedules:
    """The tables of every sampler for every number of steps.

    Args:
        tables: by name, float64[steps * (steps + 1) / 2, 9]: the rows of 1 step, of 2 steps, and so on; NaN where the
            sampler cannot take so many.
    """

    tables: Mapping[str, Float64]

    @staticmethod
    def load(path: Path, names: Sequence[str]) -> Schedules:
        """Read what `save` wrote.

        Raises:
            ScheduleError: see `parse`.
        """
        return Schedules.parse(path.read_bytes(), names)

    @staticmethod
    def parse(content: bytes, names: Sequence[str]) -> Schedules:
        """The tables of a file that `save` wrote: numpy's format, of which nothing but this one header is read.

        Raises:
            ScheduleError: another header, fewer or more bytes than it says, or not one table for each name.
        """
        length = int.from_bytes(content[8:10], "little")
        header = HEADER.fullmatch(content[10 : 10 + length])
        if content[:8] != b"\x93NUMPY\x01\x00" or not header:
            raise ScheduleError("expected float64 tables in numpy's format, version 1, found another file")
        shape = tuple(int(size) for size in header.groups())
        if len(content) != 10 + length + 8 * math.prod(shape):
            raise ScheduleError(f"{len(content)} bytes are not those of tables of shape {shape}: damaged, or cut short")
        if len(set(names)) != shape[0] or shape[2] != len(COLUMNS) or shape[1] == 0:
            raise ScheduleError(f"expected {len(set(names))} tables of {len(COLUMNS)} columns, found {shape}")
        tables = np.frombuffer(content, dtype="<f8", offset=10 + length).reshape(shape)
        return Schedules(dict(zip(names, tables, strict=True)))

    def save(self, path: Path) -> None:
        """Write all tables, in order, without their names; the same tables give the same bytes."""
        np.save(path, np.stack(list(self.tables.values())))

    @property
    def most(self) -> int:
        """The greatest number of steps."""
        rows = max(len(table) for table in self.tables.values())
        return int((np.sqrt(8 * rows + 1) - 1) / 2)

    def steps(self, name: str, count: int) -> tuple[Step, ...]:
        """The steps of one sampler.

        Raises:
            ScheduleError: no such sampler, or none of `count` steps.
        """
        if name not in self.tables:
            raise ScheduleError(f"scheduler {name[:40]!r}: expected {', '.join(self.tables)}")
        if not 1 <= count <= self.most:
            raise ScheduleError(f"num_inference_steps {count}: expected 1 to {self.most}")
        start = count * (count - 1) // 2
        rows = self.tables[name][start : start + count]
        if not np.isfinite(rows).all():
            raise ScheduleError(f"num_inference_steps {count}: scheduler '{name}' cannot take so many")
        return tuple(Step(*map(float, row)) for row in rows)
