"""The decisions of calibration as data: saved to safetensors, read by the passes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from .documents import DocumentError, parse_json, printable, shown, shown_path
from .grid import Int8, WeightGrid
from .network import InputSite
from .qtypes import QUANT_TYPES, QuantType
from .scales import ScaleTable, TimestepBins, TokenScale
from .tensor_file import load_tensors, save_tensors

Float32 = npt.NDArray[np.float32]
FORMAT = "dq-export calibration 4"
TYPES = {qtype.name: qtype for qtype in QUANT_TYPES}
KINDS = {"scale": np.float32, "multiplier": np.int8, "codes": np.int8, "correction": np.float32, "sqnr": np.float32}
"""The tensors of a linear in a file, and their element types."""


class CalibrationError(Exception):
    """Calibration cannot measure or decide; the message names the site or file and says what to do."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SitePlan:
    """The decisions for one site's input.

    The input h[.., K] becomes (h - in_shift) / in_scale, folded where `site.fold` says, and is then quantized with the
    scale of the timestep's bin.

    Args:
        site: the tensor.
        method: how the equivalent scaling was chosen, for the report: `none`, `smooth(0.50)`, `dilate(1.0)+shift` …
        in_scale: float32[K], finite, > 0; all ones if the input is not scaled. A convolution's K are the elements of a patch, of
            which those of one channel are neighbours and have one scale.
        in_shift: float32[K], finite; all zeros if the input is not shifted.
        activation: the scale table, or the rule for a scale of each token; None if the input stays float.
        error: the measured relative output error of the choice (noise power / signal power), or NaN if not measured.
        alternatives: this error for every candidate that `auto` measured, by method; empty if the recipe fixed the method.
    """

    site: InputSite
    method: str
    in_scale: Float32
    in_shift: Float32
    activation: ScaleTable | TokenScale | None
    error: float = float("nan")
    alternatives: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for label, vector in (("in_scale", self.in_scale), ("in_shift", self.in_shift)):
            if vector.dtype != np.float32 or vector.ndim != 1 or not np.isfinite(vector).all():
                raise ValueError(f"{self.site.name}: {label} must be finite float32[K]")
        if not (self.in_scale > 0).all() or self.in_scale.shape != self.in_shift.shape:
            raise ValueError(f"{self.site.name}: in_scale must be > 0 and as long as in_shift")
        if self.taps > 1 and (self.in_scale.reshape(-1, self.taps) != self.channel_scale[:, None]).any():
            raise ValueError(f"{self.site.name}: in_scale must be equal for all elements of a channel's patch")

    def quantized(self, rows: Float32, timestep: npt.ArrayLike) -> Float32:
        """float32[R, K]: (rows - in_shift) / in_scale as the GEMM reads it; `timestep`: one for all rows, or float[R]."""
        moved = ((rows - self.in_shift) / self.in_scale).astype(np.float32, copy=False)
        return moved if self.activation is None else self.activation.nearest(moved, timestep)

    @property
    def taps(self) -> int:
        """The number of elements of a patch that come from one channel; 1 of a linear's input."""
        return self.site.fold.taps(len(self.in_scale))

    @property
    def channel_scale(self) -> Float32:
        """float32[channels]: the in_scale of each channel, as the parts of the fold absorb it."""
        return self.in_scale[:: self.taps]

    @property
    def scaled(self) -> bool:
        """Whether in_scale or in_shift changes the input."""
        return bool((self.in_scale != 1).any() or (self.in_shift != 0).any())


