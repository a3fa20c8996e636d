"""Scale methods: from the statistics of a timestep to its scale. `METHODS` lists them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from dq_export.core.plugins import PluginError, load_plugins
from dq_export.core.qtypes import INT8, QuantType
from dq_export.core.recipe import Recipe

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
CLIP_RATIOS = np.linspace(0.3, 1.0, 71)


def minmax(amax: Float32, counts: Int64, recipe: Recipe, qtype: QuantType = INT8) -> Float32:
    """scale[t] = amax[t] / qmax: nothing is clipped."""
    scale: Float32 = (amax / qtype.qmax).astype(np.float32)
    return scale


def percentile(amax: Float32, counts: Int64, recipe: Recipe, qtype: QuantType = INT8) -> Float32:
    """scale[t] = p / qmax, where p is the upper edge of the histogram cell that holds the percentile of |x| at timestep t.

    Exactness: within one cell, amax[t] / 2048.
    """
    cumulated = np.cumsum(counts, axis=1)
    reached = cumulated >= np.ceil(cumulated[:, -1:] * (recipe.percentile / 100.0))
    cell = reached.argmax(axis=1) + 1
    scale: Float32 = (amax * (cell / counts.shape[1]) / qtype.qmax).astype(np.float32)
    return scale


def mse(amax: Float32, counts: Int64, recipe: Recipe, qtype: QuantType = INT8) -> Float32:
    """scale[t] = r * amax[t] / qmax with the ratio r in 0.30 … 1.00 that has the least mean squared error at timestep t.

    The error of a cell is that of its centre: the clipping error above r * amax, otherwise the rounding error. There are 2048
    cells and 127 int8 codes, so a code covers 16 cells at r = 1 and 5 cells at r = 0.3.
    """
    cells = counts.shape[1]
    centre = (np.arange(cells) + 0.5) / cells
    errors = []
    for ratio in CLIP_RATIOS:
        step = ratio / qtype.qmax
        rounded = qtype.round((centre / step).astype(np.float32)) * step
        errors.append(counts @ (centre - rounded) ** 2)
    best = CLIP_RATIOS[np.argmin(np.asarray(errors), axis=0)]
    scale: Float32 = (amax * best / qtype.qmax).astype(np.float32)
    return scale


Method = Callable[[Float32, Int64, Recipe, QuantType], Float32]
"""(amax float32[T], counts int64[T, cells] of |x| over [0, amax], recipe, element type) -> scale float32[T]."""
METHODS: dict[str, Method] = {"minmax": minmax, "percentile": percentile, "mse": mse}


def method_of(name: str) -> Method:
    """The method of a name, from dq-export or from a plug-in; the scales of a plug-in are checked.

    Raises:
        PluginError: a plug-in cannot be used.
    """
    if name in METHODS:
        return METHODS[name]
    method: Method = load_plugins("methods", Callable, METHODS)[name]

    def checked(amax: Float32, counts: Int64, recipe: Recipe, qtype: QuantType) -> Float32:
        scale: object = method(amax, counts, recipe, qtype)
        if not isinstance(scale, np.ndarray):
            raise PluginError(f"plug-in method '{name}': expected float32{list(amax.shape)}, found {type(scale).__name__}")
        if scale.shape != amax.shape or scale.dtype != np.float32 or not (np.isfinite(scale) & (scale > 0)).all():
            raise PluginError(
                f"plug-in method '{name}': expected float32{list(amax.shape)}, finite and > 0, found {scale.dtype}"
                f"{list(scale.shape)} from {scale.min() if scale.size else 'nothing'}"
            )
        return scale

    return checked
