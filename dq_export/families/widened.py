"""Convert weights of half precision to float32 in a file and map them from there, because memory could not hold both."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dq_export.core.documents import shown_path

from ..heap import large_blocks_mapped
from .reference import ModelError

ALIGNED = 64
"""The alignment of every tensor, in bytes."""


def widened(tensors: Mapping[str, Any], place: Path | None) -> dict[str, Any]:
    """float32 copies of torch tensors, mapped from an unnamed file, which is deleted with them.

    One tensor at a time is in memory. Later changes of a copy stay in memory and do not reach the file.

    Args:
        place: the folder whose disk holds the file; None for the system's folder for temporary files.

    Raises:
        ModelError: the file cannot be created there, or the disk has too little space.
    """
    import torch

    folder = place or Path(tempfile.gettempdir())
    size, starts = sum(4 * tensor.numel() + ALIGNED for tensor in tensors.values()), {}
    try:
        free = shutil.disk_usage(folder).free
        if size > free:
            raise ModelError(
                f"{shown_path(folder)}: {free / 1e9:.1f} GB are free, and the checkpoint's weights take {size / 1e9:.1f} GB as "
                "float32; free some"
            )
        with large_blocks_mapped(), tempfile.TemporaryFile(dir=folder) as file:
            for name, tensor in tensors.items():
                starts[name] = file.tell()
                file.write(tensor.to(torch.float32).contiguous().numpy())
                file.write(bytes(ALIGNED - file.tell() % ALIGNED))
            file.flush()
            content = np.memmap(file, dtype=np.uint8, mode="c")
    except OSError as error:
        raise ModelError(f"{shown_path(folder)}: cannot hold the weights as float32 ({error.strerror})") from error
    copies = {}
    for name, tensor in tensors.items():
        part = content[starts[name] : starts[name] + 4 * tensor.numel()].view(np.float32)
        copies[name] = torch.from_numpy(part.reshape(tuple(tensor.shape)))
    return copies
