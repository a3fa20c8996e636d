"""A calibration of our own as a file of tables, which another export then takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dq_export.core.artifacts import CalibrationResult
from dq_export.core.folding import folded_weight, row_factors, touching_plans
from dq_export.core.network import Denoiser
from dq_export.core.rule import Rule
from dq_export.core.scales import ScaleTable
from dq_export.core.table_file import Codes, Entry, Header, save_table_file

Tensors = dict[str, np.ndarray[Any, Any]]


def tables_of(
    result: CalibrationResult, denoiser: Denoiser, assigned: Mapping[str, Rule], timesteps: list[float]
) -> tuple[Header, Tensors]:
    """The header and the tensors of all that a calibration decided for the linears whose input it quantized."""
    rows = sorted(timesteps)
    touching, linears, tensors = touching_plans(result.sites), {}, Tensors()
    for plan in result.sites.values():
        assert isinstance(plan.activation, ScaleTable)
        for name in plan.site.linears:
            around, qtype = touching[name], assigned[name].scheme.weight.qtype  # type: ignore[union-attr]
            folded, grid = folded_weight(denoiser.weight(name), name, around), result.grid(name, qtype)
            codes = result.codes[name] if name in result.codes else grid.codes(folded)
            tensors |= {
                f"{name}.activation.scale": np.asarray([plan.activation.at(step) for step in rows], dtype=np.float32),
                f"{name}.in_scale": plan.in_scale,
                f"{name}.in_shift": plan.in_shift,
                f"{name}.weight.codes": codes.astype(np.int8),
                f"{name}.weight.scale": grid.scale / row_factors(name, grid.scale.shape[-1], around),
            }
            if grid.multiplier is not None:
                tensors[f"{name}.weight.multiplier"] = grid.multiplier
            linears[name] = Entry(
                activation=Codes(bits=plan.activation.qtype.bits, signed=True), weight=Codes(bits=qtype.bits, signed=True)
            )
    return Header(method="our own", timesteps=tuple(rows), linears=linears), tensors


def save_own(
    path: Path, result: CalibrationResult, denoiser: Denoiser, assigned: Mapping[str, Rule], timesteps: list[float]
) -> Path:
    """Write them."""
    save_table_file(path, *tables_of(result, denoiser, assigned, timesteps))
    return path
