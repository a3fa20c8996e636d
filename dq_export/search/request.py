"""The request of a search."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dq_export.core.recipe import RecipeError
from dq_export.core.violations import nearest

from .strategies import SEARCHES

HIGHEST_SQNR = 200.0
"""The SQNR, in dB, of a trajectory without error, as `trajectories` caps it."""
LIMITS = {"evaluations": 100_000, "pictures": 1_000, "steps": 1_000}
"""The greatest value of each integer; a picture's float trajectory is kept in memory."""


class SearchError(Exception):
    """No mix that a search tried meets the request."""


@dataclass(frozen=True, kw_only=True)
class SearchRequest:
    """A goal, exactly one of which is not None, and the effort of the search.

    Args:
        target_sqnr: the least SQNR of the sampled trajectory in dB, at the least size.
        max_size: megabytes of weights, for the best trajectory.
        max_latency: milliseconds of one network call of batch 2, by a table of kernels that is timed here.
        evaluations: different mixes to try.
        strategy: one of SEARCHES.
        pictures, steps: of the trajectories that judge a mix.
    """

    target_sqnr: float | None = None
    max_size: float | None = None
    max_latency: float | None = None
    evaluations: int = 300
    strategy: str = "descend"
    pictures: int = 4
    steps: int = 12

    @property
    def limit(self) -> float | None:
        """The greatest cost, megabytes or milliseconds; None for a target."""
        return self.max_latency if self.max_size is None else self.max_size

    @property
    def unit(self) -> str:
        """Of a cost."""
        return "MB" if self.max_latency is None else "ms"

    @property
    def option(self) -> str:
        """The goal in the form of the command line."""
        return next(f"{flag} {value:g}" for flag, value in self._goals().items() if value is not None)

    def require_valid(self) -> None:
        """Check everything that depends only on the request.

        Raises:
            RecipeError: all faults, one line each.
        """
        wrong = []
        goals = {flag: value for flag, value in self._goals().items() if value is not None}
        if len(goals) != 1:
            wrong.append("give one goal: --target-sqnr DB, --max-size MB or --max-latency MS")
        for flag, value in goals.items():
            greatest = HIGHEST_SQNR if flag == "--target-sqnr" else math.inf
            if not (0 < value <= greatest and math.isfinite(value)):
                bound = f" up to {greatest:g}" if math.isfinite(greatest) else ""
                wrong.append(f"{flag} {value:g}: expected a number above 0{bound}")
        for name, greatest in LIMITS.items():
            if not 1 <= getattr(self, name) <= greatest:
                wrong.append(f"--{name} {getattr(self, name)}: expected 1 to {greatest}")
        if self.strategy not in SEARCHES:
            hint = nearest(self.strategy, list(SEARCHES))
            wrong.append(f"--strategy '{self.strategy}': expected {' or '.join(SEARCHES)}.{hint}")
        if wrong:
            raise RecipeError("\n".join(wrong))

    def _goals(self) -> dict[str, float | None]:
        return {"--target-sqnr": self.target_sqnr, "--max-size": self.max_size, "--max-latency": self.max_latency}
