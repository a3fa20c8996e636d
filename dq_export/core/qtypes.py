"""Element types of quantized tensors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class QuantType:
    """An element type of codes. A real value is `scale * (code - zero_point)` with `qmin <= code <= qmax`.

    Exactness: lossy by design; the rounding error of an integer type inside the range is at most scale / 2, that of a
    float type with m mantissa bits 2^-(m+1) of the value.
    Source: ONNX QuantizeLinear; OCP OFP8 for E4M3. `qmin` is -127 for int8 and -7 for int4, so that codes are symmetric
    and `scale = amax / qmax` (ONNX itself would allow -128 and -8). int6 is int8 clipped: ONNX has no such type.

    Args:
        name: as ONNX and numpy's extension types call it.
        mantissa: bits of a float type's mantissa; 0 for integers.
        min_exponent: exponent of a float type's least normal number.
    """

    name: str
    bits: int
    qmin: int
    qmax: int
    zero_point: int = 0
    mantissa: int = 0
    min_exponent: int = 0

    @property
    def is_float(self) -> bool:
        """Whether codes are floating-point numbers."""
        return self.mantissa > 0

    @property
    def stored_bits(self) -> int:
        """Bits that a code takes in a file: ONNX packs types of up to 4 bits, and every other one here has a byte."""
        return 4 if self.bits <= 4 else 8

    def round(self, values: Float32) -> Float32:
        """float32: each value (already divided by its scale) as the nearest code, ties to even, clipped."""
        if self.is_float:
            exponent = np.maximum(np.frexp(values)[1] - 1, self.min_exponent) - self.mantissa
            rounded = np.ldexp(np.rint(np.ldexp(values, -exponent)), exponent)
        else:
            rounded = np.rint(values)
        clipped: Float32 = np.clip(rounded, self.qmin, self.qmax, out=rounded)
        return clipped


INT8 = QuantType(name="int8", bits=8, qmin=-127, qmax=127)
UINT8 = QuantType(name="uint8", bits=8, qmin=1, qmax=255, zero_point=128)
INT6 = QuantType(name="int6", bits=6, qmin=-31, qmax=31)
INT4 = QuantType(name="int4", bits=4, qmin=-7, qmax=7)
FP8 = QuantType(name="float8_e4m3fn", bits=8, qmin=-448, qmax=448, mantissa=3, min_exponent=-6)
QUANT_TYPES = (INT8, UINT8, INT6, INT4, FP8)