@dataclass(frozen=True, kw_only=True, eq=False)
class CalibrationResult:
    """All decisions of one calibration.

    Args:
        sites: plan by site name, in execution order.
        weight_scale: for each linear, the scale of its `WeightGrid`: float32[out], or float32[in / block, out].
        multiplier: for each linear with a grid of two levels, int8[in / block, out].
        codes: for each linear whose codes are not simply the nearest to its folded weight, int8[out, in].
        correction: for each linear, float32[out], which is added to its bias.
        reach: for each linear with quantized activations, a bound of |sum of products of codes|: the greatest observed norm
            of a row of activation codes times the greatest norm of an output channel's codes (Cauchy and Schwarz). A backend
            whose GEMMs return this sum in float16 must keep it in range.
        attention: for each query, key or value projection, the scale of its result, if attention is quantized.
        sqnr: for each linear, float32[T] at `timesteps`: SQNR of its output in dB over the kept rows, with exact inputs before
            the rounding; NaN for timesteps without kept rows.
        provenance: model hash, seed, sampler, samples, versions.
    """

    sites: Mapping[str, SitePlan]
    weight_scale: Mapping[str, Float32]
    provenance: Mapping[str, str]
    multiplier: Mapping[str, Int8] = field(default_factory=dict)
    codes: Mapping[str, Int8] = field(default_factory=dict)
    correction: Mapping[str, Float32] = field(default_factory=dict)
    reach: Mapping[str, float] = field(default_factory=dict)
    attention: Mapping[str, float] = field(default_factory=dict)
    sqnr: Mapping[str, Float32] = field(default_factory=dict)
    timesteps: tuple[float, ...] = ()

    def bins(self) -> TimestepBins:
        """The coarsest bins that refine those of every table."""
        bins = TimestepBins()
        for plan in self.sites.values():
            if plan.activation:
                bins = bins.union(plan.activation.bins)
        return bins

    def grid(self, linear: str, qtype: QuantType) -> WeightGrid:
        """The grid of a quantized weight; the rule gives its element type."""
        return WeightGrid(scale=self.weight_scale[linear], multiplier=self.multiplier.get(linear), qtype=qtype)

    def rounded(self, linear: str, folded: Float32, qtype: QuantType, rows: npt.NDArray[np.int64] | None = None) -> Float32:
        """float32[out, in]: the values of a linear's codes, from its folded weight; only some `rows` of both if given."""
        grid, codes = self.grid(linear, qtype), self.codes.get(linear)
        if rows is not None:
            grid, codes = grid.of_rows(rows), None if codes is None else codes[rows]
        return grid.nearest(folded) if codes is None else codes * grid.steps(folded.shape[1])

    def save(self, path: Path) -> None:
        """Write one safetensors file; equal results give equal bytes."""
        tensors: dict[str, npt.NDArray[np.generic]] = {}
        entries = []
        for name, plan in self.sites.items():
            tensors[f"{name}.in_scale"] = plan.in_scale
            tensors[f"{name}.in_shift"] = plan.in_shift
            entry: dict[str, Any] = {"site": asdict(plan.site), "method": plan.method, "error": plan.error}
            entry |= {"alternatives": dict(plan.alternatives)}
            if isinstance(plan.activation, ScaleTable):
                tensors[f"{name}.activation.scale"] = plan.activation.scale
                entry |= {"edges": plan.activation.bins.edges, "type": plan.activation.qtype.name}
            elif plan.activation is not None:
                entry |= {"token": {**asdict(plan.activation), "qtype": plan.activation.qtype.name}}
            entries.append(entry)
        for kind, arrays in self._by_linear().items():
            tensors |= {f"{name}.weight.{kind}": value for name, value in arrays.items()}
        # One metadata entry: safetensors keeps its metadata in a hash map, whose order would differ from run to run.
        header: dict[str, Any] = {
            "format": FORMAT,
            "sites": entries,
            "provenance": dict(self.provenance),
        }
        header |= {"reach": dict(self.reach), "attention": dict(self.attention), "timesteps": list(self.timesteps)}
        plan_text = json.dumps(header, sort_keys=True)
        save_tensors(path, tensors, {"dq_export": plan_text})

    @staticmethod
    def load(path: Path) -> CalibrationResult:
        """Read what `save` wrote.

        Raises:
            CalibrationError: the file is missing or damaged.
        """
        try:
            tensors, metadata = load_tensors(path)
            content = parse_json(metadata.get("dq_export", "{}"), shown_path(path), finite=False)
            version = content.get("format") if isinstance(content, dict) else None
            if version != FORMAT:
                raise CalibrationError(f"{shown_path(path)}: expected '{FORMAT}', found {shown(version)}; calibrate again")
            header = _Header.model_validate(content)
            sites = {entry.site.name: entry.plan(tensors) for entry in header.sites}
            by_linear = {kind: _of_kind(kind, tensors) for kind in KINDS}
        except (DocumentError, ValueError, KeyError) as error:  # ValidationError is a ValueError
            raise CalibrationError(
                f"{shown_path(path)}: not a readable calibration file ({printable(str(error))}); delete it and calibrate again"
            ) from error
        return CalibrationResult(
            sites=sites,
            weight_scale=by_linear["scale"],
            multiplier=by_linear["multiplier"],
            codes=by_linear["codes"],
            correction=by_linear["correction"],
            sqnr=by_linear["sqnr"],
            timesteps=header.timesteps,
            provenance=header.provenance,
            reach=header.reach,
            attention=header.attention,
        )

    def _by_linear(self) -> dict[str, Mapping[str, npt.NDArray[np.generic]]]:
        return {
            "scale": self.weight_scale,
            "multiplier": self.multiplier,
            "codes": self.codes,
            "correction": self.correction,
            "sqnr": self.sqnr,
        }


