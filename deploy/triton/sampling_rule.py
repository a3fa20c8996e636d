"""What our own pipelines need of their config.pbtxt, their tables and their denoiser."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

from dq_export.core.documents import DocumentError, parse_json, shown

from .model_folder import Fault, Model, whole
from .serving.call import FILE as CALL
from .serving.call import Call, CallError
from .serving.health import ASKED
from .serving.model import PARAMETERS
from .serving.schedules import FILE, ScheduleError, Schedules

TEXTUAL = ("denoiser", "decoder", "text_encoder", "scheduler", "schedulers", "guidance_scale")
"""Parameters of our own pipelines that are no whole numbers."""
TABLES_LIMIT = 1 << 30
"""Bytes of the samplers' tables; three of 1000 steps have 108 MB."""

CALL_LIMIT, TOKENIZER_LIMIT = 64 << 10, 64 << 20
"""Bytes of the file that describes the network's call, and of a tokenizer; the largest of T5 has 2.4 million."""


def sampling(model: Model) -> Iterator[Fault]:
    """Our own pipelines: parameters, limits that suit the denoiser, and the tables."""
    given = {key: value.string_value for key, value in model.config.parameters.items()}
    if model.backend != "python" or "denoiser" not in given:
        return
    for key in PARAMETERS:
        if key not in given:
            yield model.fault(f"parameters: '{key}' is missing", "write it as the export did")
        elif key == "classes" and given.get("text_encoder"):
            continue
        elif key not in TEXTUAL and not re.fullmatch(r"[1-9][0-9]{0,8}", given[key]):
            yield model.fault(f"parameters: {key} {shown(given[key])} is no whole number above 0", "write one, as a string")
    if "guidance_scale" in given and not 0 <= _real(given["guidance_scale"]) < math.inf:
        what = f"parameters: guidance_scale {shown(given['guidance_scale'])} is no finite number of 0 or more"
        yield model.fault(what, "write one, as a string; 1 and less: off")
    for key in sorted(given.keys() - set(PARAMETERS)):
        yield model.warning(f"parameters: '{key}' is not read", f"expected {', '.join(PARAMETERS)}")
    target = model.names.get(given["denoiser"])
    if given["denoiser"] not in model.names:
        yield model.fault(f"parameters: denoiser '{given['denoiser']}' is not here", "add it, or correct the name")
    for key in ("decoder", "text_encoder"):
        if given.get(key, "") not in ("", *model.names):
            yield model.fault(f"parameters: {key} '{given[key]}' is not here", "add it, or leave it empty")
    rows = whole(given.get("max_rows", ""))
    if target is not None and rows < target.max_batch_size:
        told = f"parameters: max_rows {rows} is below the denoiser's max_batch_size {target.max_batch_size}"
        yield model.warning(told, "make them equal: others' failing requests could fail pictures, too")
    if target is not None and rows > target.max_batch_size:
        told = f"parameters: max_rows {rows} is above the denoiser's max_batch_size {target.max_batch_size}"
        yield model.fault(told, "lower it")
    images = model.config.max_batch_size
    if 2 * images > rows:
        yield model.fault(f"max_batch_size: {images} guided pictures are more than max_rows {rows}", "half of max_rows")
    yield from _tables(model, given)
    yield from _call(model, given)


def probing(model: Model) -> Iterator[Fault]:
    """Our own `health`: whom it asks is here."""
    if model.backend != "python" or ASKED not in model.config.parameters:
        return
    try:
        asked = parse_json(model.config.parameters[ASKED].string_value, f"parameters: {ASKED}")
        names = [str(name) for name, _, _ in asked]
    except (DocumentError, TypeError, ValueError) as error:
        yield model.fault(f"parameters: {ASKED} is no list of [model, output, inputs] ({error})", "export again")
        return
    for name in names:
        if name not in model.names:
            yield model.fault(f"parameters: model {shown(name)} is not here, so health always fails", "take it out, or add it")


def _tables(model: Model, given: Mapping[str, str]) -> Iterator[Fault]:
    for version in model.versions:
        try:
            schedules = Schedules.parse(model.read(version / FILE, TABLES_LIMIT), given.get("schedulers", "").split(","))
        except (DocumentError, ScheduleError) as error:
            yield model.fault(f"{version.name}/{FILE}: {error}", "export again")
            continue
        try:
            schedules.steps(given.get("scheduler", ""), whole(given.get("num_inference_steps", "")))
        except ScheduleError as error:
            yield model.fault(f"parameters: {error}", "choose one that the tables have")


def _call(model: Model, given: Mapping[str, str]) -> Iterator[Fault]:
    """How the network is called: its inputs are the request's, and tokenizers lie beside the file."""
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
        for name in call.tokenizers:
            try:
                model.read(version / name, TOKENIZER_LIMIT)
            except DocumentError as error:
                yield model.fault(f"{version.name}/{name}: {error}", "export again")
        if bool(call.tokenizers) != bool(given.get("text_encoder")):
            yield model.fault(f"parameters: text_encoder and the tokenizers of {version.name}/{CALL} do not fit", "export again")


def _real(text: str) -> float:
    """A number as the server reads it; NaN where it is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan
