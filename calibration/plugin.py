"""The interface of a user's own method: it may change weights before they are rounded, and the Hessians of the rounding."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]


class WeightPlugin(Protocol):
    """Methods such as OAC or GuidedQuant, which weigh errors by their own Hessians, and CondiQuant, which moves weights first."""

    @property
    def name(self) -> str:
        """Identifies the method and its settings: when it changes, the export is repeated."""

    def prepare(self, linear: str, weight: Float32) -> Float32:
        """float32[out, in]: the weight to quantize instead of `weight`; return `weight` to change nothing."""

    def hessian(self, linear: str, streamed: Float32 | None, in_scale: Float32) -> Float32 | None:
        """float32[in, in] for the rounding, of the scaled input x / in_scale; return `streamed` to change nothing.

        Args:
            streamed: the mean of x x^T over the quantized, scaled input; None with rounding `rtn`, which streams none, and
                for linears whose input is not observed (modulation).
        """


class Unchanged:
    """No plug-in."""

    name = ""

    def prepare(self, linear: str, weight: Float32) -> Float32:
        """The weight."""
        return weight

    def hessian(self, linear: str, streamed: Float32 | None, in_scale: Float32) -> Float32 | None:
        """The streamed Hessian."""
        return streamed


UNCHANGED = Unchanged()
