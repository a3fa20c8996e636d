"""One safetensors file, written with the mode that other files get and read as plain arrays."""

from __future__ import annotations

import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .documents import DocumentError, MissingError, shown_path


def save_tensors(path: Path, tensors: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, str] | None = None) -> None:
    """Write arrays by name; equal arrays give equal bytes."""
    from safetensors.numpy import save_file

    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path, metadata=dict(metadata or {}) or None)
    path.chmod(mode)  # safetensors makes files that their owner alone can read


@dataclass(frozen=True, kw_only=True)
class TensorFile:
    """A safetensors file whose tensors are read one at a time.

    Args:
        kinds: by name the element type, as safetensors calls it (`F32`, `I8` …), and the shape.
        metadata: texts by key.
    """

    path: Path
    kinds: Mapping[str, tuple[str, tuple[int, ...]]]
    metadata: Mapping[str, str]

    def read(self, name: str) -> npt.NDArray[Any]:
        """The array of a name.

        Raises:
            DocumentError: the file changed since it was opened, or numpy does not have the element type.
        """
        with _opened(self.path) as file:
            array: npt.NDArray[Any] = file.get_tensor(name)
        return array


def open_tensors(path: Path) -> TensorFile:
    """What a safetensors file holds, its arrays unread.

    Raises:
        MissingError, DocumentError: see `load_tensors`.
    """
    with _opened(path) as file:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        kinds = {name: (str(part.get_dtype()), tuple(part.get_shape())) for name, part in parts.items()}
        return TensorFile(path=path, kinds=kinds, metadata=dict(file.metadata() or {}))


def load_tensors(path: Path) -> tuple[dict[str, npt.NDArray[Any]], dict[str, str]]:
    """The arrays and the metadata of a safetensors file.

    Raises:
        MissingError: no such file.
        DocumentError: no regular file, no safetensors, or an element type that numpy does not have.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """An open safetensors file; what safetensors raises on a damaged one becomes a DocumentError."""
    from safetensors import SafetensorError, safe_open

    try:
        if not path.is_file():
            problem = "not a regular file" if path.exists() else "no such file"
            raise (DocumentError if path.exists() else MissingError)(f"{shown_path(path)}: {problem}")
        with safe_open(path, framework="numpy") as file:
            yield file
    except (SafetensorError, OSError, TypeError, AttributeError) as error:  # the last two: bfloat16 and float8
        raise DocumentError(f"{shown_path(path)}: not readable as safetensors ({error})") from error
