"""Samplers as tables of coefficients. They are read with numpy alone, and without pickle."""

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
"""The columns of a table, in order; see `Step`."""
FILE = "schedules.npy"
HEADER = re.compile(rb"\{'descr': '<f8', 'fortran_order': False, 'shape': \(([0-9]{1,9}), ([0-9]{1,9}), ([0-9]{1,9})\), \} *\n")
"""The header that `save` writes between the first ten bytes and the numbers."""


class ScheduleError(ValueError):
    """There is no such sampler, or not for this number of steps; the message names those that exist."""


@dataclass(frozen=True)
class Step:
    """One step of a sampler that is linear in the latents and outputs of this step and the one before.

    X are the latents and E is the network's output for `input` * X at `timestep`. X' and E' are those of the step before:

        next X = x * X + e * E + x_before * X' + e_before * E'
        predicted picture = clean_x * X + clean_e * E

    Args:
        timestep: timestep that the network receives.
        noise: factor of the unit noise that sampling starts from; the same in all steps.
        input: factor of the latents in the network's input.
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
        """Return the next latents, with the shape of `x`.

        Exactness: float32, one rounding per term.
        """
        latents = self.x * x + self.e * e
        if self.x_before or self.e_before:
            latents += self.x_before * x_before + self.e_before * e_before
        return latents

    def clean(self, x: Float32, e: Float32) -> Float32:
        """Return the picture that the network predicts at this step, with the shape of `x`."""
        return self.clean_x * x + self.clean_e * e


@dataclass(frozen=True)
class Schedules:
    """The tables of all samplers, for all numbers of steps.

    Args:
        tables: float64[steps * (steps + 1) / 2, 9] by name: the row of 1 step, the rows of 2 steps, and so on. Rows are NaN if
            the sampler does not support that number of steps.
    """

    tables: Mapping[str, Float64]

    @staticmethod
    def load(path: Path, names: Sequence[str]) -> Schedules:
        """Read a file that `save` wrote.

        Raises:
            ScheduleError: see `parse`.
        """
        return Schedules.parse(path.read_bytes(), names)

    @staticmethod
    def parse(content: bytes, names: Sequence[str]) -> Schedules:
        """Parse the content of a file that `save` wrote. It has numpy's format with exactly this header.

        Raises:
            ScheduleError: the header is another, the length does not fit it, or there is not one table for each name.
        """
        length = int.from_bytes(content[8:10], "little")
        header = HEADER.fullmatch(content[10 : 10 + length])
        if content[:8] != b"\x93NUMPY\x01\x00" or not header:
            raise ScheduleError("expected float64 tables in numpy's format, version 1, found another format")
        shape = tuple(int(size) for size in header.groups())
        if len(content) != 10 + length + 8 * math.prod(shape):
            raise ScheduleError(f"{len(content)} bytes do not hold tables of shape {shape}: damaged, or cut short")
        if len(set(names)) != shape[0] or shape[2] != len(COLUMNS) or shape[1] == 0:
            raise ScheduleError(f"expected {len(set(names))} tables of {len(COLUMNS)} columns, found {shape}")
        tables = np.frombuffer(content, dtype="<f8", offset=10 + length).reshape(shape)
        return Schedules(dict(zip(names, tables, strict=True)))

    def save(self, path: Path) -> None:
        """Write all tables, in order, without their names; the same tables give the same bytes."""
        np.save(path, np.stack(list(self.tables.values())))

    @property
    def max_steps(self) -> int:
        """The greatest number of steps in the tables."""
        rows = max(len(table) for table in self.tables.values())
        return int((np.sqrt(8 * rows + 1) - 1) / 2)

    def steps(self, name: str, count: int) -> tuple[Step, ...]:
        """Return the steps of one sampler.

        Raises:
            ScheduleError: there is no such sampler, or not for `count` steps.
        """
        if name not in self.tables:
            raise ScheduleError(f"scheduler {name[:40]!r}: expected {', '.join(self.tables)}")
        if not 1 <= count <= self.max_steps:
            raise ScheduleError(f"num_inference_steps {count}: expected 1 to {self.max_steps}")
        start = count * (count - 1) // 2
        rows = self.tables[name][start : start + count]
        if not np.isfinite(rows).all():
            raise ScheduleError(f"num_inference_steps {count}: scheduler '{name}' does not support so many")
        return tuple(Step(*map(float, row)) for row in rows)
