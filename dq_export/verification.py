"""Replaying the recorded network calls of a finished export, as a CI does with polygraphy, but trusting nothing in its folder."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dq_export.core.documents import DocumentError, shown_path
from dq_export.core.recipe import Recipe, RecipeError
from dq_export.deploy.backend import BackendError
from dq_export.deploy.onnxruntime.cpu import open_graph, session_errors
from dq_export.deploy.replay import replay

from .finished_folder import MODEL, FinishedFolder, portable_name
from .ledger import RECIPE
from .output_folder import OutputError
from .report.report import REPLAY_MARGIN, Report


@dataclass(frozen=True, kw_only=True)
class Verification:
    """How a finished graph did.

    Args:
        calls: dB and timestep of each recorded call.
        limit: dB that each must keep.
        origin: where the limit comes from.
    """

    calls: tuple[tuple[float, float], ...]
    limit: float
    origin: str

    @property
    def worst(self) -> tuple[float, float]:
        """dB and timestep of the call that keeps the least."""
        return min(self.calls)

    @property
    def passed(self) -> bool:
        """Whether every call keeps the limit."""
        return self.worst[0] >= self.limit


def verify_again(out: Path, min_sqnr: float | None, *, verbose: bool) -> Verification:
    """Run the graph of a finished export on its recorded calls, on ONNX Runtime's CPU provider.

    Args:
        min_sqnr: dB that every call must keep; None: what the export measured less a margin, but at least what its recipe
            requires.
        verbose: let polygraphy print what it does.

    Raises:
        OutputError: `out` holds no export whose calls were recorded, or it is damaged.
        RecipeError: its recipe is damaged, or `min_sqnr` is not finite.
        BackendError: ONNX Runtime is missing or refuses the graph.
    """
    if min_sqnr is not None and not math.isfinite(min_sqnr):
        raise RecipeError(f"--min-sqnr {min_sqnr}: expected a number of dB")
    folder = FinishedFolder.open(out, RECIPE, MODEL)
    recipe = folder.recipe()
    feeds, references = folder.calls()
    limit, origin = _limit(recipe, folder.report()) if min_sqnr is None else (min_sqnr, "--min-sqnr")
    model = out / portable_name(recipe)
    try:
        engine = open_graph(model)
        wrong = next(filter(None, map(engine.misfit, feeds)), "")
        if wrong:
            raise DocumentError(f"does not take the recorded calls: {wrong}")
        calls = replay(engine, feeds, references, limit, verbose=verbose)
    except DocumentError as error:
        raise OutputError(f"{shown_path(model)}: {error}; export again") from error
    except session_errors() as error:
        raise BackendError(f"ONNX Runtime cannot run {shown_path(model)} on the recorded calls: {error}") from error
    timesteps = [float(np.asarray(feed["timestep"]).ravel()[0]) for feed in feeds]
    return Verification(calls=tuple(zip(calls, timesteps, strict=True)), limit=limit, origin=origin)


def _limit(recipe: Recipe, report: Report) -> tuple[float, str]:
    """dB, and where they come from. Both files are the folder's own: who does not trust it passes a limit."""
    limit = report.replay_floor(recipe.min_sqnr)
    if limit == recipe.min_sqnr:
        return limit, f"min_sqnr of {RECIPE}"
    return limit, f"what the export measured less {REPLAY_MARGIN:g} dB; {RECIPE} requires {recipe.min_sqnr:g}"
