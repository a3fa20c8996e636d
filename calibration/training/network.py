"""The quantized network in PyTorch. All of it is frozen, except for one block."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from dq_export.core.artifacts import CalibrationResult, SitePlan
from dq_export.core.folding import touching_plans
from dq_export.core.network import Chain, Denoiser
from dq_export.core.rule import Rule

from .layers import Clock, QuantizedLinear, SiteInput, Training


@dataclass(frozen=True, eq=False)
class Layers:
    """Quantized linears and the sites that they read, both by name."""

    linears: Mapping[str, QuantizedLinear]
    sites: Mapping[str, SiteInput]

    def forget(self) -> None:
        """Free the values of the last call."""
        for site in self.sites.values():
            site.forget()

    def round(self) -> None:
        """Round the latent weights for the next call."""
        for linear in self._latent():
            linear.round()

    def pass_gradients(self) -> None:
        """Move the gradients of the rounded weights to the latent weights."""
        for linear in self._latent():
            linear.pass_gradient()

    def _latent(self) -> list[QuantizedLinear]:
        return [linear for linear in self.linears.values() if linear.training == "all"]

    def parameters(self, rates: Mapping[str, float]) -> list[dict[str, Any]]:
        """Return the trained parameters in groups, each with its greatest rate `peak`. `rates` are in steps of codes, by kind.

        A step of a scale moves the end of its range by one code. A step of a bias is the mean step of its linear's weights.
        """
        groups: list[dict[str, Any]] = [
            {"params": [site.log], "peak": rates["scale"] / site.activation.qtype.qmax}
            for site in self.sites.values()
            if site.log is not None and site.activation is not None and site.log.requires_grad
        ]
        for linear in self.linears.values():
            if linear.training == "all":
                groups.append({"params": [linear.latent], "peak": rates["weight"]})
            if linear.training != "nothing":
                groups.append({"params": [linear.bias], "peak": rates["bias"] * float(linear.steps.mean())})
        return groups

    def result(self, start: CalibrationResult) -> CalibrationResult:
        """Return the present values as a part of a calibration."""
        trained = {name: linear for name, linear in self.linears.items() if linear.training != "nothing"}
        return CalibrationResult(
            sites={name: replace(start.sites[name], activation=site.scales()) for name, site in self.sites.items()},
            weight_scale={name: start.weight_scale[name] for name in trained},
            codes={name: linear.rounded_codes() for name, linear in trained.items() if linear.training == "all"},
            correction={name: linear.bias_correction() for name, linear in trained.items()},
            provenance={},
        )


class QuantizedNetwork:
    """A calibrated network. It replaces linears of the float network.

    Args:
        chain: the chain of the network's blocks.
    """

    def __init__(self, denoiser: Denoiser, start: CalibrationResult, assigned: Mapping[str, Rule], chain: Chain) -> None:
        self.denoiser, self.start, self.assigned, self.device = denoiser, start, assigned, chain.device
        self.clock = Clock()
        self.touching = touching_plans(start.sites)
        self.site_of = {name: plan for plan in start.sites.values() for name in plan.site.linears}
        blocks = denoiser.blocks
        self.names = {block: [name for name in start.weight_scale if name.startswith(f"{block}.")] for block in blocks}
        inside = {name for names in self.names.values() for name in names}
        self.outside = self._layers(
            [name for name in start.weight_scale if name not in inside or name in chain.behind], "nothing"
        )

    def trainable(self, block: str) -> list[str]:
        """Return the linears of a block whose inputs are calibrated."""
        return [name for name in self.names[block] if name in self.site_of and self.assigned[name].scheme.low_precision]

    def layers(self, block: str, training: Training) -> Layers:
        """Return the linears of a block with the calibrated values."""
        return self._layers(self.names[block], training)

    def all_layers(self, training: Training) -> Layers:
        """Return the linears of all blocks with the calibrated values."""
        return self._layers([name for names in self.names.values() for name in names], training)

    def on(self, layers: Layers) -> AbstractContextManager[None]:
        """While active, the network computes with these layers, and with frozen layers outside the blocks and after them."""
        return self.denoiser.computing({**self.outside.linears, **layers.linears})

    def at(self, timesteps: npt.NDArray[np.float64]) -> None:
        """Set the timestep of each sample of the next call."""
        self.clock.timesteps = timesteps
        self.outside.forget()

    def _layers(self, names: list[str], training: Training) -> Layers:
        plans: dict[str, SitePlan] = {}
        for name in names:
            if name in self.site_of:
                plans[self.site_of[name].site.name] = self.site_of[name]
        sites = {}
        for key, plan in plans.items():
            pictures = self.denoiser.linears[plan.site.linears[0]].convolution
            sites[key] = SiteInput(plan, self.clock, self.device, pictures=pictures, trained=training != "nothing")
        linears = {}
        for name in names:
            scheme, site = self.assigned[name].scheme, sites.get(self.site_of[name].site.name) if name in self.site_of else None
            linear = QuantizedLinear(name, self.denoiser, self.start, scheme, self.touching.get(name, []))
            linears[name] = linear.place(self.device, site, training if site is not None and scheme.low_precision else "nothing")
        return Layers(linears=linears, sites=sites)
