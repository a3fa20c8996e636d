"""Random pictures, masks and outlines, for networks that read pictures."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

from .reference import Float32

if TYPE_CHECKING:
    import torch

PATCHES = 8
"""Patches of a random picture along a side; the latents of each are equal, as in a picture's smooth parts."""
POWERS = (2, 2, 64, 64)
"""Shapes of a picture of outlines: |y|^p + |x|^p < 1 is an ellipse at 2, and at 64 nearly a box."""
LINE = 1.0
"""Half of the width of an outline, in pixels."""


def generators_of(noise: Float32) -> list[torch.Generator]:
    """A generator for each picture, seeded by its noise: what it draws does not depend on the pictures beside it."""
    import torch

    return [torch.Generator().manual_seed(zlib.crc32(row.tobytes())) for row in noise]


def random_pictures(shape: tuple[int, ...], generators: list[torch.Generator]) -> torch.Tensor:
    """Latents of pictures, float32[P, C, h, w] of mean 0 and variance 1, in patches of one colour.

    Args:
        shape: (C, h, w).
    """
    import torch

    colours = [torch.randn(shape[0], PATCHES, PATCHES, generator=generator) for generator in generators]
    return torch.nn.functional.interpolate(torch.stack(colours), size=shape[1:], mode="nearest")


def random_masks(shape: tuple[int, ...], generators: list[torch.Generator]) -> torch.Tensor:
    """float32[P, 1, h, w]: 1 in a rectangle whose sides are a quarter to three quarters of the picture's, 0 around it.

    Args:
        shape: (C, h, w).
    """
    import torch

    masks = torch.zeros(len(generators), 1, *shape[1:])
    for mask, generator in zip(masks, generators, strict=True):
        rows, columns = (_part(size, generator) for size in shape[1:])
        mask[:, rows, columns] = 1
    return masks


def _part(size: int, generator: Any) -> slice:
    import torch

    length = int(torch.randint(max(size // 4, 1), 3 * size // 4 + 1, (), generator=generator))
    start = int(torch.randint(0, size - length + 1, (), generator=generator))
    return slice(start, start + length)


def outlines(height: int, width: int, generators: list[torch.Generator]) -> torch.Tensor:
    """float32[P, 3, H, W]: the outlines of random boxes and ellipses, white on black, as an edge detector puts them out.

    Args:
        height, width: in pixels.
    """
    import torch

    pictures = torch.zeros(len(generators), 3, height, width)
    for picture, generator in zip(pictures, generators, strict=True):
        for power in POWERS:
            places, radii = torch.rand(2, 2, generator=generator)
            across = [
                ((torch.arange(size) + 0.5 - size * place).abs(), size * (1 + 3 * radius) / 8)
                for size, place, radius in zip((height, width), places, radii, strict=True)
            ]
            outer, inner = (_inside(across, line, power) for line in (LINE, -LINE))
            picture[:, outer & ~inner] = 1
    return pictures


def _inside(across: list[tuple[torch.Tensor, torch.Tensor]], line: float, power: int) -> torch.Tensor:
    """bool[H, W]: where a shape lies whose radii are longer by a line."""
    rows, columns = ((distance / (radius + line)) ** power for distance, radius in across)
    return rows[:, None] + columns[None] < 1
