"""An export's Triton model repository."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dq_export.core.progress import Advance
from dq_export.core.recipe import Recipe
from dq_export.deploy.backend import Backend
from dq_export.deploy.tensorrt.backend import PLAN
from dq_export.deploy.triton.model_config import MOST_ROWS, Served
from dq_export.deploy.triton.repository import CLIENT, PROBE, PROGRAM, PROXY, README, SERVED, write_repository

from ..families.reference import ModelError, Reference
from ..ledger import file_digest
from ..report.report import StageResult

REPOSITORY = "triton"
"""Its folder in an output folder."""
FEW_STEPS = 12
"""Tables of so many steps show whether a sampler has any: its order, its noise, its clipping. Larger ones take seconds."""
SERVED_INPUTS = ("hidden_states", "timestep", "class_labels")
"""Of the networks that the server's requests are for."""
MOST_STEPS = 100
"""That a request may ask for, unless the export itself sampled more: a table is a number of rows for each number of steps."""


def inputs(reference: Reference, recipe: Recipe) -> list[Any]:
    """What a repository depends on beside the graph and the engine."""
    vae = sorted(path for path in reference.decoder.iterdir() if path.is_file()) if reference.decoder else []
    served = [SERVED / name for name in (*PROGRAM, PROBE, CLIENT, PROXY, README)]
    return [reference.digest, recipe.steps, recipe.guidance_scale, *map(file_digest, (*vae, *served))]


def require_served(reference: Reference) -> None:
    """Ask for what the server needs before anything is computed.

    Raises:
        ModelError: the network has other inputs than the server's requests, or no sampler of the checkpoint can be served.
    """
    names = tuple(item.name for item in reference.inputs)
    if names != SERVED_INPUTS:
        raise ModelError(
            f"--triton: the server's requests hold class labels, for a network with {', '.join(SERVED_INPUTS)}; this one has "
            f"{', '.join(names)}. Leave --triton out"
        )
    reference.samplers(FEW_STEPS)


def write(
    reference: Reference, recipe: Recipe, backend: Backend, out: Path, folder: Path, progress: Advance
) -> StageResult:  # fmt: skip
    """Write the repository of `out`'s engine to `folder`: a stage's result.

    Raises:
        BackendError: it would not load.
        ModelError: no sampler of the checkpoint can be served, or its VAE is damaged.
    """
    from ..families.decoder import export_decoder

    decoder = folder.parent / "decoder" / "model.onnx"
    undecoded = (
        export_decoder(reference.decoder, reference.feed_shape, decoder, recipe.variant or "") if reference.decoder else ""
    )
    samplers = reference.samplers(max(MOST_STEPS, recipe.steps), progress)
    plan = out / "engine" / PLAN
    served = Served(
        backend=backend.triton,
        model=out / "model.onnx",
        plan=plan if plan.exists() else None,
        decoder=decoder if decoder.exists() else None,
        pictures=reference.decoder is None and reference.feed_shape[0] in (1, 3),
        most_rows=backend.greatest_batch(out / "model.onnx") or MOST_ROWS,
        classes=len(reference.conditions),
        steps=recipe.steps,
        guidance=recipe.guidance_scale or 1.0,
        scheduler=samplers.own,
        schedules=samplers.schedules,
    )
    faults = write_repository(served, folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    refused = [*samplers.refused, *filter(None, [undecoded])]
    said = [f"schedulers {', '.join(samplers.schedules.tables)}", *refused, f"{size / 1e6:.1f} MB"]
    return StageResult(summary="; ".join([*said, *(f"{item.model}: {item.what}" for item in faults)]))
