"""A whole search: calibrate every choice, look for the best mix, write it down as a recipe."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dq_export.calibration.artifacts import CalibrationResult
from dq_export.calibration.recipe import Recipe, RecipeError, Rule
from dq_export.deploy.backend import Backend
from dq_export.recording import HELD_OUT

from .families.reference import Feed, Reference
from .families.source import load, pin
from .front import draw_front
from .kernel_times import time_choices
from .ledger import claim, write_text
from .pipeline import Progress, Silent, resolve, sampling_of
from .report import FRONT
from .search import SEARCHES, Goal, Search
from .space import KNOWN, Genome, Space, space_of
from .trajectories import EVALUATIONS, Trajectories, uniform

MEGABYTE = 1e6
WINNER = "winner.yaml"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a search found.

    Args:
        recipe: the winner, to be exported as any other.
        sqnr, held_back: dB of its trajectories, on the pictures of the search and on others.
        size: megabytes of weights; `milliseconds`: of one network call by the table of kernels, NaN if not timed.
        evaluations: trajectories that were sampled for it.
        uniform: the same figures of recipes with one choice everywhere: (choice, megabytes, milliseconds, dB held back).
        front: (cost, dB, genome) of everything that nothing beats.
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
    *,
    target_sqnr: float | None = None,
    max_size: float | None = None,
    max_latency: float | None = None,
    evaluations: int = 300,
    strategy: str = "descend",
    pictures: int = 4,
    steps: int = 12,
    choices: Sequence[Rule] = KNOWN,
    progress: Progress | None = None,
) -> Outcome:
    """Search how each input of a model is quantized; exactly one of the three goals is given.

    Writes `winner.yaml`, `search.json` and `search.svg` into `folder`; `evaluations.jsonl` there makes a killed search go on.

    Args:
        recipe: of everything that is not searched: model, format, rounding, calibration, seed.
        target_sqnr: dB that the sampled trajectory must keep, at the least size.
        max_size: megabytes of weights, for the best trajectory.
        max_latency: milliseconds of one network call of batch 2, by a table of kernels that is timed here.
        evaluations: different mixes that are tried.
        strategy: one of SEARCHES.
        pictures, steps: of the trajectories that judge a mix.

    Raises:
        RecipeError: not exactly one goal, an unknown strategy, a model without choices, or nothing within the bound.
        ModelError, CalibrationError, OutputError: see each.
    """
    from dq_export.deploy.backends import backend_of

    given = [value for value in (target_sqnr, max_size, max_latency) if value is not None]
    if len(given) != 1:
        raise RecipeError("give one goal: --target-sqnr DB, --max-size MB or --max-latency MS")
    if strategy not in SEARCHES:
        raise RecipeError(f"--strategy '{strategy}': expected {' or '.join(SEARCHES)}")
    watch = progress or Silent()
    watch.begin("load", recipe.model)
    start = time.monotonic()
    backend = backend_of(recipe)
    recipe, source = pin(recipe)
    reference = load(source, watch.advance)
    base = resolve(recipe, (), reference, backend)
    space = space_of(reference, base, choices, backend.target if backend else None)
    watch.end(time.monotonic() - start, f"{len(space.sites)} inputs, {len(space.choices)} choices", kept=False)
    with claim(folder, base.dump(), overwrite=False):
        if max_latency is not None:
            space = _timed(space, reference, backend, watch)
        calibrated = _calibrate(reference, base, space, folder, watch)
        judged = base.model_copy(update={"steps": steps})
        trials = Trajectories.of(
            reference, space, judged, calibrated, seed=base.seed + HELD_OUT, size=pictures, journal=folder / EVALUATIONS
        )
        goal = Goal(
            cost=space.milliseconds_of if max_latency is not None else lambda genome: space.bytes_of(genome) / MEGABYTE,
            most=max_latency if max_size is None else max_size,
            sqnr=target_sqnr,
        )
        _require_possible(space, goal)
        start = time.monotonic()
        watch.begin("search", f"{strategy}, {evaluations} evaluations of {pictures} pictures in {steps} steps")

        def told(done: int, total: int, best: Genome | None) -> None:
            watch.advance(done, total)

        search = Search(space, goal, trials.sqnr, evaluations, told)
        SEARCHES[strategy](search, np.random.default_rng(base.seed))
        best = search.best()
        assert best is not None
        watch.end(time.monotonic() - start, f"{search.found[best]:.1f} dB at {goal.cost(best):.3g}", kept=False)
        fresh = _fresh(trials, folder)
        outcome = Outcome(
            recipe=base.model_copy(update={"rules": (*space.rules(best), *(base.rules or ()))}),
            sqnr=search.found[best],
            held_back=fresh.sqnr(best),
            size=space.bytes_of(best) / MEGABYTE,
            milliseconds=space.milliseconds_of(best),
            evaluations=len(search.found),
            uniform=_uniform(space, fresh, base),
            front=tuple(search.front()),
            reached=goal.rank(best, search.found[best])[0] > 0,
        )
        _write(outcome, space, folder, unit="ms" if max_latency is not None else "MB")
    return outcome


def _calibrate(reference: Reference, base: Recipe, space: Space, folder: Path, watch: Progress) -> dict[Rule, CalibrationResult]:
    """Every choice everywhere: the pictures are sampled once and kept beside the evaluations."""
    from dq_export.calibration.plan import calibrate

    found = {}
    for rule in [rule for rule in space.choices if rule.weight is not None]:
        name = "-".join(str(part) for part in (rule.action, rule.granularity, rule.group_size))
        path = folder / "choices" / f"{name}.safetensors"
        recipe, start = uniform(base, space, rule), time.monotonic()
        watch.begin("calibrate", _label(rule))
        if path.exists():
            found[rule] = CalibrationResult.load(path)
            watch.end(0.0, "", kept=True)
            continue
        assigned, sampling = recipe.assign(reference.linears), sampling_of(recipe, reference)
        result = calibrate(reference, recipe, assigned, sampling, {}, watch.advance, folder / "statistics")
        assert result is not None
        path.parent.mkdir(exist_ok=True)
        partial = path.with_suffix(".new")
        result.save(partial)
        partial.rename(path)
        found[rule] = result
        watch.end(time.monotonic() - start, f"{len(result.sites)} inputs", kept=False)
    return found


def _label(rule: Rule) -> str:
    """A choice in words: `w4a8 token 64`."""
    return " ".join(str(part) for part in (rule.action, rule.granularity, rule.group_size) if part not in (None, 0))


def _timed(space: Space, reference: Reference, backend: Backend | None, watch: Progress) -> Space:
    """The space with milliseconds of a call of batch 2."""
    if backend is None or not backend.runs:
        raise RecipeError("--max-latency times kernels, which needs a --format that runs on this machine")
    start = time.monotonic()
    watch.begin("time", "kernels of every shape and choice")
    tokens = _rows(reference)
    known: dict[tuple[int, int], list[float]] = {}
    taken = np.full(space.allowed.shape, np.inf)
    for i, site in enumerate(space.sites):
        for name in space.linears[site]:
            weight = reference.weight(name)
            usable = np.flatnonzero(space.allowed[i])
            if weight.shape not in known:
                rules = [space.choices[j] for j in usable]
                known[weight.shape] = time_choices(backend, weight, tokens[site], rules)
            before = np.where(np.isinf(taken[i, usable]), 0.0, taken[i, usable])
            taken[i, usable] = before + np.asarray(known[weight.shape])
        watch.advance(i + 1, len(space.sites))
    watch.end(time.monotonic() - start, f"{len(known)} shapes", kept=False)
    return replace(space, time=taken)


def _rows(reference: Reference) -> dict[str, int]:
    """Rows of each site's input at a call of batch 2."""
    found: dict[str, int] = {}
    feed: Feed = {
        "hidden_states": reference.noise(2, 0),
        "timestep": np.asarray([500], dtype=np.int64),
        "class_labels": np.zeros(2, dtype=np.int64),
    }

    def watch(name: str, value: Any) -> None:
        found[name] = len(value)

    with reference.observe(watch):
        reference.forward(feed)
    return found


