"""A complete search: calibrate every choice, find the best mix, and write it as a recipe."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dq_export.core.artifacts import CalibrationResult
from dq_export.core.condition_file import CONDITIONS
from dq_export.core.progress import Progress, Silent
from dq_export.core.recipe import Recipe, RecipeError
from dq_export.core.scheme import Scheme
from dq_export.deploy.backends import backend_of
from dq_export.deploy.packages import require_packages

from ..families.reference import Reference
from ..families.source import load, pin
from ..families.text_encoders import require_prompts
from ..ledger import claim
from ..output_folder import standing, write_text
from ..preparation import TRACING, require_conditions, resolve
from ..report.front import Front
from ..report.report import FRONT
from ..stages.calibrate import sampling_of
from ..stages.conditions import ENCODING, draws_prompts, set_conditions, write_conditions
from ..stages.recording import HELD_OUT
from .goal import MEGABYTE, goal_of, require_possible, require_timing
from .kernel_times import time_space
from .request import SearchError, SearchRequest
from .space import CHOICES, Genome, Space, space_of
from .strategies import SEARCHES, Search, evaluations_of
from .trajectories import EVALUATIONS, Trajectories, uniform

WINNER = "winner.yaml"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a search.

    Args:
        recipe: the winner, which can be exported like any other recipe.
        sqnr, held_back: SQNR of its trajectories in dB, on the pictures of the search and on other pictures.
        size: megabytes of weights; `milliseconds`: of one network call by the table of kernels, NaN if not timed.
        evaluations: the number of sampled trajectories.
        uniform: the same figures for recipes with one choice everywhere: (choice, megabytes, milliseconds, dB held back).
        front: (cost, dB, genome) of every mix that no other mix beats.
        reached: whether the winner meets the goal.
    """

    recipe: Recipe
    sqnr: float
    held_back: float
    size: float
    milliseconds: float
    evaluations: int
    uniform: tuple[tuple[str, float, float, float], ...]
    front: tuple[tuple[float, float, Genome], ...]
    reached: bool


def explore(
    recipe: Recipe,
    folder: Path,
    request: SearchRequest,
    *,
    choices: Sequence[Scheme] = CHOICES,
    progress: Progress | None = None,
) -> Outcome:
    """Search how each input of a model is quantized.

    Writes `winner.yaml`, `search.json` and `search.svg` into `folder`; with `evaluations.jsonl` there a killed search continues.

    Args:
        recipe: everything that is not searched: model, format, rounding, calibration, seed.

    Raises:
        RecipeError: the request is invalid or cannot be met, or the model has no choices.
        SearchError: no mix that was tried meets the request; then there is no `winner.yaml`.
        BackendError: kernels must be timed, but the format does not run here.
        ModelError, CalibrationError, OutputError: as their classes describe.
    """
    request.require_valid()
    require_packages(("torch", "diffusers", "safetensors", "onnx", "onnxscript"), "dq-export search")
    backend = backend_of(recipe)
    if request.max_latency is not None:
        require_timing(backend, recipe)
    if recipe.tables is not None:
        raise RecipeError("tables: they are for the bits that they were trained with, which a search varies; leave them out")
    watch = progress or Silent()
    watch.begin("load", recipe.model)
    start = time.monotonic()
    recipe, source = pin(recipe.settled())
    if recipe.prompts is not None:
        require_packages(ENCODING, "prompts")
        require_prompts(source.family, source.checkpoint, recipe.prompts)
    reference = load(source, watch.advance, standing(folder))
    watch.begin("load", TRACING)
    base = resolve(recipe, (), reference, backend)
    require_conditions(base, reference)
    for steps in (base.steps, request.steps):  # of calibration, and of the pictures that judge a mix
        reference.timesteps(steps)
    space = space_of(reference, base, choices, backend)
    if request.max_size is not None:
        require_possible(space, goal_of(space, request), request)
    cost = f"{evaluations_of(space)} evaluations measure each alone"
    watch.end(time.monotonic() - start, f"{len(space.sites)} inputs, {len(space.choices)} choices; {cost}", kept=False)
    with claim(folder, base.dump(), overwrite=False):
        if request.max_latency is not None:
            kernels = backend_of(recipe.model_copy(update=dict.fromkeys(("min_shapes", "opt_shapes", "max_shapes"), "")))
            assert kernels is not None  # without the shapes of the network's inputs
            space = time_space(space, reference, kernels, watch)
            require_possible(space, goal_of(space, request), request)
        _encode(reference, base, folder, watch)
        calibrated = _calibrate(reference, base, space, folder, watch)
        trials = Trajectories.of(
            reference, space, base.model_copy(update={"steps": request.steps}), calibrated, seed=base.seed + HELD_OUT,
            size=request.pictures, journal=folder / EVALUATIONS,
        )  # fmt: skip
        search = _searched(space, request, trials, base.seed, watch)
        outcome = _outcome(search, base, trials, folder)
        _write(outcome, search, folder, request)
        if not outcome.reached:
            (folder / WINNER).unlink(missing_ok=True)
            raise SearchError(_unmet(outcome, request))
        write_text(folder / WINNER, outcome.recipe.dump())
    return outcome


