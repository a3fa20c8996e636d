"""Chooses a value for each of many parameters, so that all pairs of values occur in successful runs."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

Choice = dict[str, Any]
Pair = tuple[tuple[str, int], tuple[str, int]]
CANDIDATES = 300
"""Number of random choices; the next run is the one with the most uncovered pairs."""
TRIES = 6
"""Number of refused runs with a pair, after which the pair counts as impossible."""


class Pairs:
    """The pairs of values that no successful run has covered.

    A refused run covers no pair, because another pair may be the reason for its refusal.

    Args:
        space: values of each parameter. The first value is the plain one, and is chosen half of the time.
        fits: whether a choice has no known contradiction. One run in five may also have another choice.
    """

    def __init__(
        self, space: Mapping[str, Sequence[Any]], seed: int, fits: Callable[[Choice], bool] = lambda choice: True
    ) -> None:
        self.space = space
        self.fits = fits
        self.rng = random.Random(f"pairs/{seed}")
        self.open: set[Pair] = {
            ((first, i), (second, j))
            for first, second in combinations(space, 2)
            for i, j in product(range(len(space[first])), range(len(space[second])))
        }
        self.total = len(self.open)
        self.tries: Counter[Pair] = Counter()

    def next(self) -> dict[str, int]:
        """Return the best of some random candidates: the index of a value for each parameter."""
        candidates = [self._random() for _ in range(CANDIDATES)]
        if self.rng.random() < 0.8:
            candidates = [indices for indices in candidates if self.fits(self.values(indices))] or candidates
        best = max(candidates, key=lambda indices: len(self.open.intersection(_pairs(indices))))
        self.tries.update(self.open.intersection(_pairs(best)))
        return best

    def passed(self, indices: Mapping[str, int]) -> None:
        """Record a successful run, which covers its pairs."""
        self.open.difference_update(_pairs(indices))

    def refused(self, indices: Mapping[str, int]) -> None:
        """Record a refused run. Pairs that were tried TRIES times are given up."""
        self.open -= {pair for pair in _pairs(indices) if self.tries[pair] >= TRIES}

    def values(self, indices: Mapping[str, int]) -> Choice:
        """Return the values at indices."""
        return {name: self.space[name][index] for name, index in indices.items()}

    def _random(self) -> dict[str, int]:
        return {name: 0 if self.rng.random() < 0.5 else self.rng.randrange(len(values)) for name, values in self.space.items()}


def _pairs(indices: Mapping[str, int]) -> set[Pair]:
    return set(combinations(indices.items(), 2))
