"""What a search looks for, and what can be known to be out of reach before it starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dq_export.core.recipe import Recipe, RecipeError
from dq_export.deploy.backend import Backend

from .request import SearchRequest
from .space import Genome, Space

MEGABYTE = 1e6


@dataclass(frozen=True, kw_only=True)
class Goal:
    """Either the best pictures at a cost, or the least cost of good enough pictures.

    Args:
        cost: of a genome: megabytes or milliseconds.
        limit: the greatest cost that a genome may have, or None.
        sqnr: dB that the trajectory must have, or None.
        quantizes: whether a genome quantizes anything: the float network is never what a search looks for.
    """

    cost: Callable[[Genome], float]
    limit: float | None = None
    sqnr: float | None = None
    quantizes: Callable[[Genome], bool] = lambda genome: True

    def legal(self, genome: Genome) -> bool:
        """Whether the cost is within the limit, and anything is quantized."""
        return self.quantizes(genome) and (self.limit is None or self.cost(genome) <= self.limit)

    def met(self, genome: Genome, sqnr: float) -> bool:
        """Whether a genome of that trajectory is what the search looks for."""
        return self.legal(genome) and (self.sqnr is None or sqnr >= self.sqnr)

    def rank(self, genome: Genome, sqnr: float) -> tuple[float, ...]:
        """Greater is better; a genome that meets the goal is better than any that does not."""
        if self.limit is not None:
            return (float(self.met(genome, sqnr)), sqnr if self.legal(genome) else -self.cost(genome))
        met = self.met(genome, sqnr)
        return (float(met), float(self.legal(genome)), -self.cost(genome) if met else sqnr)


def goal_of(space: Space, request: SearchRequest) -> Goal:
    """The request in terms of genomes."""
    by_size = request.max_latency is None
    cost = (lambda genome: space.bytes_of(genome) / MEGABYTE) if by_size else space.milliseconds_of
    return Goal(cost=cost, limit=request.limit, sqnr=request.target_sqnr, quantizes=space.quantizes)


def require_possible(space: Space, goal: Goal, request: SearchRequest) -> None:
    """Ask that the cheapest mix is within the limit.

    Raises:
        RecipeError: it is not; the message says what it costs.
    """
    costs = np.where(space.allowed, space.size if space.time is None else space.time, np.inf)
    least = goal.cost(tuple(np.argmin(costs, axis=1).tolist()))
    if goal.limit is not None and least > goal.limit:
        raise RecipeError(f"{request.option}: the cheapest of all mixes takes {least:.4g} {request.unit}; raise the limit")


def require_timing(backend: Backend | None, recipe: Recipe) -> None:
    """Ask for what timing kernels needs, before anything is loaded."""
    if backend is None:
        raise RecipeError(f"--max-latency times kernels, and --format {recipe.format} builds none; choose another --format")
    if not backend.runs:
        raise RecipeError(
            f"--max-latency times kernels, and those of --format {recipe.format} run on an NVIDIA GPU with its library only; "
            "search on such a machine, or give --max-size"
        )
    backend.require()