def _searched(space: Space, request: SearchRequest, trials: Trajectories, seed: int, watch: Progress) -> Search:
    """Find the best mix."""
    start = time.monotonic()
    watch.begin(
        "search", f"{request.strategy}, {request.evaluations} mixes by {request.pictures} pictures of {request.steps} steps"
    )
    goal = goal_of(space, request)
    search = Search(space, goal, trials.sqnr, request.evaluations, lambda done, total, best: watch.advance(done, total, "mixes"))
    SEARCHES[request.strategy](search, np.random.default_rng(seed))
    best = search.best()
    assert best is not None  # at least one is evaluated
    watch.end(time.monotonic() - start, f"{search.sqnrs[best]:.1f} dB at {goal.cost(best):.3g} {request.unit}", kept=False)
    return search


def _outcome(search: Search, base: Recipe, trials: Trajectories, folder: Path) -> Outcome:
    """The best mix, judged by pictures that the search did not see, compared with one choice everywhere."""
    space, best = search.space, search.best()
    assert best is not None
    fresh = _fresh(trials, folder)
    return Outcome(
        recipe=base.model_copy(update={"rules": (*space.rules(best), *(base.rules or ()))}),
        sqnr=search.sqnrs[best],
        held_back=fresh.sqnr(best),
        size=space.bytes_of(best) / MEGABYTE,
        milliseconds=space.milliseconds_of(best),
        evaluations=len(search.sqnrs),
        uniform=_uniform(space, fresh),
        front=tuple(search.front()),
        reached=search.goal.met(best, search.sqnrs[best]),
    )


def _unmet(outcome: Outcome, request: SearchRequest) -> str:
    cost = outcome.size if request.max_latency is None else outcome.milliseconds
    nearest = f"the nearest keeps {outcome.sqnr:.1f} dB at {cost:.4g} {request.unit}"
    return (
        f"{request.option}: none of {outcome.evaluations} mixes that quantize anything meets it; {nearest}. Change the goal, or "
        "give more --evaluations"
    )


def _encode(reference: Reference, base: Recipe, folder: Path, watch: Progress) -> None:
    """Set the conditions of a network that draws prompts; they are encoded once and kept beside the evaluations."""
    if not draws_prompts(base):
        return
    path, start = folder / CONDITIONS, time.monotonic()
    watch.begin("conditions", "for all calibrations and pictures")
    exists = path.exists()
    if not exists:
        partial = path.with_suffix(".new")
        write_conditions(reference, base, partial, "cpu", watch.advance)
        partial.rename(path)
    set_conditions(reference, path)
    watch.end(time.monotonic() - start, f"{len(reference.conditions)} conditions", kept=exists)


