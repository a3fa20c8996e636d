"""A quantized network on the float one: weights that stand for the codes, inputs rounded on their way in."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dq_export.core.artifacts import CalibrationResult, SitePlan
from dq_export.core.folding import folded_weight, row_factors, touching_plans
from dq_export.core.network import Denoiser
from dq_export.core.rule import Rule

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class Simulation:
    """What stands for a quantized network in the float network's own coordinates: scalings are taken out again.

    Args:
        weights: float32[out, in] by quantized linear.
        biases: float32[out] by linear whose bias takes up a shift or a correction.
        plans: by site whose input is rounded.

    Exactness: as the Q/DQ graph, up to float32 rounding; GEMMs run in float.
    """

    weights: Mapping[str, Float32]
    biases: Mapping[str, Float32]
    plans: Mapping[str, SitePlan]

    @staticmethod
    def of(denoiser: Denoiser, result: CalibrationResult, assigned: Mapping[str, Rule]) -> Simulation:
        """Of a whole calibration. Takes as much memory as the quantized linears' float weights."""
        touching = touching_plans(result.sites)
        weights, biases = {}, {}
        for name in result.weight_scale:
            scheme = assigned[name].scheme
            assert scheme.weight is not None
            weight, plans = denoiser.weight(name), touching.get(name, [])
            nearest = result.rounded(name, folded_weight(weight, name, plans), scheme.weight.qtype)
            factor = folded_weight(np.ones_like(weight), name, plans)
            weights[name] = (nearest / factor).astype(np.float32)
            own = next((plan for plan in plans if name in plan.site.linears), None)
            moved = np.zeros(len(weight))
            if own and own.in_shift.any():
                # The shift's own output is in the bias exactly, so what rounding the weight does to it is put back.
                moved += (weight.astype(np.float64) - weights[name]) @ own.in_shift
            if name in result.correction:  # of the folded bias
                moved += result.correction[name] / row_factors(name, len(weight), plans)
            if moved.any():
                biases[name] = (denoiser.bias(name) + moved).astype(np.float32)
        return Simulation(weights=weights, biases=biases, plans=result.sites)

    def rounded(self, site: str, rows: Float32, timestep: float) -> Float32:
        """float32[rows, K]: a site's input as its readers get it."""
        plan = self.plans.get(site)
        if plan is None or plan.activation is None:
            return rows
        found: Float32 = (plan.quantized(rows, timestep) * plan.in_scale + plan.in_shift).astype(np.float32, copy=False)
        return found

    def on(self, denoiser: Denoiser) -> AbstractContextManager[None]:
        """While active the denoiser computes what the quantized network does."""
        return denoiser.replace(self.weights, self.biases, self.rounded)
