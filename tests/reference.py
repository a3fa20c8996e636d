"""A slow, obvious numpy oracle of quantization. It shares no code with the product."""

from __future__ import annotations

import numpy as np


def round_half_even(value: float) -> int:
    """Python's own round is half to even."""
    return round(value)


def onnx_codes(x: np.ndarray, scale: float) -> np.ndarray:
    """int8 codes as ONNX QuantizeLinear makes them with zero point 0: float32 division, saturation at -128 … 127."""
    flat = [min(127, max(-128, round_half_even(float(np.float32(v) / np.float32(scale))))) for v in x.ravel()]
    return np.asarray(flat, dtype=np.int64).reshape(x.shape)


def weight_codes(weight_kn: np.ndarray, scale_n: np.ndarray) -> np.ndarray:
    """int8 codes of weight[K, N] with one scale for each column, in -127 … 127."""
    codes = np.zeros(weight_kn.shape, dtype=np.int64)
    for k in range(weight_kn.shape[0]):
        for n in range(weight_kn.shape[1]):
            codes[k, n] = min(127, max(-127, round_half_even(float(np.float32(weight_kn[k, n]) / np.float32(scale_n[n])))))
    return codes


def bin_of(timestep: float, edges: list[float]) -> int:
    """How many edges are at or below the timestep."""
    return sum(1 for edge in edges if edge <= timestep)
