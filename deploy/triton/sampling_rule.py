"""Rules for the pipelines that dq-export writes: their config.pbtxt, tables and denoiser."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from dq_export.core.documents import DocumentError, parse_json, shown

from .model_folder import Fault, Model, whole_number
from .serving.call import FILE as CALL
from .serving.call import Call, CallError
from .serving.health import PROBES_KEY
from .serving.model import PARAMETERS
from .serving.schedules import FILE, ScheduleError, Schedules
from .serving.sizes import PARAMETERS as SIZES
from .serving.sizes import Sizes

TEXTUAL = ("denoiser", "decoder", "text_encoder", "scheduler", "schedulers", "guidance_scale")
"""Parameters of these pipelines that are not whole numbers."""
TABLES_LIMIT = 1 << 30
"""Greatest size of the samplers' tables in bytes; three tables of up to 1000 steps have 108 MB."""

CALL_LIMIT, TOKENIZER_LIMIT = 64 << 10, 64 << 20
"""Greatest sizes in bytes of the file that describes the network's call, and of a tokenizer; that of T5 has 2.4 million."""


def sampling(model: Model) -> Iterator[Fault]:
    """Check a pipeline's parameters, its limits against the denoiser's, and its tables."""
    values = {key: value.string_value for key, value in model.config.parameters.items()}
    if model.backend != "python" or "denoiser" not in values:
        return
    for key in PARAMETERS:
        if key not in values:
            yield model.fault(f"parameters: '{key}' is missing", "write it as the export did")
        elif key == "classes" and values.get("text_encoder"):
            continue
        elif key not in TEXTUAL and not re.fullmatch(r"[1-9][0-9]{0,8}", values[key]):
            yield model.fault(f"parameters: {key} {shown(values[key])} is not a whole number above 0", "write one, as a string")
    yield from _sizes(model, values)
    if "guidance_scale" in values and not 0 <= _real(values["guidance_scale"]) < math.inf:
        problem = f"parameters: guidance_scale {shown(values['guidance_scale'])} is not a finite number of 0 or more"
        yield model.fault(problem, "write one, as a string; 1 or less turns guidance off")
    for key in sorted(values.keys() - set(PARAMETERS)):
        yield model.warning(f"parameters: '{key}' is not read", f"expected {', '.join(PARAMETERS)}")
    target = model.names.get(values["denoiser"])
    if values["denoiser"] not in model.names:
        yield model.fault(f"parameters: denoiser '{values['denoiser']}' is not in the repository", "add it, or correct the name")
    for key in ("decoder", "text_encoder"):
        if values.get(key, "") not in ("", *model.names):
            yield model.fault(f"parameters: {key} '{values[key]}' is not in the repository", "add it, or leave it empty")
    rows = whole_number(values.get("max_rows", ""))
    if target is not None and rows < target.max_batch_size:
        problem = f"parameters: max_rows {rows} is below the denoiser's max_batch_size {target.max_batch_size}"
        yield model.warning(problem, "make them equal: a failing request of others can fail pictures, too")
    if target is not None and rows > target.max_batch_size > 0:
        problem = f"parameters: max_rows {rows} is above the denoiser's max_batch_size {target.max_batch_size}"
        yield model.fault(problem, "lower it")
    yield from _tables(model, values)
    yield from _call(model, values)


def probing(model: Model) -> Iterator[Fault]:
    """Check that the models that `health` asks are in the repository."""
    if model.backend != "python" or PROBES_KEY not in model.config.parameters:
        return
    try:
        probes = parse_json(model.config.parameters[PROBES_KEY].string_value, f"parameters: {PROBES_KEY}")
        names = [str(name) for name, _, _ in probes]
    except (DocumentError, TypeError, ValueError) as error:
        yield model.fault(f"parameters: {PROBES_KEY} is not a list of [model, output, inputs] ({error})", "export again")
        return
    for name in names:
        if name not in model.names:
            yield model.fault(
                f"parameters: model {shown(name)} is not in the repository, so health always fails", "remove it, or add the model"
            )


def _sizes(model: Model, values: Mapping[str, str]) -> Iterator[Fault]:
    """Check that the sizes fit each other. Missing and unreadable numbers have faults of their own."""
    if all(whole_number(values.get(key, "")) for key in SIZES):
        try:
            Sizes.of(values)
        except ValueError as error:
            yield model.fault(f"parameters: {error}", "correct one of them")


def _tables(model: Model, values: Mapping[str, str]) -> Iterator[Fault]:
    for version in model.versions:
        try:
            schedules = Schedules.parse(model.read(version / FILE, TABLES_LIMIT), values.get("schedulers", "").split(","))
        except (DocumentError, ScheduleError) as error:
            yield model.fault(f"{version.name}/{FILE}: {error}", "export again")
            continue
        try:
            schedules.steps(values.get("scheduler", ""), whole_number(values.get("num_inference_steps", "")))
        except ScheduleError as error:
            yield model.fault(f"parameters: {error}", "choose one that the tables have")


def _call(model: Model, values: Mapping[str, str]) -> Iterator[Fault]:
    """Check the description of the network's call: the model has its inputs, and its tokenizers lie beside the file."""
    for version in model.versions:
        try:
            call = Call.parse(model.read(version / CALL, CALL_LIMIT))
        except (DocumentError, CallError) as error:
            yield model.fault(f"{version.name}/{CALL}: {error}", "export again")
            continue
        inputs = {item.name for item in model.config.input}
        for name in call.conditions.values():
            if name not in inputs:
                yield model.fault(f"input '{name}' is missing, which {version.name}/{CALL} names", "export again")
        target = model.names.get(values.get("denoiser", ""))
        yield from _batches(model, call, whole_number(values.get("max_rows", "")), target)
        read = [*call.size_values, *call.picture_positions, *call.text_positions]
        tensors = {item.name for item in target.input} if target is not None else set(read)
        for name in read:
            if name not in tensors:
                yield model.fault(f"the denoiser has no input '{name}', which {version.name}/{CALL} names", "export again")
        for name in call.tokenizers:
            try:
                model.read(version / name, TOKENIZER_LIMIT)
            except DocumentError as error:
                yield model.fault(f"{version.name}/{name}: {error}", "export again")
        if bool(call.tokenizers) != bool(values.get("text_encoder")):
            yield model.fault(f"parameters: text_encoder and the tokenizers of {version.name}/{CALL} do not fit", "export again")


def _batches(model: Model, call: Call, rows: int, target: Any) -> Iterator[Fault]:
    """Check the batches of a pipeline and of its denoiser against what the network's call takes."""
    images, rows_each = model.config.max_batch_size, call.rows_of_picture
    if rows_each * images > rows:
        fix = "write half of max_rows" if rows_each == 2 else "write max_rows"
        yield model.fault(f"max_batch_size: {images} guided pictures are more than max_rows {rows}", fix)
    if target is not None and call.batched != (target.max_batch_size > 0):
        expected = "above 0" if call.batched else "0, for all rows of a call share the positions"
        yield model.fault(f"the denoiser has max_batch_size {target.max_batch_size}; expected {expected}", "export again")


def _real(text: str) -> float:
    """Read a number as the server does; return NaN for any other text."""
    try:
        return float(text)
    except ValueError:
        return math.nan
