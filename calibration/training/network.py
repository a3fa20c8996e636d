"""The quantized network in PyTorch: all of it frozen but one block."""

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

from .layers import Clock, QuantizedLinear, SiteInput, What


@dataclass(frozen=True, eq=False)
class Layers:
    """Quantized linears by name, and the sites that they read, by name."""

    linears: Mapping[str, QuantizedLinear]
    sites: Mapping[str, SiteInput]

    def forget(self) -> None:
        """Free what the last call left."""
        for site in self.sites.values():
            site.forget()

    def parameters(self, rates: Mapping[str, float]) -> list[dict[str, Any]]:
        """What is trained, each with its `peak`: the greatest rate, from that of its kind in steps of codes.

        A step of a scale is what moves the end of its range by one code; a bias counts in the steps of its linear's weights.
        """
        found = [
            {"params": [site.log], "peak": rates["scale"] / site.activation.qtype.qmax}
            for site in self.sites.values()
            if site.log is not None and site.activation is not None and site.log.requires_grad
        ]
        for linear in self.linears.values():
            if linear.what == "all":
                found.append({"params": [linear.latent], "peak": rates["weight"]})
            if linear.what != "nothing":
                found.append({"params": [linear.bias], "peak": rates["bias"] * float(linear.steps.mean())})
        return found

    def found(self, start: CalibrationResult) -> CalibrationResult:
        """The part of a calibration that these are, as they are now."""
        trained = {name: linear for name, linear in self.linears.items() if linear.what != "nothing"}
        return CalibrationResult(
            sites={name: replace(start.sites[name], activation=site.trained()) for name, site in self.sites.items()},
            weight_scale={name: start.weight_scale[name] for name in trained},
            codes={name: linear.found_codes() for name, linear in trained.items() if linear.what == "all"},
            correction={name: linear.found_correction() for name, linear in trained.items()},
            provenance={},
        )


class QuantizedNetwork:
    """A calibrated network that computes on the float one.

    Args:
        chain: the network's.
    """

    def __init__(self, denoiser: Denoiser, start: CalibrationResult, assigned: Mapping[str, Rule], chain: Chain) -> None:
        self.denoiser, self.start, self.assigned, self.device = denoiser, start, assigned, chain.device
        self.clock = Clock()
        self.touching = touching_plans(start.sites)
        self.site_of = {name: plan for plan in start.sites.values() for name in plan.site.linears}
        blocks = denoiser.blocks
        self.names = {block: [name for name in start.weight_scale if name.startswith(f"{block}.")] for block in blocks}
        inside = {name for names in self.names.values() for name in names}
        self.outside = self._made([name for name in start.weight_scale if name not in inside or name in chain.behind], "nothing")

    def trainable(self, block: str) -> list[str]:
        """Linears of a block whose inputs calibration knows."""
        return [name for name in self.names[block] if name in self.site_of and self.assigned[name].scheme.low_precision]

    def layers(self, block: str, what: What) -> Layers:
        """A block's linears as calibration left them."""
        return self._made(self.names[block], what)

    def all_layers(self, what: What) -> Layers:
        """The linears of all blocks as calibration left them."""
        return self._made([name for names in self.names.values() for name in names], what)

    def on(self, layers: Layers) -> AbstractContextManager[None]:
        """While active the network computes with these layers, and with frozen ones outside of the blocks and behind them."""
        return self.denoiser.computing({**self.outside.linears, **layers.linears})

    def at(self, timesteps: npt.NDArray[np.float64]) -> None:
        """Say of which timestep each sample of the next call is."""
        self.clock.timesteps = timesteps
        self.outside.forget()

    def _made(self, names: list[str], what: What) -> Layers:
        plans: dict[str, SitePlan] = {}
        for name in names:
            if name in self.site_of:
                plans[self.site_of[name].site.name] = self.site_of[name]
        sites = {key: SiteInput(plan, self.clock, self.device, trained=what != "nothing") for key, plan in plans.items()}
        linears = {}
        for name in names:
            scheme, site = self.assigned[name].scheme, sites.get(self.site_of[name].site.name) if name in self.site_of else None
            made = QuantizedLinear(name, self.denoiser, self.start, scheme, self.touching.get(name, []))
            linears[name] = made.place(self.device, site, what if site is not None and scheme.low_precision else "nothing")
        return Layers(linears=linears, sites=sites)
