"""What a user's own method may put in between: other weights before they are rounded, other Hessians to round by."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]


class WeightPlugin(Protocol):
    """Methods such as OAC or GuidedQuant, which weigh errors by their own Hessians, and CondiQuant, which moves weights first."""

    @property
    def name(self) -> str:
        """Identifies method and settings: an export is done again when it changes."""

    def prepare(self, linear: str, weight: Float32) -> Float32:
        """float32[out, in]: what is quantized in place of a linear's weight; the weight itself to change nothing."""

    def hessian(self, linear: str, streamed: Float32 | None, in_scale: Float32) -> Float32 | None:
        """float32[in, in] to round by, over the scaled input x / in_scale; `streamed` to change nothing.

        Args:
            streamed: the mean of x x^T over the quantized, scaled input; None where rounding `rtn` streams none, or where
                the linear's input is not watched (modulation).
        """


class Unchanged:
    """No plug-in."""

    name = ""

    def prepare(self, linear: str, weight: Float32) -> Float32:
        """The weight."""
        return weight

    def hessian(self, linear: str, streamed: Float32 | None, in_scale: Float32) -> Float32 | None:
        """The streamed one."""
        return streamed


UNCHANGED = Unchanged()
