"""What calibration needs from a model: the protocol that every model family implements."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

Float32 = npt.NDArray[np.float32]
Fold = Literal["modulation", "value", "explicit"]
Observer = Callable[[str, "torch.Tensor"], None]


@dataclass(frozen=True, kw_only=True)
class InputSite:
    """One tensor that quantized linears read, and where its equivalent scaling goes.

    Args:
        name: unique, stable: the first reader's module name.
        linears: module names of all readers; they share one activation scale, in_scale and in_shift.
        fold: `modulation`: into the rows of an adaLN linear (rule F1); `value`: into the rows of the value projection
            (F2); `explicit`: stays in the graph as (x - in_shift) / in_scale (F3).
        producer: module name of the linear whose rows absorb the scaling; empty for `explicit`.
        shift_rows, scale_rows: for `modulation`, the producer's output rows that make b and g of x * (1 + g) + b.
    """

    name: str
    linears: tuple[str, ...]
    fold: Fold
    producer: str = ""
    shift_rows: tuple[int, int] = (0, 0)
    scale_rows: tuple[int, int] = (0, 0)


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A linear layer of the network.

    Args:
        name: its module name; the quantized GEMM's node bears it.
        kind: `gemm`: works on all tokens; `modulation`: works on one vector per sample; `edge`: embedders and final layers.
        width: number of its inputs.
    """

    name: str
    kind: Literal["gemm", "modulation", "edge"]
    width: int


class Denoiser(Protocol):
    """A float reference network with its sampler. Tensors are float32 unless said otherwise."""

    @property
    def sites(self) -> tuple[InputSite, ...]:
        """Inputs of all `gemm` linears, in execution order."""

    @property
    def linears(self) -> Mapping[str, Linear]:
        """Every linear of the network by module name, in execution order."""

    @property
    def attention(self) -> tuple[tuple[str, str, str], ...]:
        """Module names of the query, key and value projection of every attention."""

    @property
    def batch(self) -> int:
        """Pictures that are sampled together: as many as keep the activations small beside the weights, 8 at most."""

    def weight(self, linear: str) -> Float32:
        """float32[out, in]; a view where possible."""

    def bias(self, linear: str) -> Float32:
        """float32[out]; zeros where it has none."""

    def trajectory(self, labels: npt.NDArray[np.int64], *, steps: int, seed: int, guidance: float) -> Iterator[float]:
        """Sample one picture a label with guidance on the reference; yields each timestep before its network call."""

    def replace(
        self, weights: Mapping[str, Float32], biases: Mapping[str, Float32], rounded: Callable[[str, Float32, float], Float32]
    ) -> AbstractContextManager[None]:
        """While active, linears have other weights and biases, and every site's readers read
        `rounded(site.name, float32[rows, K], timestep)` in place of the input; observers see what came before it."""

    def observe(self, observer: Observer) -> AbstractContextManager[None]:
        """While active, every site's input goes to `observer(site.name, float32[rows, K])` at each network call."""
