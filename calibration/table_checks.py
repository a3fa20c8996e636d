"""Messages about a file of tables that does not fit the network or the recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from dq_export.core.documents import shown
from dq_export.core.network import InputSite
from dq_export.core.rule import Rule
from dq_export.core.scheme import Scheme
from dq_export.core.table_file import Header, TableFile
from dq_export.core.violations import nearest

SHARED = ("activation.scale", "activation.zero_point", "in_scale", "in_shift")
"""Parts that must be equal for all readers of an input."""


def schedule_fault(header: Header, timesteps: Sequence[float]) -> str:
    """Why the rows of the file do not fit the timesteps that a run sends; empty if they do.

    A timestep takes the row of the nearest timestep in the file, which may be as far away as the file's timesteps are from
    each other. A table of one row fits all timesteps.
    """
    rows = np.asarray(header.timesteps)
    if len(rows) == 1:
        return ""
    values = np.asarray(timesteps, dtype=np.float64)
    distances = np.abs(values[:, None] - rows).min(axis=1)
    worst = int(distances.argmax())
    if distances[worst] <= np.diff(rows).max():
        return ""
    near = rows[np.abs(rows - values[worst]).argmin()]
    return (
        f"its timesteps are {rows[0]:g} … {rows[-1]:g}, but the sampler sends {values[worst]:g}, whose nearest row is for "
        f"{near:g}; give the timesteps of the sampled schedule, as the network receives them"
    )


def linear_faults(file: TableFile, linear: str, weight: tuple[int, ...], rule: Rule) -> Iterator[str]:
    """Yield the faults of one linear of a file: entries that do not fit its shape or its rule.

    Args:
        weight: the shape of its weight.
    """
    scheme = rule.scheme
    if scheme.weight is None:
        yield f"{shown(linear)} stays float in the recipe ({rule.reason or 'its rule'}); remove it from the file"
        return
    outputs, width = weight
    for part, expected in (
        ("activation.scale", (len(file.header.timesteps),)),
        ("activation.zero_point", (len(file.header.timesteps),)),
        ("weight", weight),
        ("weight.codes", weight),
        ("bias", (outputs,)),
        ("in_scale", (width,)),
        ("in_shift", (width,)),
    ):
        shape = file.shape(linear, part)
        if shape not in (None, expected):
            yield f"'{linear}.{part}' has shape {list(shape or ())}; expected {list(expected)}"
            return  # the checks below compare numbers
    yield from _activation_faults(file, linear, scheme)
    if file.shape(linear, "weight") and scheme.weight.qtype.is_float:
        yield f"{shown(linear)}: weights in float8 are rounded from the checkpoint's; remove 'weight', or pass another --bits"
    if file.shape(linear, "weight.codes"):
        yield from _code_faults(file, linear, scheme, width)


def _activation_faults(file: TableFile, linear: str, scheme: Scheme) -> Iterator[str]:
    codes, name = file.header.linears[linear].activation, shown(linear)
    if not scheme.low_precision and (file.shape(linear, "in_scale") or file.shape(linear, "in_shift")):
        yield f"{name}: the recipe quantizes only its weight, so its input is not scaled"
    if codes is None:
        return
    if scheme.activation is None:
        yield f"{name} has a table, but the recipe leaves its input float ({scheme}); pass other --bits, or remove the table"
    elif scheme.graph_type is None or scheme.per_token:
        yield f"{name} has a table, but the recipe computes a scale for each token; pass --granularity tensor"
    elif scheme.graph_type.is_float or scheme.graph_type.bits != codes.bits:
        yield (
            f"{name} has a table for codes of {codes.bits} bits, but the recipe quantizes its input to "
            f"{scheme.graph_type.name}; pass the --bits that it was trained for"
        )


def _code_faults(file: TableFile, linear: str, scheme: Scheme, width: int) -> Iterator[str]:
    assert scheme.weight is not None
    qtype, block = scheme.weight.qtype, scheme.block_size(width)
    if qtype.is_float:
        yield f"{shown(linear)}: a file cannot give codes of float8 weights; pass another --bits"
        return
    outputs = (file.shape(linear, "weight.codes") or (0,))[0]
    blocks = (width // block, outputs) if block else None
    form = f"for {scheme}" + (f" in {width // block} blocks" if block else "")
    scale = blocks if blocks and not scheme.two_level else (outputs,)
    multiplier = blocks if scheme.two_level else None
    wrong = False
    for part, sizes in (("weight.scale", scale), ("weight.zero_point", scale), ("weight.multiplier", multiplier)):
        shape = file.shape(linear, part)
        if shape != sizes and not (part == "weight.zero_point" and shape is None):
            wrong = True
            expected = f"expected {list(sizes)}" if sizes else "expected none"
            yield f"'{linear}.{part}' has {f'shape {list(shape)}' if shape else 'no value'}; {expected} {form}"
    if wrong:
        return
    codes = centred_codes(file, linear)
    if codes.min() < qtype.qmin or codes.max() > qtype.qmax:
        yield (
            f"'{linear}.weight.codes' has the range {codes.min()} … {codes.max()} around its zero point; {qtype.name} holds "
            f"{qtype.qmin} … {qtype.qmax}: give it a rule with weights of more bits, or give 'weight', which is then rounded"
        )
    factor = file.read(linear, "weight.multiplier")
    if factor is not None and factor.max() > 127 // qtype.qmax:
        yield f"'{linear}.weight.multiplier' reaches {factor.max()}; expected 1 … {127 // qtype.qmax}"


def centred_codes(file: TableFile, linear: str) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """int64[out, in]: the codes of a weight minus its zero point, which is rounded."""
    codes, point = file.read(linear, "weight.codes"), file.read(linear, "weight.zero_point")
    assert codes is not None
    centred = codes.astype(np.int64)
    if point is None:
        return centred
    columns = np.rint(np.atleast_2d(point)).astype(np.int64).T
    centred -= np.repeat(columns, codes.shape[1] // columns.shape[1], axis=1)
    return centred


def site_faults(file: TableFile, site: InputSite, assigned: Mapping[str, Rule]) -> Iterator[str]:
    """Faults of one input: readers whose tables differ, and a shift that the input cannot absorb."""
    readers = [name for name in site.linears if assigned[name].scheme.low_precision]
    named = [name for name in readers if any(file.shape(name, part) for part in SHARED)]
    if not named:
        return
    first = named[0]
    entry = file.header.linears[first]
    for name in readers:
        other = file.header.linears.get(name)
        same = other is not None and other.activation == entry.activation
        for part in SHARED:
            one, two = file.read(first, part), file.read(name, part)
            same = same and (np.array_equal(one, two) if one is not None and two is not None else one is two)
        if not same:
            yield f"{shown(first)} and {shown(name)} read one input, but their tables differ; give them equal tables"
            return
    scale = file.read(first, "in_scale")
    if scale is not None:
        patches = scale.reshape(-1, site.fold.taps(len(scale)))
        if (patches != patches[:, :1]).any():
            yield f"'{first}.in_scale' differs within a patch; give the {patches.shape[1]} elements of each channel one scale"
    shift = file.read(first, "in_shift")
    if shift is not None and shift.any() and not site.fold.shifts:
        yield f"{shown(first)}: its input cannot have an 'in_shift', because {site.target} cannot absorb it; train it without"


def name_faults(header: Header, linears: Sequence[str]) -> Iterator[str]:
    """Names of linears that the network does not have."""
    for name in header.linears:
        if name not in linears:
            yield f"{shown(name)} is not a linear of the network.{nearest(name, list(linears))}"
