"""Simulate a quantized network with the float network: weights are replaced by their rounded values, and inputs are rounded."""

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
    """The values of a quantized network, with all scalings removed, so that they fit the float network.

    Args:
        weights: float32[out, in] by quantized linear.
        biases: float32[out] by linear whose bias absorbs a shift or a correction.
        plans: by site whose input is rounded.

    Exactness: as the Q/DQ graph, up to float32 rounding; GEMMs run in float.
    """

    weights: Mapping[str, Float32]
    biases: Mapping[str, Float32]
    plans: Mapping[str, SitePlan]

    @staticmethod
    def of(denoiser: Denoiser, result: CalibrationResult, assigned: Mapping[str, Rule]) -> Simulation:
        """The simulation of a complete calibration. It takes as much memory as the quantized linears' float weights."""
        touching = touching_plans(result.sites)
        weights, biases = {}, {}
        for name in result.weight_scale:
            scheme = assigned[name].scheme
            assert scheme.weight is not None
            weight, plans = denoiser.weight(name), touching.get(name, [])
            nearest = result.rounded(name, folded_weight(weight, name, plans), scheme.weight.qtype)
            factor = folded_weight(np.ones_like(weight), name, plans)
            weights[name] = (nearest / factor).astype(np.float32)
            plan_of_input = next((plan for plan in plans if name in plan.site.linears), None)
            moved = np.zeros(len(weight))
            if plan_of_input and plan_of_input.in_shift.any():
                # The bias contains the shift's exact output, so the error of the rounded weight on the shift is added back.
                moved += (weight.astype(np.float64) - weights[name]) @ plan_of_input.in_shift
            if name in result.correction:  # it applies to the folded bias
                moved += result.correction[name] / row_factors(name, len(weight), plans)
            if moved.any():
                biases[name] = (denoiser.bias(name) + moved).astype(np.float32)
        return Simulation(weights=weights, biases=biases, plans=result.sites)

    def rounded(self, site: str, rows: Float32, timestep: float) -> Float32:
        """float32[rows, K]: a site's input as its readers receive it."""
        plan = self.plans.get(site)
        if plan is None or plan.activation is None:
            return rows
        restored: Float32 = (plan.quantized(rows, timestep) * plan.in_scale + plan.in_shift).astype(np.float32, copy=False)
        return restored

    def on(self, denoiser: Denoiser) -> AbstractContextManager[None]:
        """A context in which the denoiser computes like the quantized network."""
        return denoiser.replace(self.weights, self.biases, self.rounded)
