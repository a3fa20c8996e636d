"""Codes of a calibration file that stay on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .artifacts import CalibrationError, CalibrationResult
from .documents import DocumentError
from .tensor_file import open_tensors

SUFFIX = ".weight.codes"


class StoredCodes(Mapping[str, npt.NDArray[np.int8]]):
    """Codes by linear, int8[out, in]. Each access reads one linear's codes, so they take no memory while they are not used.

    Raises:
        DocumentError: the file is missing or not readable.
    """

    def __init__(self, path: Path) -> None:
        self.file = open_tensors(path)
        self.names = [name.removesuffix(SUFFIX) for name in self.file.kinds if name.endswith(SUFFIX)]

    def __getitem__(self, linear: str) -> npt.NDArray[np.int8]:
        name = f"{linear}{SUFFIX}"
        if name not in self.file.kinds:
            raise KeyError(linear)
        try:
            return self.file.read(name)
        except DocumentError as error:
            raise CalibrationError(str(error)) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def load_without_codes(path: Path) -> CalibrationResult:
    """Read what `CalibrationResult.save` wrote, except for codes, which are read when they are used.

    Raises:
        CalibrationError: see `CalibrationResult.load`.
    """
    return replace(CalibrationResult.load(path), codes=StoredCodes(path))
