"""Where the equivalent scaling of a site goes, and what it makes of the tensors that take it up: the algebra, once.

A site's input x becomes y = (x - m) / s. Its readers undo that, and the parts of its fold bring it about.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.floating]
Kind = Literal["linear", "convolution", "norm", "constant", "vector", "token"]
FREE: tuple[Kind, ...] = ("linear", "convolution", "norm", "constant")
"""Kinds whose scaling is held by a stored tensor, so that nothing is left to compute."""
ROWS: tuple[Kind, ...] = ("linear", "convolution")
"""Kinds that are rows of a weight, which may be quantized."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One tensor that takes up a share of a site's scaling: v becomes (v + plus - m) / s, m where `shift`.

    Args:
        kind: `linear`: rows of a GEMM's weight and of its bias; `convolution`: the same of a convolution; `norm`: gain and
            bias of a normalization; `constant`: a stored operand. Where no stored tensor can take it, a Mul (and an Add)
            is left in the graph: `vector`: on one row a sample; `token`: on all tokens or pixels.
        name: the module's name of a linear or convolution; of all others the name of the graph's value.
        rows: the outputs of it that change, (start, stop).
        channels: the site's channels that they make, (start, stop), as many.
        shift: whether it takes up the shift, too.
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
    """Where a site's scaling goes: parts that cover each of its channels.

    Args:
        parts: the tensors that take it up; none where another site's parts scale this one's input as well.
        shifts: whether the input can be shifted at all: a factor cannot take up a shift.
    """

    parts: tuple[Part, ...]
    shifts: bool = True

    @property
    def kind(self) -> Literal["free", "vector", "token"]:
        """What it costs at run time: nothing, operations on one row a sample, or operations on all tokens."""
        kinds = {part.kind for part in self.parts}
        return "token" if "token" in kinds else "vector" if "vector" in kinds else "free"

    @property
    def target(self) -> str:
        """What takes up the scaling, in words."""
        left = {"token": "a Mul on all tokens", "vector": "a Mul on one row a sample"}
        return ", ".join(dict.fromkeys(left.get(part.kind, part.name) for part in self.parts))

    def of_kind(self, kind: Kind) -> tuple[Part, ...]:
        """The parts of a kind."""
        return tuple(part for part in self.parts if part.kind == kind)

    def rows_of(self, linear: str) -> tuple[Part, ...]:
        """The parts that are rows of a linear or a convolution."""
        return tuple(part for part in self.parts if part.kind in ROWS and part.name == linear)


def explicit(name: str, width: int) -> Fold:
    """A fold that leaves (x - m) / s in the graph, in front of the linear `name` of so many inputs."""
    return Fold(parts=(Part(kind="token", name=name, rows=(0, width), channels=(0, width), shift=True),))


def read_weight(weight: Float, in_scale: Float) -> Float:
    """[out, K] or [out, K, height, width]: the weight of a site's reader, which undoes the scale."""
    scaled: Float = weight * in_scale.reshape(-1, *[1] * (weight.ndim - 2))
    return scaled


def read_bias(bias: Float, weight: Float, in_shift: Float) -> Float:
    """[out]: the bias of a site's reader, which undoes the shift. `weight`: [out, K], not scaled by `read_weight`."""
    moved: Float = bias + weight.astype(np.float64) @ in_shift
    return moved
