"""What calibration decided, as data: saved to safetensors, read by the passes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .denoiser import InputSite
from .qtypes import QUANT_TYPES
from .scales import ScaleTable, TimestepBins

Float32 = npt.NDArray[np.float32]
FORMAT = "dq-export calibration 2"


class CalibrationError(Exception):
    """Calibration cannot measure or decide; the message says for which site or file, and what to do."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SitePlan:
    """What happens to one site's input.

    The input h[.., K] becomes (h - in_shift) / in_scale, folded where `site.fold` says, and is then quantized with the
    scale of the timestep's bin.

    Args:
        site: which tensor.
        method: how the equivalent scaling was chosen, for the report: `none`, `smooth(0.50)`, `dilate(1.0)+shift` …
        in_scale: float32[K], finite, > 0; all ones where nothing is scaled.
        in_shift: float32[K], finite; all zeros where nothing is shifted.
        activation: the scale table.
        error: the measured relative output error of the choice (noise power / signal power), or NaN if not measured.
    """

    site: InputSite
    method: str
    in_scale: Float32
    in_shift: Float32
    activation: ScaleTable
    error: float = float("nan")

    def __post_init__(self) -> None:
        for label, vector in (("in_scale", self.in_scale), ("in_shift", self.in_shift)):
            if vector.dtype != np.float32 or vector.ndim != 1 or not np.isfinite(vector).all():
                raise ValueError(f"{self.site.name}: {label} must be finite float32[K]")
        if not (self.in_scale > 0).all() or self.in_scale.shape != self.in_shift.shape:
            raise ValueError(f"{self.site.name}: in_scale must be > 0 and as long as in_shift")

    @property
    def scaled(self) -> bool:
        """Whether in_scale or in_shift does anything."""
        return bool((self.in_scale != 1).any() or (self.in_shift != 0).any())


@dataclass(frozen=True, kw_only=True, eq=False)
class CalibrationResult:
    """All decisions of one calibration.

    Args:
        sites: plan by site name, in execution order.
        weight_scale: by linear, float32[out] (per output channel, amax / 127 of the folded row) for W8A8 linears, or
            float32[in / block, out] for weight-only and w4a16 linears.
        reach: by linear with quantized activations, a bound of |sum of products of codes|: the greatest length of a row of
            activation codes seen times that of an output channel's (Cauchy and Schwarz). A backend whose GEMMs put the sum
            out in float16 must keep it in range.
        attention: by query, key or value projection the scale of its result, where attention is quantized.
        provenance: model hash, seed, sampler, samples, versions.
    """

    sites: Mapping[str, SitePlan]
    weight_scale: Mapping[str, Float32]
    provenance: Mapping[str, str]
    reach: Mapping[str, float] = field(default_factory=dict)
    attention: Mapping[str, float] = field(default_factory=dict)

    def bins(self) -> TimestepBins:
        """The coarsest bins that refine those of every table."""
        bins = TimestepBins()
        for plan in self.sites.values():
            bins = bins.union(plan.activation.bins)
        return bins

    def save(self, path: Path) -> None:
        """Write one safetensors file; equal results give equal bytes."""
        from safetensors.numpy import save_file

        tensors: dict[str, npt.NDArray[np.float32]] = {}
        described = []
        for name, plan in self.sites.items():
            tensors[f"{name}.in_scale"] = plan.in_scale
            tensors[f"{name}.in_shift"] = plan.in_shift
            tensors[f"{name}.activation.scale"] = plan.activation.scale
            edges = plan.activation.bins.edges
            entry = {"site": asdict(plan.site), "method": plan.method, "error": plan.error, "edges": edges}
            described.append({**entry, "type": plan.activation.qtype.name})
        tensors |= {f"{name}.weight.scale": scale for name, scale in self.weight_scale.items()}
        # One metadata entry: safetensors keeps its metadata in a hash map, whose order would differ from run to run.
        header = {"format": FORMAT, "sites": described, "provenance": dict(self.provenance), "reach": dict(self.reach)}
        header |= {"attention": dict(self.attention)}
        plan_text = json.dumps(header, sort_keys=True)
        save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path, metadata={"dq_export": plan_text})

    @staticmethod
    def load(path: Path) -> CalibrationResult:
        """Read what `save` wrote.

        Raises:
            CalibrationError: not such a file, or cut short.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                header = json.loads((file.metadata() or {}).get("dq_export", "{}"))
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError, ValueError) as error:
            raise CalibrationError(f"{path}: not a readable calibration file ({error}); delete it and calibrate again") from error
        if header.get("format") != FORMAT:
            raise CalibrationError(f"{path}: expected '{FORMAT}', found {header.get('format')!r}; calibrate again")
        sites, types = {}, {qtype.name: qtype for qtype in QUANT_TYPES}
        for entry in header["sites"]:
            fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in entry["site"].items()}
            site = InputSite(**fields)
            bins, qtype = TimestepBins(edges=tuple(entry["edges"])), types[entry["type"]]
            sites[site.name] = SitePlan(
                site=site,
                method=entry["method"],
                error=entry["error"],
                in_scale=tensors[f"{site.name}.in_scale"],
                in_shift=tensors[f"{site.name}.in_shift"],
                activation=ScaleTable(scale=tensors[f"{site.name}.activation.scale"], bins=bins, qtype=qtype),
            )
        suffix = ".weight.scale"
        weights = {key.removesuffix(suffix): value for key, value in tensors.items() if key.endswith(suffix)}
        return CalibrationResult(
            sites=sites,
            weight_scale=weights,
            provenance=header["provenance"],
            reach=header["reach"],
            attention=header["attention"],
        )
