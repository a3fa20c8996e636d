"""Choices of one value for each of many parameters, so that all pairs of values occur in runs that went through."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

Choice = dict[str, Any]
Pair = tuple[tuple[str, int], tuple[str, int]]
CANDIDATES = 300
"""Random choices of which the next run is the one with the most pairs that no run had."""
TRIES = 6
"""Runs with a pair that may be refused until the pair is taken for one that cannot go through."""


class Pairs:
    """Which pairs of values are still to be tried.

    A refused run covers nothing: the pair that it was made for may not be what was refused.

    Args:
        space: by parameter, its values. The first is the plain one and is taken half of the time.
        fits: whether a choice has no known contradiction; of the others, one run in five is made of any choice.
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
        """For each parameter the index of its value: the best of some random candidates."""
        candidates = [self._random() for _ in range(CANDIDATES)]
        if self.rng.random() < 0.8:
            candidates = [indices for indices in candidates if self.fits(self.values(indices))] or candidates
        best = max(candidates, key=lambda indices: len(self.open.intersection(_pairs(indices))))
        self.tries.update(self.open.intersection(_pairs(best)))
        return best

    def passed(self, indices: Mapping[str, int]) -> None:
        """A run went through: its pairs are covered."""
        self.open.difference_update(_pairs(indices))

    def refused(self, indices: Mapping[str, int]) -> None:
        """A run was refused: pairs that were tried often enough are given up."""
        self.open -= {pair for pair in _pairs(indices) if self.tries[pair] >= TRIES}

    def values(self, indices: Mapping[str, int]) -> Choice:
        """The values at indices."""
        return {name: self.space[name][index] for name, index in indices.items()}

    def _random(self) -> dict[str, int]:
        return {name: 0 if self.rng.random() < 0.5 else self.rng.randrange(len(values)) for name, values in self.space.items()}


def _pairs(indices: Mapping[str, int]) -> set[Pair]:
    return set(combinations(indices.items(), 2))