def _calibrate(
    reference: Reference, base: Recipe, space: Space, folder: Path, watch: Progress
) -> dict[Scheme, CalibrationResult]:
    """Calibrate the network with every choice everywhere; the pictures are sampled once and kept beside the evaluations."""
    from dq_export.calibration.calibrate import calibrate
    from dq_export.calibration.context import Calibration

    calibrated = {}
    schemes = [scheme for scheme in space.choices if scheme.low_precision]
    for number, scheme in enumerate(schemes, start=1):
        name = scheme.label.replace(" ", "-")
        path = folder / "choices" / f"{name}.safetensors"
        recipe, start = uniform(base, space, scheme), time.monotonic()
        watch.begin("calibrate", f"{scheme.label} {number}/{len(schemes)}")
        if path.exists():
            calibrated[scheme] = CalibrationResult.load(path)
            watch.end(0.0, "", kept=True)
            continue
        result = calibrate(
            Calibration(
                denoiser=reference,
                recipe=recipe,
                assigned=recipe.assign(reference.linears),
                sampling=sampling_of(recipe, reference),
                folder=folder / "statistics",
                progress=watch.advance,
            )
        )
        assert result is not None
        path.parent.mkdir(exist_ok=True)
        partial = path.with_suffix(".new")
        result.save(partial)
        partial.rename(path)
        calibrated[scheme] = result
        watch.end(time.monotonic() - start, f"{len(result.sites)} inputs", kept=False)
    return calibrated


def _fresh(trials: Trajectories, folder: Path) -> Trajectories:
    """The same judge with other noise and conditions, which the search did not use."""
    journal = folder / f"held-back-{EVALUATIONS}"
    reference, count = trials.reference, len(trials.conditions)
    other = replace(
        trials,
        noise=reference.noise(count, trials.recipe.seed + 2 * HELD_OUT),
        conditions=(trials.conditions + count) % len(reference.conditions),
        sqnrs={},
        journal=journal,
    )
    return replace(other, exact=other.latents(reference.forward))


def _uniform(space: Space, fresh: Trajectories) -> tuple[tuple[str, float, float, float], ...]:
    rows = []
    for scheme in space.choices:
        genome = space.everywhere(scheme)
        rows.append((scheme.label, space.bytes_of(genome) / MEGABYTE, space.milliseconds_of(genome), fresh.sqnr(genome)))
    return tuple(rows)


def _write(outcome: Outcome, search: Search, folder: Path, request: SearchRequest) -> None:
    """Write the search's results as data and as a picture."""
    space, unit = search.space, request.unit
    content = {
        "sqnr": outcome.sqnr,
        "held_back": outcome.held_back,
        "megabytes": outcome.size,
        "milliseconds": None if np.isnan(outcome.milliseconds) else outcome.milliseconds,
        "reached": outcome.reached,
        "evaluations": outcome.evaluations,
        "unit": unit,
        "choices": [scheme.label for scheme in space.choices],
        "sites": list(space.sites),
        "uniform": [{"choice": n, "megabytes": mb, "sqnr": db} for n, mb, _, db in outcome.uniform],
        "front": [{"cost": cost, "sqnr": sqnr, "genome": list(genome)} for cost, sqnr, genome in outcome.front],
    }
    write_text(folder / "search.json", json.dumps(content, indent=1) + "\n")
    uniform = [(scheme.label, space.everywhere(scheme)) for scheme in space.choices]
    picture = Front(
        unit=unit,
        mixes=tuple((cost, sqnr) for cost, sqnr, _ in outcome.front),
        uniform=tuple((name, search.goal.cost(g), search.sqnrs[g]) for name, g in uniform if g in search.sqnrs),
        winner=(outcome.milliseconds if unit == "ms" else outcome.size, outcome.sqnr) if outcome.reached else None,
        limit=request.limit,
        target=request.target_sqnr,
    )
    write_text(folder / FRONT, picture.draw())
