"""What our own pipelines need of their config.pbtxt, their tables and their denoiser."""

from __future__ import annotations

import re
from collections.abc import Iterator

from .model_folder import Fault, Model
from .serving.model import PARAMETERS
from .serving.schedules import FILE, ScheduleError, Schedules

TEXTUAL = ("denoiser", "decoder", "scheduler", "schedulers", "guidance_scale")
"""Parameters of our own pipelines that are no whole numbers."""


def sampling(model: Model) -> Iterator[Fault]:
    """Our own pipelines: parameters, limits that suit the denoiser, and the tables."""
    given = {key: value.string_value for key, value in model.config.parameters.items()}
    if model.backend != "python" or "denoiser" not in given:
        return
    for key in PARAMETERS:
        if key not in given:
            yield model.fault(f"parameters: '{key}' is missing", "write it as the export did")
        elif key not in TEXTUAL and not re.fullmatch(r"[1-9]\d*", given[key]):
            yield model.fault(f"parameters: {key} '{given[key]}' is no whole number above 0", "write one, as a string")
    for key in sorted(given.keys() - set(PARAMETERS)):
        yield model.warning(f"parameters: '{key}' is not read", f"expected {', '.join(PARAMETERS)}")
    target = model.names.get(given["denoiser"])
    if given["denoiser"] not in model.names:
        yield model.fault(f"parameters: denoiser '{given['denoiser']}' is not here", "add it, or correct the name")
    if given.get("decoder", "") not in ("", *model.names):
        yield model.fault(f"parameters: decoder '{given['decoder']}' is not here", "add it, or leave it empty")
    rows = int(given["max_rows"]) if given.get("max_rows", "").isdigit() else 0
    if target is not None and rows < target.max_batch_size:
        told = f"parameters: max_rows {rows} is below the denoiser's max_batch_size {target.max_batch_size}"
        yield model.warning(told, "make them equal: others' failing requests could fail pictures, too")
    if target is not None and rows > target.max_batch_size:
        told = f"parameters: max_rows {rows} is above the denoiser's max_batch_size {target.max_batch_size}"
        yield model.fault(told, "lower it")
    images = int(given["max_images"]) if given.get("max_images", "").isdigit() else 0
    if 2 * images > rows:
        yield model.fault(f"parameters: max_images {images} guided pictures are more than max_rows {rows}", "half of max_rows")
    for version in model.versions:
        try:
            schedules = Schedules.load(version / FILE, given.get("schedulers", "").split(","))
            schedules.steps(given.get("scheduler", ""), int(given.get("num_inference_steps", "0")))
        except OSError as error:
            yield model.fault(f"{version.name}/{FILE}: {error.strerror or error}", "copy it there")
        except ScheduleError as error:
            yield model.fault(f"parameters: {error}", "choose one that the tables have")
        except ValueError as error:
            yield model.fault(f"{version.name}/{FILE}: not readable without pickles ({error})", "export again")
