"""Searching a recipe: how each input is quantized, so that the sampled pictures stay near and the network small or fast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .space import Genome, Space

POPULATION, PARENTS, MUTATION, TRIES = 50, 10, 0.1, 10
"""Of Q-DiT's evolution.sh: candidates an epoch, of which the best so many breed, and the share of genes that mutate."""
MULTIPLIERS = 24
"""Points at which the additive model's front is looked at."""


@dataclass(frozen=True, kw_only=True)
class Goal:
    """Either the best pictures at a cost, or the least cost of good enough pictures.

    Args:
        cost: of a genome: bytes or milliseconds.
        most: what it may be, or None.
        sqnr: what the trajectory must have, dB, or None.
    """

    cost: Callable[[Genome], float]
    most: float | None = None
    sqnr: float | None = None

    def legal(self, genome: Genome) -> bool:
        """Whether the cost is within bounds."""
        return self.most is None or self.cost(genome) <= self.most

    def rank(self, genome: Genome, sqnr: float) -> tuple[float, ...]:
        """Greater is better; a legal one is better than any that is not."""
        if self.most is not None:
            return (float(self.legal(genome)), sqnr if self.legal(genome) else -self.cost(genome))
        assert self.sqnr is not None
        reached = sqnr >= self.sqnr
        return (float(reached), -self.cost(genome) if reached else sqnr)


class Search:
    """The state of a search: what was evaluated, how often, and the best.

    Args:
        evaluate: dB of a genome's trajectory; repeats are free.
        evaluations: how many different genomes may be evaluated.
        progress: called with (evaluations, in all, the best so far).
    """

    def __init__(
        self,
        space: Space,
        goal: Goal,
        evaluate: Callable[[Genome], float],
        evaluations: int,
        progress: Callable[[int, int, Genome | None], None],
    ) -> None:
        self.space, self.goal, self._evaluate, self.left, self._progress = space, goal, evaluate, evaluations, progress
        self.total = evaluations
        self.found: dict[Genome, float] = {}

    def evaluate(self, genome: Genome) -> float:
        """dB; a new genome uses up one evaluation."""
        if genome not in self.found:
            self.left -= 1
            self.found[genome] = self._evaluate(genome)
            self._progress(len(self.found), self.total, self.best())
        return self.found[genome]

    def best(self) -> Genome | None:
        """The best so far."""
        return max(self.found, key=lambda genome: self.goal.rank(genome, self.found[genome]), default=None)

    def front(self) -> list[tuple[float, float, Genome]]:
        """(cost, dB, genome) of everything that nothing beats in both, by rising cost."""
        points = sorted((self.goal.cost(genome), -sqnr, genome) for genome, sqnr in self.found.items())
        kept: list[tuple[float, float, Genome]] = []
        for cost, negative, genome in points:
            if not kept or -negative > kept[-1][1]:
                kept.append((cost, -negative, genome))
        return kept


