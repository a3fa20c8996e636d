"""The fold of a site: the tensors that absorb its equivalent scaling, and the algebra of how they change.

A site's input x becomes y = (x - m) / s. The parts of its fold apply the scaling, and its readers undo it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.floating]
Kind = Literal["linear", "convolution", "norm", "constant", "vector", "token"]
FREE: tuple[Kind, ...] = ("linear", "convolution", "norm", "constant")
"""Kinds whose scaling a stored tensor absorbs, so that it costs nothing at run time."""
ROWS: tuple[Kind, ...] = ("linear", "convolution")
"""Kinds that are rows of a weight, which may be quantized."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One tensor that absorbs a share of a site's scaling: v becomes (v + plus - m) / s, with m only if `shift`.

    Args:
        kind: `linear`: rows of a GEMM's weight and of its bias; `convolution`: the same of a convolution; `norm`: gain and
            bias of a normalization; `constant`: a stored operand. If no stored tensor can absorb it, a Mul (and an Add)
            stays in the graph: `vector`: on one row per sample; `token`: on all tokens or pixels.
        name: the module's name of a linear or convolution; for other kinds the name of the graph's value.
        rows: the range of its outputs that change, (start, stop).
        channels: the range of the site's channels that they compute, (start, stop), of equal length.
        shift: whether it absorbs the shift, too.
        plus: a constant that the graph adds to it, which moves into its bias.
    """

    kind: Kind
    name: str
    rows: tuple[int, int]
    channels: tuple[int, int]
    shift: bool = False
    plus: float = 0.0

    def divided(self, gain: Float, in_scale: Float) -> Float:
        """A gain [K], or a weight [out, ...], with `rows` of its first axis divided by the scale; others are not touched."""
        changed: Float = gain.copy()
        rows = changed[slice(*self.rows)]
        rows /= in_scale[slice(*self.channels)].reshape(-1, *[1] * (gain.ndim - 1))
        return changed

    def moved(self, value: Float, in_scale: Float, in_shift: Float) -> Float:
        """A bias [out], or results [..., out], with `rows` of its last axis shifted and divided; others are not touched."""
        changed: Float = value.copy()
        channels = slice(*self.channels)
        rows = changed[..., slice(*self.rows)]
        if self.plus:
            rows += self.plus
        if self.shift:
            rows -= in_shift[channels]
        rows /= in_scale[channels]
        return changed


@dataclass(frozen=True, kw_only=True)
class Fold:
    """The parts that absorb a site's scaling; together they cover all its channels.

    Args:
        parts: the tensors that absorb it; empty if another site's parts scale this site's input as well.
        shifts: whether the input can be shifted; a factor cannot absorb a shift.
    """

    parts: tuple[Part, ...]
    shifts: bool = True

    @property
    def kind(self) -> Literal["free", "vector", "token"]:
        """The cost at run time: nothing, operations on one row per sample, or operations on all tokens."""
        kinds = {part.kind for part in self.parts}
        return "token" if "token" in kinds else "vector" if "vector" in kinds else "free"

    @property
    def target(self) -> str:
        """A description of what absorbs the scaling."""
        left = {"token": "a Mul on all tokens", "vector": "a Mul on one row a sample"}
        return ", ".join(dict.fromkeys(left.get(part.kind, part.name) for part in self.parts))

    def taps(self, width: int) -> int:
        """How many of the `width` elements that a reader takes belong to each channel: of a convolution's patch, else 1."""
        return width // max((part.channels[1] for part in self.parts), default=width)

    def of_kind(self, kind: Kind) -> tuple[Part, ...]:
        """The parts of a kind."""
        return tuple(part for part in self.parts if part.kind == kind)

    def rows_of(self, linear: str) -> tuple[Part, ...]:
        """The parts that are rows of a linear or a convolution."""
        return tuple(part for part in self.parts if part.kind in ROWS and part.name == linear)


def explicit(name: str, width: int) -> Fold:
    """A fold that leaves (x - m) / s in the graph, before the linear `name` with `width` inputs."""
    return Fold(parts=(Part(kind="token", name=name, rows=(0, width), channels=(0, width), shift=True),))


def read_weight(weight: Float, in_scale: Float) -> Float:
    """[out, K] or [out, K, height, width]: the weight of a site's reader, which undoes the scale."""
    scaled: Float = weight * in_scale.reshape(-1, *[1] * (weight.ndim - 2))
    return scaled


def read_bias(bias: Float, weight: Float, in_shift: Float) -> Float:
    """[out]: the bias of a site's reader, which undoes the shift. `weight`: [out, K], not scaled by `read_weight`."""
    moved: Float = bias + weight.astype(np.float64) @ in_shift
    return moved
