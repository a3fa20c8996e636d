"""Rules for the file that describes a network's call, beside the config.pbtxt of its pipeline and denoiser."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .model_folder import Fault, Model
from .serving.call import FILE, GUIDANCE, Call

FIX = "export again"


def misfits(model: Model, call: Call, place: str, rows: int, target: Any) -> Iterator[Fault]:
    """Check a call against its pipeline and the denoiser.

    Args:
        model: the pipeline.
        place: the version's folder, for messages.
        rows: the greatest number of rows of a network call.
        target: the denoiser's config; None if it cannot be read, and is not checked here.
    """
    images, rows_each = model.config.max_batch_size, call.rows_of_picture
    if rows_each * images > rows:
        fix = "write half of max_rows" if rows_each == 2 else "write max_rows"
        yield model.fault(f"max_batch_size: {images} guided pictures are more than max_rows {rows}", fix)
    inputs = {item.name for item in model.config.input}
    for name in call.conditions.values():
        if name not in inputs:
            yield model.fault(f"input '{name}' is missing, which {place}/{FILE} names", FIX)
    if target is None:
        return
    if call.batched != (target.max_batch_size > 0):
        expected = "above 0" if call.batched else "0, for all rows of a call share the positions"
        yield model.fault(f"the denoiser has max_batch_size {target.max_batch_size}; expected {expected}", FIX)
    dims = {item.name: list(item.dims) for item in target.input}
    read = _inputs(call)
    for name in sorted({name for name in read if name not in dims} | {name for name in read if read.count(name) > 1}):
        problem = "has no input" if name not in dims else "gets twice the input"
        yield model.fault(f"the denoiser {problem} '{name}', which {place}/{FILE} names", FIX)
    for name in sorted(dims.keys() - set(read)):
        yield model.fault(f"the denoiser's input '{name}' is missing in {place}/{FILE}", FIX)
    if call.output not in {item.name for item in target.output}:
        yield model.fault(f"the denoiser has no output '{call.output}', which {place}/{FILE} names", FIX)
    for name, columns in (*call.picture_positions.items(), *call.text_positions.items()):
        if dims.get(name, [0])[-1] not in (len(columns), 0):
            yield model.fault(f"{place}/{FILE}: {len(columns)} columns of '{name}', the denoiser has {dims[name][-1]}", FIX)
    rank = (2 if call.tokens else 3) + (not call.batched)
    if call.state in dims and len(dims[call.state]) != rank:
        yield model.fault(f"{place}/{FILE}: tokens does not fit the denoiser's input '{call.state}'", FIX)


def _inputs(call: Call) -> list[str]:
    """The inputs of the denoiser that a pipeline sends."""
    guidance = [GUIDANCE] if call.guided_by == "input" else []
    return [
        call.state, "timestep", *call.conditions, *call.size_values, *call.picture_positions, *call.text_positions, *guidance,
    ]  # fmt: skip
