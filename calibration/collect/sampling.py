"""Which pictures a calibration samples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The pictures that calibration samples: `calib_size` of them, of each condition in turn, from one seed, `batch` per call.

    Args:
        sizes: height and width in pixels, of each batch in turn; none: the network's own.
    """

    calib_size: int
    steps: int
    seed: int
    guidance: float
    conditions: int
    batch: int = 8
    sizes: tuple[tuple[int, int], ...] = ()

    @property
    def batches(self) -> int:
        """The number of runs of the sampler."""
        return -(-self.calib_size // self.batch)

    @property
    def calls(self) -> int:
        """The number of network calls."""
        return self.steps * self.batches

    def size(self, batch: int) -> tuple[int, int] | None:
        """Height and width of a batch's pictures; None: the network's own."""
        return self.sizes[batch % len(self.sizes)] if self.sizes else None

    def pictures(self, batch: int) -> tuple[npt.NDArray[np.int64], int]:
        """(index of each picture's condition, seed) of a batch. They do not depend on the number of later batches."""
        start = batch * self.batch
        conditions = np.arange(start, min(start + self.batch, self.calib_size), dtype=np.int64) % self.conditions
        return conditions, self.seed + start
