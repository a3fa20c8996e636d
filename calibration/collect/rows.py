"""The rows of a site that a network call contributes to sums over its inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

GOLDEN = (5**0.5 - 1) / 2
"""Its multiples, without their whole parts, are spread over 0 to 1 however many there are."""


def spread(count: int, limit: int) -> torch.Tensor:
    """int64[min(count, limit)]: ascending indices of rows, one in each of `limit` equal parts, at another place in each part.

    Rows are often the pixels of pictures, line after line. A fixed step is a multiple of many pictures' width, and would find
    one column alone: at the border, where a third of each patch of 3 x 3 is padding.
    """
    import torch

    if count <= limit:
        return torch.arange(count)
    bounds = np.arange(limit + 1) * count // limit
    places = np.arange(limit) * GOLDEN % 1
    return torch.from_numpy(bounds[:-1] + (places * np.diff(bounds)).astype(np.int64))
