"""Weights of half precision as float32 in a file, from which they are mapped: in memory they would take twice the checkpoint."""

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
"""Bytes that every tensor starts at a multiple of."""


def widened(tensors: Mapping[str, Any], place: Path | None) -> dict[str, Any]:
    """float32 copies of torch tensors, mapped from a file without a name, which ends with them.

    One tensor at a time is in memory. What is written to a copy stays in memory, not in the file.

    Args:
        place: the folder whose disk holds the file; None: the system's folder for temporary files.

    Raises:
        ModelError: no file can be made there, or the disk has too little room.
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
    found = {}
    for name, tensor in tensors.items():
        part = content[starts[name] : starts[name] + 4 * tensor.numel()].view(np.float32)
        found[name] = torch.from_numpy(part.reshape(tuple(tensor.shape)))
    return found
