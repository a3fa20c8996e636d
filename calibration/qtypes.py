"""Element types of quantized tensors and the granularities of their scales: one table, no ifs elsewhere."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class QuantType:
    """An integer element type. A real value is `scale * (code - zero_point)` with `qmin <= code <= qmax`.

    Exactness: lossy by design; the rounding error of a value inside the range is at most scale / 2.
    Source: ONNX QuantizeLinear. `qmin` is -127 for int8, so that codes are symmetric and `scale = amax / 127`
    (ONNX itself would allow -128).
    """

    name: str
    bits: int
    qmin: int
    qmax: int
    zero_point: int


INT8 = QuantType(name="int8", bits=8, qmin=-127, qmax=127, zero_point=0)
UINT8 = QuantType(name="uint8", bits=8, qmin=1, qmax=255, zero_point=128)
QUANT_TYPES = (INT8, UINT8)


@dataclass(frozen=True, kw_only=True)
class PerAxis:
    """One scale for each index of `axis`."""

    axis: int

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Tensor shape -> `(shape[axis],)`."""
        return (shape[self.axis],)


@dataclass(frozen=True, kw_only=True)
class Blocked:
    """One scale for each run of `block_size` elements along `axis` (ONNX opset 21 blocked quantization)."""

    axis: int
    block_size: int

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Tensor shape -> the same shape with `axis` divided by `block_size`.

        Raises:
            ValueError: `block_size` does not divide `shape[axis]`; runtimes then disagree on the blocks.
        """
        if self.block_size < 1 or shape[self.axis] % self.block_size:
            raise ValueError(f"block_size {self.block_size} must divide axis {self.axis} of shape {shape}")
        divided = list(shape)
        divided[self.axis] //= self.block_size
        return tuple(divided)
