"""Scales, scalings and weights that another tool trained; they replace decisions of calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dq_export.core.artifacts import SitePlan
from dq_export.core.folding import row_factors
from dq_export.core.grid import WeightGrid
from dq_export.core.network import Denoiser
from dq_export.core.qtypes import INT8, QuantType
from dq_export.core.scales import ScaleTable
from dq_export.core.table_file import TableFile

from .scaling import Scaling
from .table_checks import centred_codes

Float32 = npt.NDArray[np.float32]
Rounded = tuple[WeightGrid, npt.NDArray[np.int8]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Tables:
    """The decisions of a file that fits the network and the recipe.

    Args:
        file: the file; None if there is none.
        scalings: by site whose scaling the file fixes.
        activations: by site.
    """

    file: TableFile | None = None
    scalings: Mapping[str, Scaling] = field(default_factory=dict)
    activations: Mapping[str, ScaleTable] = field(default_factory=dict)

    def weight(self, linear: str, weight: Float32, in_scale: Float32) -> Float32:
        """float32[out, in]: the weight to round instead of a linear's `weight`, or `weight` itself if the file has none.

        Args:
            in_scale: of the linear's input; the file's weight applies to the scaled input.
        """
        imported = None if self.file is None else self.file.read(linear, "weight")
        return weight if imported is None else (imported / in_scale).astype(np.float32, copy=False)

    def has_weight(self, linear: str) -> bool:
        """Whether the file has a float weight of the linear, which is still to be rounded."""
        return self.file is not None and self.file.shape(linear, "weight") is not None

    def rounded(self, linear: str, qtype: QuantType, plans: Sequence[SitePlan]) -> Rounded | None:
        """The grid and the codes int8[out, in] of a linear if the file has its codes, otherwise None.

        Args:
            plans: the scalings that touch its weight. Scalings of its output divide rows, which changes only the scales.
        """
        if self.file is None or self.file.shape(linear, "weight.codes") is None:
            return None
        scale, multiplier = self.file.read(linear, "weight.scale"), self.file.read(linear, "weight.multiplier")
        assert scale is not None  # the file's own check
        rows = row_factors(linear, scale.shape[-1], plans)
        grid = WeightGrid(scale=(scale * rows).astype(np.float32), qtype=qtype, multiplier=multiplier)
        return grid, centred_codes(self.file, linear).astype(np.int8)

    def corrections(self, denoiser: Denoiser, plans: Mapping[str, Sequence[SitePlan]]) -> dict[str, Float32]:
        """For each linear, float32[out]: the correction of its folded bias, which is computed from the checkpoint's W and b.

        With the file's W' and b' and the input's shift m it is (b' - b + (W' - W) m) / the rows' scaling.

        Args:
            plans: by linear, the scalings that touch its weight.
        """
        changes = {}
        for linear in self.file.header.linears if self.file else ():
            change = self._change(denoiser, linear, plans.get(linear, ()))
            if change is not None and change.any():
                changes[linear] = (change * row_factors(linear, len(change), plans.get(linear, ()))).astype(np.float32)
        return changes

    def _change(self, denoiser: Denoiser, linear: str, plans: Sequence[SitePlan]) -> npt.NDArray[np.float64] | None:
        assert self.file is not None
        bias, change = self.file.read(linear, "bias"), None
        if bias is not None:
            change = bias.astype(np.float64) - denoiser.bias(linear)
        site_plan = next((plan for plan in plans if linear in plan.site.linears), None)
        if site_plan is not None and site_plan.in_shift.any():
            before = denoiser.weight(linear)
            after = self.weight(linear, before, site_plan.in_scale)
            if self.file.shape(linear, "weight.codes") is not None:
                after = self._dequantized(linear) / site_plan.in_scale
            moved = (after.astype(np.float64) - before) @ site_plan.in_shift
            change = moved if change is None else change + moved
        return change

    def _dequantized(self, linear: str) -> Float32:
        assert self.file is not None
        scale, multiplier = self.file.read(linear, "weight.scale"), self.file.read(linear, "weight.multiplier")
        assert scale is not None  # the file's own check
        codes = centred_codes(self.file, linear)
        grid = WeightGrid(scale=scale, qtype=INT8, multiplier=multiplier)
        weight: Float32 = (codes * grid.steps(codes.shape[1])).astype(np.float32)
        return weight


NO_TABLES = Tables()