class _Token(BaseModel):
    """A `TokenScale` in the header of a file."""

    model_config = ConfigDict(extra="forbid")

    constant: float
    group: int
    clip: float
    qtype: str


class _Entry(BaseModel):
    """A site in the header of a file; its vectors are tensors of the file."""

    model_config = ConfigDict(extra="forbid")

    site: InputSite
    method: str
    error: float
    alternatives: dict[str, float]
    edges: tuple[float, ...] | None = None
    type: str | None = None
    token: _Token | None = None

    def plan(self, tensors: Mapping[str, npt.NDArray[Any]]) -> SitePlan:
        """The site's plan.

        Raises:
            KeyError: a tensor is missing. ValueError: it is not what a plan may hold.
        """
        name = self.site.name
        activation: ScaleTable | TokenScale | None = None
        if self.edges is not None and self.type is not None:
            bins = TimestepBins(edges=self.edges)
            activation = ScaleTable(scale=tensors[f"{name}.activation.scale"], bins=bins, qtype=TYPES[self.type])
        elif self.token is not None:
            activation = TokenScale(**{**self.token.model_dump(), "qtype": TYPES[self.token.qtype]})
        return SitePlan(
            site=self.site,
            method=self.method,
            error=self.error,
            alternatives=self.alternatives,
            activation=activation,
            in_scale=tensors[f"{name}.in_scale"],
            in_shift=tensors[f"{name}.in_shift"],
        )


class _Header(BaseModel):
    """The header of a file."""

    model_config = ConfigDict(extra="forbid")

    format: str
    sites: list[_Entry]
    provenance: dict[str, str]
    reach: dict[str, float]
    attention: dict[str, float]
    timesteps: tuple[float, ...]


def _of_kind(kind: str, tensors: Mapping[str, npt.NDArray[Any]]) -> dict[str, Any]:
    """The tensors of a kind, by linear.

    Raises:
        ValueError: a tensor has the wrong element type, or a scale is not finite and positive.
    """
    suffix = f".weight.{kind}"
    tensors = {name.removesuffix(suffix): value for name, value in tensors.items() if name.endswith(suffix)}
    for name, value in tensors.items():
        if value.dtype != KINDS[kind]:
            raise ValueError(f"{shown(name + suffix)} is {value.dtype}, expected {np.dtype(KINDS[kind])}")
        if kind == "scale" and not (np.isfinite(value).all() and (value > 0).all()):
            raise ValueError(f"{shown(name + suffix)} must be finite and > 0")
    return dict(tensors)
