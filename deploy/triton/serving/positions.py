"""The inputs of a network whose tokens have no order of their own: where each of them lies in the picture or in the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .schedules import Float32

PICTURE_WORDS, TEXT_WORDS = ("zero", "row", "column"), ("zero", "place")
"""What a column of positions holds."""


def picture_positions(columns: Sequence[str], height: int, width: int) -> Float32:
    """Return float32[height * width, len(columns)], row by row of the picture.

    Args:
        columns: of PICTURE_WORDS.
    """
    rows, places = np.indices((height, width), dtype=np.float32).reshape(2, -1)
    return _stacked(columns, {"row": rows, "column": places}, height * width)


def text_positions(columns: Sequence[str], length: int) -> Float32:
    """Return float32[length, len(columns)].

    Args:
        columns: of TEXT_WORDS.
    """
    return _stacked(columns, {"place": np.arange(length, dtype=np.float32)}, length)


def _stacked(columns: Sequence[str], values: Mapping[str, Float32], count: int) -> Float32:
    zeros = np.zeros(count, dtype=np.float32)
    return np.stack([values.get(name, zeros) for name in columns], axis=1)
