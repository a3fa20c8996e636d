"""Rules for the pipelines that dq-export writes: their config.pbtxt, tables and denoiser."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

from dq_export.core.documents import DocumentError, parse_json, shown

from .call_rule import misfits
from .model_folder import Fault, Model, whole_number
from .serving.call import FILE as CALL
from .serving.call import LABELS, Call, CallError
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
        elif key == "classes" and LABELS not in {item.name for item in model.config.input}:
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
        target, rows = model.names.get(values.get("denoiser", "")), whole_number(values.get("max_rows", ""))
        yield from misfits(model, call, version.name, rows, target)
        if call.guided_by == "nothing" and _real(values.get("guidance_scale", "")) > 1:
            yield model.fault("parameters: guidance_scale is above 1, and the network has no guidance", "write 1")
        for name in call.tokenizers:
            try:
                model.read(version / name, TOKENIZER_LIMIT)
            except DocumentError as error:
                yield model.fault(f"{version.name}/{name}: {error}", "export again")
        if bool(call.tokenizers) != bool(values.get("text_encoder")):
            yield model.fault(f"parameters: text_encoder and the tokenizers of {version.name}/{CALL} do not fit", "export again")


def _real(text: str) -> float:
    """Read a number as the server does; return NaN for any other text."""
    try:
        return float(text)
    except ValueError:
        return math.nan
