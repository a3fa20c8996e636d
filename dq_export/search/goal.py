"""The goal of a search, and the check, before it starts, that the goal is possible."""

from __future__ import annotations

import numpy as np

from dq_export.core.recipe import Recipe, RecipeError
from dq_export.deploy.backend import Backend

from .request import SearchRequest
from .space import Space
from .strategies import Goal

MEGABYTE = 1e6


def goal_of(space: Space, request: SearchRequest) -> Goal:
    """The request, expressed for genomes."""
    by_size = request.max_latency is None
    cost = (lambda genome: space.bytes_of(genome) / MEGABYTE) if by_size else space.milliseconds_of
    return Goal(cost=cost, limit=request.limit, sqnr=request.target_sqnr, quantizes=space.quantizes)


def require_possible(space: Space, goal: Goal, request: SearchRequest) -> None:
    """Check that the cheapest mix is within the limit.

    Raises:
        RecipeError: it is not; the message states its cost.
    """
    costs = np.where(space.allowed, space.size if space.time is None else space.time, np.inf)
    lowest = goal.cost(tuple(np.argmin(costs, axis=1).tolist()))
    if goal.limit is not None and lowest > goal.limit:
        raise RecipeError(f"{request.option}: the cheapest of all mixes takes {lowest:.4g} {request.unit}; raise the limit")


def require_timing(backend: Backend | None, recipe: Recipe) -> None:
    """Check the requirements of timing kernels, before anything is loaded."""
    if backend is None:
        raise RecipeError(f"--max-latency times kernels, and --format {recipe.format} builds none; choose another --format")
    if not backend.runs:
        raise RecipeError(
            f"--max-latency times kernels, and those of --format {recipe.format} run on an NVIDIA GPU with its library only; "
            "search on such a machine, or give --max-size"
        )
    backend.require()