def evolve(search: Search, random: np.random.Generator) -> None:
    """Q-DiT's evolutionary search, until the evaluations are used up.

    Population 50, the first generation random but for presets: one choice everywhere, and the cheapest of all. Each later one
    is bred from the ten best ever seen: 25 by crossover (each gene from either of two parents), 25 by mutation (each gene
    drawn anew with probability 0.1), random ones fill it up. Only legal genomes that were never seen are evaluated.

    Source: Q-DiT (arXiv 2406.17343) algorithm 1, with the numbers of its published evolution.sh. There the fitness is the FID
    of 800 drawn images and the constraint a mean group size of 128; here the trajectory's error and the goal's cost.
    """
    seen: set[Genome] = set()

    def fresh(genome: Genome) -> bool:
        return genome not in seen and search.goal.legal(genome)

    def drawn() -> Genome:
        return tuple(int(random.choice(np.flatnonzero(row))) for row in search.space.allowed)

    def bred(make: Callable[[], Genome], count: int) -> list[Genome]:
        made: list[Genome] = []
        for _ in range(TRIES * count):
            genome = make()
            if len(made) < count and fresh(genome):
                seen.add(genome)
                made.append(genome)
        return made

    costs = _costs(search)
    presets = [*_alike(search), tuple(np.argmin(costs, axis=1).tolist())]
    population = [genome for genome in dict.fromkeys(presets) if fresh(genome)]
    seen.update(population)
    population += bred(drawn, POPULATION - len(population))
    while search.left > 0 and population:
        for genome in population[: search.left]:
            search.evaluate(genome)
        ranked = sorted(search.found, key=lambda genome: search.goal.rank(genome, search.found[genome]), reverse=True)
        parents = ranked[:PARENTS]
        population = bred(lambda parents=parents: _mutated(_pick(parents, random), search.space, random), POPULATION // 2)  # type: ignore[misc]
        population += bred(lambda parents=parents: _crossed(parents, random), POPULATION // 2)  # type: ignore[misc]
        population += bred(drawn, POPULATION - len(population))


def descend(search: Search, random: np.random.Generator) -> None:
    """Measure each choice of each site alone, take the errors as additive, and refine by measured exchanges.

    The noise powers of single choices, every other site at its most accurate, add up to a first model of any genome's. One
    choice everywhere and the model's front at MULTIPLIERS prices are evaluated; then, until the evaluations are used up, the
    exchanges of one or two sites that the model likes best at the best genome so far, from whose measured noise it counts.
    """
    space = search.space
    base = tuple(int(np.flatnonzero(row)[0]) for row in space.allowed)
    least = _noise(search.evaluate(base))
    noise = np.full(space.allowed.shape, np.inf)
    for site, row in enumerate(space.allowed):
        for choice in np.flatnonzero(row):
            if search.left <= 0:
                break
            genome = (*base[:site], int(choice), *base[site + 1 :])
            noise[site, choice] = max(_noise(search.evaluate(genome)) - least, 0.0)
    for genome in (*_alike(search), *_priced(search, noise)):
        if search.left > 0:
            search.evaluate(genome)
    while search.left > 0:
        best = search.best()
        assert best is not None
        candidate = _exchange(search, noise, best, random)
        if candidate is None:
            return
        search.evaluate(candidate)


SEARCHES: dict[str, Callable[[Search, np.random.Generator], None]] = {"descend": descend, "evolve": evolve}
"""By name."""


def _alike(search: Search) -> list[Genome]:
    """One choice everywhere, where that is legal."""
    return [genome for rule in search.space.choices if search.goal.legal(genome := search.space.everywhere(rule))]


def _noise(sqnr: float) -> float:
    return float(10 ** (-sqnr / 10))


def _priced(search: Search, noise: np.ndarray[tuple[int, int], np.dtype[np.float64]]) -> list[Genome]:
    """Genomes of the additive model's front: at each price the choice of least noise + price * cost at every site."""
    costs = _costs(search)
    finite = noise[np.isfinite(noise)]
    spread = np.ptp(costs[np.isfinite(costs)]) or 1.0
    prices = np.geomspace(max(finite[finite > 0].min(initial=1e-12), 1e-12), finite.max(initial=1.0) + 1e-12, 400) / spread
    genomes = list(dict.fromkeys(tuple(np.argmin(noise + price * costs, axis=1).tolist()) for price in prices))
    bound = search.goal.most
    if bound is not None:  # the legal ones nearest to the bound, best first
        genomes = sorted((g for g in genomes if search.goal.legal(g)), key=search.goal.cost, reverse=True)
        return genomes[: MULTIPLIERS // 4]
    chosen = np.linspace(0, len(genomes) - 1, min(MULTIPLIERS, len(genomes))).round().astype(int)
    return [genomes[i] for i in chosen]


def _exchange(
    search: Search, noise: np.ndarray[tuple[int, int], np.dtype[np.float64]], best: Genome, random: np.random.Generator
) -> Genome | None:
    """The unseen neighbour of the best genome, one or two sites away, that the model ranks highest.

    The model's noise of each single change is blurred by a random factor, so that its own errors do not hide good ones.
    """
    blurred = noise * random.lognormal(0.0, 0.3, noise.shape)
    total = _noise(search.found[best])
    sites, choices = np.nonzero(np.isfinite(noise))
    gains = blurred[sites, choices] - blurred[sites, np.asarray(best)[sites]]
    single = [(i, j, gain) for i, j, gain in zip(sites.tolist(), choices.tolist(), gains.tolist(), strict=True) if best[i] != j]
    candidates: list[tuple[tuple[float, ...], Genome]] = []

    def consider(changes: Sequence[tuple[int, int, float]]) -> None:
        genome = list(best)
        for site, choice, _ in changes:
            genome[site] = choice
        made = tuple(genome)
        if made in search.found:
            return
        foretold = max(total + sum(gain for _, _, gain in changes), 1e-20)
        candidates.append((search.goal.rank(made, -10 * float(np.log10(foretold))), made))

    for change in single:
        consider([change])
    for number, first in enumerate(single):
        for second in single[number + 1 :]:
            if first[0] != second[0]:
                consider([first, second])
    return max(candidates)[1] if candidates else None


def _costs(search: Search) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Each choice's own cost, from changing it alone."""
    space = search.space
    base = tuple(int(np.flatnonzero(row)[0]) for row in space.allowed)
    start, costs = search.goal.cost(base), np.full(space.allowed.shape, np.inf)
    for site, row in enumerate(space.allowed):
        for choice in np.flatnonzero(row):
            costs[site, choice] = search.goal.cost((*base[:site], int(choice), *base[site + 1 :])) - start
    relative: np.ndarray[tuple[int, int], np.dtype[np.float64]] = costs - costs[np.isfinite(costs)].min()
    return relative


def _pick(parents: Sequence[Genome], random: np.random.Generator) -> Genome:
    return parents[int(random.integers(len(parents)))]


def _mutated(genome: Genome, space: Space, random: np.random.Generator) -> Genome:
    return tuple(
        int(random.choice(np.flatnonzero(row))) if random.random() < MUTATION else gene
        for gene, row in zip(genome, space.allowed, strict=True)
    )


def _crossed(parents: Sequence[Genome], random: np.random.Generator) -> Genome:
    first, second = _pick(parents, random), _pick(parents, random)
    return tuple(a if random.random() < 0.5 else b for a, b in zip(first, second, strict=True))
