"""Records on disk: statistics of calibration that take no memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dq_export.core.artifacts import CalibrationError


class RecordFile:
    """A file of equal records, each an array of numbers for every name; read and written one array at a time.

    Nothing is mapped or cached in the process, so its memory does not grow with the records.

    Args:
        path: created if it does not exist; existing content is kept.
        sizes: how many numbers a record holds for each name.
        dtype: the type of all numbers.
    """

    def __init__(self, path: Path, sizes: Mapping[str, int], dtype: npt.DTypeLike) -> None:
        self.dtype = np.dtype(dtype)
        self.sizes = dict(sizes)
        ends = np.cumsum([0, *self.sizes.values()]) * self.dtype.itemsize
        self._starts = dict(zip(self.sizes, ends[:-1].tolist(), strict=True))
        self._record = int(ends[-1])
        self._path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)

    def write(self, record: int, name: str, values: npt.NDArray[np.generic]) -> None:
        """Write one name's array into a record.

        Raises:
            OSError: no space left.
        """
        self._write(record * self._record + self._starts[name], values)

    def read(self, record: int, name: str) -> npt.NDArray[np.generic]:
        """One name's array of a record that was written.

        Raises:
            CalibrationError: the file is shorter than it should be.
        """
        return self._read(record * self._record + self._starts[name], self.sizes[name])

    @property
    def length(self) -> int:
        """How many numbers a record holds."""
        return self._record // self.dtype.itemsize

    def read_record(self, record: int) -> npt.NDArray[np.generic]:
        """All numbers of a record that was written, in the order of the names.

        Raises:
            CalibrationError: the file is shorter than it should be.
        """
        return self._read(record * self._record, self.length)

    def write_record(self, record: int, values: npt.NDArray[np.generic]) -> None:
        """Write all numbers of a record."""
        self._write(record * self._record, values)

    def __del__(self) -> None:
        os.close(self._file)

    def _read(self, place: int, count: int) -> npt.NDArray[np.generic]:
        content = os.pread(self._file, count * self.dtype.itemsize, place)
        if len(content) != count * self.dtype.itemsize:
            folder = self._path.parent
            raise CalibrationError(f"{self._path}: cut short; delete {folder} and run the same command again")
        return np.frombuffer(content, dtype=self.dtype)

    def _write(self, place: int, values: npt.NDArray[np.generic]) -> None:
        content = memoryview(np.ascontiguousarray(values, dtype=self.dtype).tobytes())
        while content:
            written = os.pwrite(self._file, content, place)
            content, place = content[written:], place + written


def merge(
    file: RecordFile, written: list[bool], reduce: Callable[[npt.NDArray[np.generic]], npt.NDArray[np.generic]], absent: float
) -> None:
    """Reduce every record over the processes. `written` says which records this process has; `absent` replaces the others."""
    for record, present in enumerate(written):
        values = file.read_record(record) if present else np.full(file.length, absent, dtype=file.dtype)
        file.write_record(record, reduce(values))