def _require_possible(space: Space, goal: Goal) -> None:
    if goal.most is None:
        return
    costs = np.where(space.allowed, space.size if space.time is None else space.time, np.inf)
    least = goal.cost(tuple(np.argmin(costs, axis=1).tolist()))
    if least > goal.most:
        raise RecipeError(f"the smallest of all mixes costs {least:.4g}, more than the {goal.most:g} asked for; raise the bound")


def _fresh(trials: Trajectories, folder: Path) -> Trajectories:
    """The same judge on other noise and labels, which no choice saw."""
    journal = folder / f"held-back-{EVALUATIONS}"
    other = replace(
        trials,
        noise=trials.reference.noise(len(trials.labels), trials.recipe.seed + 2 * HELD_OUT),
        labels=(trials.labels + len(trials.labels)) % trials.reference.classes,
        known={},
        journal=journal,
    )
    return replace(other, exact=other.latents(trials.reference.forward))


def _uniform(space: Space, fresh: Trajectories, base: Recipe) -> tuple[tuple[str, float, float, float], ...]:
    rows = []
    for rule in space.choices:
        genome = space.everywhere(rule)
        rows.append((_label(rule), space.bytes_of(genome) / MEGABYTE, space.milliseconds_of(genome), fresh.sqnr(genome)))
    return tuple(rows)


def _write(outcome: Outcome, space: Space, folder: Path, *, unit: str) -> None:
    write_text(folder / WINNER, outcome.recipe.dump())
    described = {
        "sqnr": outcome.sqnr,
        "held_back": outcome.held_back,
        "megabytes": outcome.size,
        "milliseconds": None if np.isnan(outcome.milliseconds) else outcome.milliseconds,
        "evaluations": outcome.evaluations,
        "unit": unit,
        "choices": [_label(rule) for rule in space.choices],
        "sites": list(space.sites),
        "uniform": [{"choice": n, "megabytes": mb, "sqnr": db} for n, mb, _, db in outcome.uniform],
        "front": [{"cost": cost, "sqnr": sqnr, "genome": list(genome)} for cost, sqnr, genome in outcome.front],
    }
    write_text(folder / "search.json", json.dumps(described, indent=1) + "\n")
    others = [(name, ms if unit == "ms" else mb, db) for name, mb, ms, db in outcome.uniform]
    write_text(folder / FRONT, draw_front([(c, s) for c, s, _ in outcome.front], others, unit))
