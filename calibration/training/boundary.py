"""Outputs of a block for every sample, on disk in half precision."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..collect.records import RecordFile

if TYPE_CHECKING:
    import torch

Tensors = Sequence["torch.Tensor"]


class Boundary:
    """A file of a block's output tensors. Each sample is stored as float16 times its own power of two.

    Exactness: an error of at most 2^-11 of the value, or 2^-24 of the sample's largest value.

    Args:
        shapes: shapes of the tensors of one sample.
    """

    def __init__(self, path: Path, shapes: Sequence[tuple[int, ...]]) -> None:
        self.shapes = tuple(shapes)
        sizes = {f"{part}{i}": size for i, shape in enumerate(shapes) for part, size in (("e", 1), ("x", int(np.prod(shape))))}
        self.file = RecordFile(path, sizes, np.float16)

    def write(self, rows: npt.NDArray[np.int64], tensors: Tensors) -> None:
        """Write the tensors of some samples, each [len(rows), ...].

        Raises:
            OSError: no space is left.
        """
        parts = []
        for tensor in tensors:
            values = tensor.detach().flatten(1).float().cpu().numpy()
            exponent = np.frexp(np.abs(values).max(axis=1, keepdims=True))[1]
            parts += [exponent.astype(np.float16), np.ldexp(values, -exponent).astype(np.float16)]
        for row, record in zip(rows, np.concatenate(parts, axis=1), strict=True):
            self.file.write_record(int(row), record)

    def read(self, rows: npt.NDArray[np.int64]) -> list[torch.Tensor]:
        """Read the tensors of some samples, float32.

        Raises:
            CalibrationError: the file was cut short.
        """
        import torch

        records = np.stack([self.file.read_record(int(row)) for row in rows])
        tensors, place = [], 0
        for shape in self.shapes:
            size = int(np.prod(shape))
            exponent = records[:, place : place + 1].astype(np.int32)
            values = np.ldexp(records[:, place + 1 : place + 1 + size].astype(np.float32), exponent)
            tensors.append(torch.from_numpy(values.reshape(len(rows), *shape)))
            place += 1 + size
        return tensors
