"""From a file of tables to the decisions that calibration takes from it, after checking that it fits network and recipe."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dq_export.core.documents import DocumentError, shown, shown_path
from dq_export.core.network import Denoiser, InputSite
from dq_export.core.recipe import Recipe, RecipeError
from dq_export.core.rule import Rule
from dq_export.core.scales import ScaleTable
from dq_export.core.table_file import TableFile, listed, load_table_file

from .asymmetry import LIMIT, Asymmetric, common_shift
from .bins import given_table
from .scaling import Scaling
from .table_checks import linear_faults, name_faults, schedule_fault, site_faults
from .tables import Tables

Float32 = npt.NDArray[np.float32]
FIXING = ("activation.scale", "weight.codes", "in_scale", "in_shift")
"""Parts that are valid for only one scaling of the input: the file's, or none."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Entry:
    """The content of a file for one site's input, from one of its readers; all readers have the same."""

    reader: str
    in_scale: Float32
    in_shift: Float32
    table: Asymmetric | None


def read_tables(
    path: Path, denoiser: Denoiser, assigned: Mapping[str, Rule], recipe: Recipe, timesteps: Sequence[float]
) -> Tables:
    """Read a file, and check that it fits a network and a recipe.

    Args:
        timesteps: those that the sampler sends.

    Raises:
        RecipeError: it does not fit, or it is missing or damaged; a line for each of the first ten faults.
    """
    try:
        file = load_table_file(path)
        faults = _faults(file, denoiser, assigned, recipe, timesteps)
        if not faults:
            widths = {name: linear.width for name, linear in denoiser.linears.items()}
            tables, faults = _decisions(file, denoiser.sites, widths, assigned)
    except DocumentError as error:
        raise RecipeError("\n".join(f"tables {line}" for line in str(error).splitlines())) from error
    if faults:
        raise RecipeError(listed(faults, f"tables {shown_path(path)}"))
    return tables


def _faults(
    file: TableFile, denoiser: Denoiser, assigned: Mapping[str, Rule], recipe: Recipe, timesteps: Sequence[float]
) -> list[str]:
    """The faults of the file, except those of scalings, which are checked later."""
    header = file.header
    faults = list(name_faults(header, list(denoiser.linears)))
    present = [name for name in header.linears if name in denoiser.linears]
    if reason := schedule_fault(header, timesteps):
        faults.append(reason)
    if recipe.rounding == "distill":
        faults.append("rounding distill would train again what the file holds; use rounding gptq for the other linears")
    if recipe.bias_correction and any(file.shape(name, part) for name in present for part in ("weight", "weight.codes", "bias")):
        faults.append("bias_correction measures errors against the checkpoint's weights, which the file replaces; leave it out")
    for name in present:
        faults += linear_faults(file, name, denoiser.weight(name).shape, assigned[name])
    return faults or [fault for site in denoiser.sites for fault in site_faults(file, site, assigned)]


def _decisions(
    file: TableFile, sites: Sequence[InputSite], widths: Mapping[str, int], assigned: Mapping[str, Rule]
) -> tuple[Tables, list[str]]:
    """The decisions by site, and faults of scalings; sites that share a scaling get a common one."""
    groups: dict[str, list[InputSite]] = {}
    for site in sites:
        groups.setdefault(site.shares or site.name, []).append(site)
    scalings: dict[str, Scaling] = {}
    activations: dict[str, ScaleTable] = {}
    faults = []
    for group in groups.values():
        entries = {site.name: item for site in group if (item := _entry_of(file, site, widths, assigned))}
        if not entries:
            continue
        scaling, shift = _common_scaling(file.header.method, list(entries.values()), shifts=group[0].fold.shifts)
        faults += [*_group_faults(list(entries.values()))]
        faults += [*_width_faults(file, entries.values(), shift, shifts=group[0].fold.shifts)]
        scalings |= dict.fromkeys([site.name for site in group], scaling)
        activations |= {name: _symmetric(file, item, shift, assigned) for name, item in entries.items() if item.table}
    return Tables(file=file, scalings=scalings, activations=activations), faults


def _entry_of(file: TableFile, site: InputSite, widths: Mapping[str, int], assigned: Mapping[str, Rule]) -> _Entry | None:
    """The content of the file for a site; None if the file leaves its scaling to calibration."""
    readers = [name for name in site.linears if assigned[name].scheme.low_precision]
    reader = next((name for name in readers if any(file.shape(name, part) for part in FIXING)), None)
    if reader is None:
        return None
    in_scale, in_shift = file.read(reader, "in_scale"), file.read(reader, "in_shift")
    scale, point = file.read(reader, "activation.scale"), file.read(reader, "activation.zero_point")
    codes, qtype, table = file.header.linears[reader].activation, assigned[reader].scheme.graph_type, None
    if scale is not None and codes is not None and qtype is not None:
        point = np.zeros_like(scale) if point is None else point
        table = Asymmetric(scale=scale, zero_point=point, codes=codes, qmax=qtype.qmax)
    return _Entry(
        reader=reader,
        in_scale=np.ones(widths[reader], dtype=np.float32) if in_scale is None else in_scale,
        in_shift=np.zeros(widths[reader], dtype=np.float32) if in_shift is None else in_shift,
        table=table,
    )


def _common_scaling(method: str, entries: Sequence[_Entry], *, shifts: bool) -> tuple[Scaling, float]:
    """The scaling of sites that share one, and the part of its shift that makes their tables symmetric."""
    shift = common_shift([item.table for item in entries if item.table], shifts=shifts)
    first = entries[0]
    in_shift = (first.in_shift + first.in_scale * np.float32(shift)).astype(np.float32)
    label = f"given by {method}" + ("+shift" if in_shift.any() else "")
    return Scaling(method=label, in_scale=first.in_scale, in_shift=in_shift), shift


def _group_faults(entries: Sequence[_Entry]) -> Iterator[str]:
    first = entries[0]
    for other in entries[1:]:
        if not (np.array_equal(first.in_scale, other.in_scale) and np.array_equal(first.in_shift, other.in_shift)):
            yield f"{shown(other.reader)} shares its scaling with {shown(first.reader)}; give both the same in_scale and in_shift"


def _width_faults(file: TableFile, entries: Iterable[_Entry], shift: float, *, shifts: bool) -> Iterator[str]:
    cause = "no one shift suits the zero points of all timesteps" if shifts else "its input cannot absorb a shift"
    for item in entries:
        widened = item.table.widened(shift) if item.table else np.ones(1)
        worst = int(widened.argmax())
        if widened[worst] > LIMIT:
            yield (
                f"{shown(item.reader)}: {cause}: at timestep {file.header.timesteps[worst]:g} the step would grow by "
                f"{widened[worst] - 1:.0%}, and {LIMIT - 1:.0%} is the limit; train it with constant zero points, or remove its "
                "table"
            )


def _symmetric(file: TableFile, item: _Entry, shift: float, assigned: Mapping[str, Rule]) -> ScaleTable:
    qtype = assigned[item.reader].scheme.graph_type
    assert item.table is not None
    assert qtype is not None
    scale = (item.table.scale * item.table.widened(shift)).astype(np.float32)
    return given_table(np.asarray(file.header.timesteps), scale, qtype)
