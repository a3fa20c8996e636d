"""Timestep bins and the scale tables that they index."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from .qtypes import INT8, QuantType

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class TimestepBins:
    """Half-open intervals that cover every timestep a scheduler can send.

    Bin 0 is (-inf, edges[0]), bin i is [edges[i-1], edges[i]), the last is [edges[-1], inf). No edges: one bin (static).
    A bin is found by the timestep's value, never by a step counter, so another step count or scheduler still lands in
    the right one.

    Args:
        edges: strictly increasing, finite, in the unit of the timestep.

    Raises:
        ValueError: edges not finite or not strictly increasing.
    """

    edges: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not all(np.isfinite(self.edges)):
            raise ValueError(f"edges must be finite, found {self.edges}")
        if any(b <= a for a, b in zip(self.edges, self.edges[1:], strict=False)):
            raise ValueError(f"edges must increase strictly, found {self.edges}")

    def __len__(self) -> int:
        return len(self.edges) + 1

    def index(self, timestep: npt.ArrayLike) -> Int64:
        """The bin of each timestep, int64 of the same shape."""
        return np.searchsorted(np.asarray(self.edges, dtype=np.float64), timestep, side="right").astype(np.int64)

    def union(self, other: TimestepBins) -> TimestepBins:
        """The coarsest bins that refine both."""
        return TimestepBins(edges=tuple(sorted({*self.edges, *other.edges})))

    def representatives(self) -> tuple[float, ...]:
        """One timestep inside each bin: its lower edge, and for bin 0 a value below the first edge."""
        if not self.edges:
            return (0.0,)
        return (float(np.nextafter(self.edges[0], -np.inf)), *self.edges)


@dataclass(frozen=True, kw_only=True, eq=False)
class ScaleTable:
    """One per-tensor activation scale for each timestep bin; a static scale is a table with one bin.

    Args:
        scale: float32[B], finite and > 0: real units per code. Never amax: each scale method documents its denominator.
        bins: the B bins.
        qtype: element type; its zero_point is the table's.

    Raises:
        ValueError: wrong shape or dtype, or a scale that is not finite and positive.
    """

    scale: Float32
    bins: TimestepBins = field(default_factory=TimestepBins)
    qtype: QuantType = INT8

    def __post_init__(self) -> None:
        if self.scale.dtype != np.float32 or self.scale.shape != (len(self.bins),):
            raise ValueError(f"scale must be float32[{len(self.bins)}], found {self.scale.dtype}{list(self.scale.shape)}")
        if not (np.isfinite(self.scale).all() and (self.scale > 0).all()):
            raise ValueError(f"every scale must be finite and > 0, found {self.scale[~(self.scale > 0)].tolist()}")
        self.scale.setflags(write=False)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ScaleTable):
            return NotImplemented
        return self.bins == other.bins and self.qtype == other.qtype and np.array_equal(self.scale, other.scale)

    def __hash__(self) -> int:
        return hash((self.bins, self.qtype, self.scale.tobytes()))

    def at(self, timestep: float) -> float:
        """The scale that a network call at `timestep` uses."""
        return float(self.scale[self.bins.index(timestep)])

    def nearest(self, rows: Float32, timestep: npt.ArrayLike) -> Float32:
        """float32[R, K]: rows[R, K] rounded to the table's codes and back; `timestep`: of all rows, or float[R]."""
        scale = self.scale[self.bins.index(timestep)]
        step = scale[:, None] if scale.ndim else scale
        return self.qtype.round((rows / step).astype(np.float32, copy=False)) * step

    def resample(self, bins: TimestepBins) -> ScaleTable:
        """The same table over finer bins. Exactness: the scale of every timestep is unchanged.

        Raises:
            ValueError: `bins` lacks an edge of this table.
        """
        missing = set(self.bins.edges) - set(bins.edges)
        if missing:
            raise ValueError(f"bins must refine the table's, missing edges {sorted(missing)}")
        scale = self.scale[self.bins.index(np.asarray(bins.representatives()))]
        return ScaleTable(scale=scale, bins=bins, qtype=self.qtype)


@dataclass(frozen=True, kw_only=True)
class TokenScale:
    """A scale for each token, or for each token and group of inputs, found when the engine runs: clip * amax / qmax.

    Args:
        constant: for the graph, which brings every token to the range of one constant scale: that scale, > 0.
        group: inputs that share a scale; 0: all of a token's. Groups are rounded inside the kernel.
        clip: share of a token's amax that is kept; what lies beyond saturates.
        qtype: element type of the codes.

    Raises:
        ValueError: a constant that is not finite and positive, or a clip outside 0 … 1.
    """

    constant: float
    group: int = 0
    clip: float = 1.0
    qtype: QuantType = INT8

    def __post_init__(self) -> None:
        if not (np.isfinite(self.constant) and self.constant > 0 and 0 < self.clip <= 1):
            raise ValueError(f"constant must be finite and > 0 and clip in 0 … 1, found {self.constant} and {self.clip}")

    @property
    def bins(self) -> TimestepBins:
        """One: nothing depends on the timestep."""
        return TimestepBins()

    def nearest(self, rows: Float32, timestep: npt.ArrayLike = 0.0) -> Float32:
        """float32[R, K]: rows[R, K] rounded to the codes of their own scales and back."""
        groups = rows.reshape(len(rows), -1, self.group or rows.shape[1])
        step = np.abs(groups).max(axis=2, keepdims=True) * np.float32(self.clip / self.qtype.qmax)
        step = np.where(step > 0, step, np.float32(1.0))
        rounded: Float32 = (self.qtype.round(groups / step) * step).reshape(rows.shape)
        return rounded
