"""The engine of a finished export, for a diffusers pipeline."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from dq_export.core.documents import shown_path
from dq_export.core.network import BATCH, Input
from dq_export.deploy.backends import backend_of
from dq_export.deploy.onnxruntime.cpu import ORT
from dq_export.deploy.packages import require_packages

from .families.checkpoint import architecture_of, configuration
from .families.loading import make_empty, read_config
from .families.source import family_of
from .families.stand_in import StandIn
from .finished_folder import ENGINE, FLOAT_CONFIG, MODEL, REPORT, FinishedFolder, engine_of
from .hub_folder import fetch, is_hub_id
from .ledger import RECIPE
from .output_folder import OutputError


def load(place: str | Path) -> StandIn:
    """The engine of an output folder, here or on the hub; see `dq_export.load`.

    A folder of format `onnx`, which has no engine, gives its graph on ONNX Runtime's CPU provider.

    Raises:
        OutputError, RecipeError, ModelError, BackendError: see `dq_export.load`.
    """
    require_packages(["torch", "diffusers", "accelerate"], "dq_export.load")
    out = fetch(place) if isinstance(place, str) and is_hub_id(place) else Path(os.path.expanduser(place))
    finished = FinishedFolder.open(out, RECIPE, MODEL, REPORT, FLOAT_CONFIG)
    recipe = finished.recipe()
    backend = backend_of(recipe)
    if backend is not None and not (out / ENGINE).is_dir():
        raise OutputError(
            f"{shown_path(out)}: its engine is not built yet; run `dq-export finish {shown_path(out)}` on "
            "the machine that shall run it"
        )
    runtime = backend or ORT
    runtime.require()
    config = read_config(out / FLOAT_CONFIG)
    family = family_of(config, (out / FLOAT_CONFIG).parent)
    model = make_empty(family.network_class(str(architecture_of(config))), family.values, out / FLOAT_CONFIG, config)
    inputs = [*family.inputs(model)]
    if residuals := family.residuals(model):
        graph = finished.graph()  # the configuration is the same with and without a ControlNet
        names = {value.name for value in graph.graph.inputs}
        inputs += [item for item in residuals if item.name in names]
    return StandIn(
        network=runtime.load(engine_of(out)),
        inputs=_within(inputs, runtime.greatest_batch(out / MODEL)),
        config=configuration(model),
        architecture=type(model),
        shared=recipe.timesteps == "shared",
        part=family.part,
    )


def _within(inputs: Iterable[Input], batch: int | None) -> list[Input]:
    """The inputs with the greatest batch that the engine takes."""
    axis = BATCH if batch is None else replace(BATCH, limit=batch)
    return [replace(item, shape=(axis, *item.shape[1:])) if item.batched else item for item in inputs]
