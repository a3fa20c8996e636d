"""What our own pipelines need of their config.pbtxt, their tables and their denoiser."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

from dq_export.core.documents import DocumentError, shown

from .model_folder import Fault, Model, whole
from .serving.health import PARAMETERS as PROBED
from .serving.model import PARAMETERS
from .serving.schedules import FILE, ScheduleError, Schedules

TEXTUAL = ("denoiser", "decoder", "scheduler", "schedulers", "guidance_scale")
"""Parameters of our own pipelines that are no whole numbers."""
TABLES_LIMIT = 1 << 30
"""Bytes of the samplers' tables; three of 1000 steps have 108 MB."""


def sampling(model: Model) -> Iterator[Fault]:
    """Our own pipelines: parameters, limits that suit the denoiser, and the tables."""
    given = {key: value.string_value for key, value in model.config.parameters.items()}
    if model.backend != "python" or "denoiser" not in given:
        return
    for key in PARAMETERS:
        if key not in given:
            yield model.fault(f"parameters: '{key}' is missing", "write it as the export did")
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
    if given.get("decoder", "") not in ("", *model.names):
        yield model.fault(f"parameters: decoder '{given['decoder']}' is not here", "add it, or leave it empty")
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


def probing(model: Model) -> Iterator[Fault]:
    """Our own `health`: whom it asks is here."""
    given = {key: value.string_value for key, value in model.config.parameters.items()}
    if model.backend != "python" or not set(PROBED) <= given.keys():
        return
    for name in (*given["pipelines"].split(","), given["network"]):
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


def _real(text: str) -> float:
    """A number as the server reads it; NaN where it is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan
