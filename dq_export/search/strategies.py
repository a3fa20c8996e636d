"""Search strategies: choose how each input is quantized, for pictures close to the float model and a small or fast network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .space import Genome, Space

POPULATION, PARENTS, MUTATION, TRIES = 50, 10, 0.1, 10
"""The numbers of Q-DiT's evolution.sh: candidates per epoch, how many of the best breed, and the share of genes that mutate."""
Noise = npt.NDArray[np.float64]
MULTIPLIERS = 24
"""Prices at which the additive model's front is evaluated."""


@dataclass(frozen=True, kw_only=True)
class Goal:
    """Either the best pictures within a cost, or the least cost of good enough pictures.

    Args:
        cost: of a genome: megabytes or milliseconds.
        limit: the greatest cost that a genome may have, or None.
        sqnr: dB that the trajectory must have, or None.
        quantizes: whether a genome quantizes anything: the float network is never a valid result.
    """

    cost: Callable[[Genome], float]
    limit: float | None = None
    sqnr: float | None = None
    quantizes: Callable[[Genome], bool] = lambda genome: True

    def legal(self, genome: Genome) -> bool:
        """Whether the cost is within the limit, and anything is quantized."""
        return self.quantizes(genome) and (self.limit is None or self.cost(genome) <= self.limit)

    def met(self, genome: Genome, sqnr: float) -> bool:
        """Whether a genome with this SQNR meets the goal."""
        return self.legal(genome) and (self.sqnr is None or sqnr >= self.sqnr)

    def rank(self, genome: Genome, sqnr: float) -> tuple[float, ...]:
        """A key to compare genomes: greater is better, and a genome that meets the goal is better than one that does not."""
        if self.limit is not None:
            return (float(self.met(genome, sqnr)), sqnr if self.legal(genome) else -self.cost(genome))
        met = self.met(genome, sqnr)
        return (float(met), float(self.legal(genome)), -self.cost(genome) if met else sqnr)


class Search:
    """The state of a search: the evaluated genomes, their number, and the best.

    Args:
        evaluate: the SQNR of a genome's trajectory in dB; repeats are free.
        evaluations: the number of different genomes that may be evaluated.
        progress: called with (evaluations, all evaluations, the best so far).
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
        self.sqnrs: dict[Genome, float] = {}

    def evaluate(self, genome: Genome) -> float:
        """The SQNR in dB; a new genome uses up one evaluation."""
        if genome not in self.sqnrs:
            self.left -= 1
            self.sqnrs[genome] = self._evaluate(genome)
            self._progress(len(self.sqnrs), self.total, self.best())
        return self.sqnrs[genome]

    def best(self) -> Genome | None:
        """The best so far."""
        return max(self.sqnrs, key=lambda genome: self.goal.rank(genome, self.sqnrs[genome]), default=None)

    def front(self) -> list[tuple[float, float, Genome]]:
        """(cost, dB, genome) of every genome that no other beats in both, by increasing cost."""
        points = sorted((self.goal.cost(genome), -sqnr, genome) for genome, sqnr in self.sqnrs.items())
        front: list[tuple[float, float, Genome]] = []
        for cost, negative, genome in points:
            if not front or -negative > front[-1][1]:
                front.append((cost, -negative, genome))
        return front


def evolve(search: Search, random: np.random.Generator) -> None:
    """Q-DiT's evolutionary search, until the evaluations are used up.

    The population is 50. The first generation is random, except for presets: one choice everywhere, and the cheapest genome.
    Each later generation is bred from the ten best genomes so far: 25 by crossover (each gene from either of two parents), 25
    by mutation (each gene redrawn with probability 0.1), and random ones fill it up. Only new legal genomes are evaluated.

    Source: Q-DiT (arXiv 2406.17343) algorithm 1, with the numbers of its published evolution.sh. There the fitness is the FID
    of 800 drawn images and the constraint a mean group size of 128; here the trajectory's error and the goal's cost.
    """
    visited: set[Genome] = set()

    def fresh(genome: Genome) -> bool:
        return genome not in visited and search.goal.legal(genome)

    def draw() -> Genome:
        return tuple(int(random.choice(np.flatnonzero(row))) for row in search.space.allowed)

    def breed(make: Callable[[], Genome], count: int) -> list[Genome]:
        children: list[Genome] = []
        for _ in range(TRIES * count):
            genome = make()
            if len(children) < count and fresh(genome):
                visited.add(genome)
                children.append(genome)
        return children

    costs = _costs(search)
    presets = [*map(search.space.everywhere, search.space.choices), tuple(np.argmin(costs, axis=1).tolist())]
    population = [genome for genome in dict.fromkeys(presets) if fresh(genome)]
    visited.update(population)
    population += breed(draw, POPULATION - len(population))
    while search.left > 0 and population:
        for genome in population[: search.left]:
            search.evaluate(genome)
        ranking = sorted(search.sqnrs, key=lambda genome: search.goal.rank(genome, search.sqnrs[genome]), reverse=True)
        parents = ranking[:PARENTS]
        population = breed(lambda parents=parents: _mutated(_pick(parents, random), search.space, random), POPULATION // 2)  # type: ignore[misc]
        population += breed(lambda parents=parents: _crossed(parents, random), POPULATION // 2)  # type: ignore[misc]
        population += breed(draw, POPULATION - len(population))


def descend(search: Search, random: np.random.Generator) -> None:
    """Evaluate one choice everywhere, measure each choice of each site alone, and refine by measured exchanges.

    The noise powers of single choices, with every other site at its most accurate, add up to a first model of the noise of
    any genome. The model's front at MULTIPLIERS prices is evaluated. Then, until the evaluations are used up, the search
    evaluates the exchanges of one or two sites that the model ranks highest at the best genome so far, starting from its
    measured noise.

    If there are fewer evaluations than `evaluations_of` the space, no site is measured alone: each site is assumed to cause
    an equal share of the noise of one choice everywhere, and every exchange corrects this.
    """
    noise = _shared_noise(search)
    measured = search.left >= _single_evaluations(search.space)
    if measured:
        _measure_singles(search, noise)
        for genome in _priced(search, noise):
            if search.left > 0:
                search.evaluate(genome)
    while search.left > 0:
        best = search.best()
        assert best is not None
        candidate = _exchange(search, noise, best, random)
        if candidate is None:
            return
        search.evaluate(candidate)
        if not measured:
            _learn(search, noise, best, candidate)


def _learn(search: Search, noise: Noise, best: Genome, candidate: Genome) -> None:
    """Distribute the model's error for an evaluated exchange among the sites that changed."""
    changed = [site for site, (old, new) in enumerate(zip(best, candidate, strict=True)) if old != new]
    expected = sum(noise[site, candidate[site]] - noise[site, best[site]] for site in changed)
    surplus = _noise(search.sqnrs[candidate]) - _noise(search.sqnrs[best]) - expected
    for site in changed:
        noise[site, candidate[site]] = max(noise[site, candidate[site]] + surplus / len(changed), 0.0)


def evaluations_of(space: Space) -> int:
    """The number of evaluations with which `descend` measures every choice of every site before it mixes them."""
    return len(space.choices) + 1 + _single_evaluations(space)


def _single_evaluations(space: Space) -> int:
    """The most accurate choice everywhere, and each other choice at one site."""
    return 1 + int(space.allowed.sum()) - len(space.sites)


def _shared_noise(search: Search) -> Noise:
    """Noise power by site and choice: an equal share of the noise of one choice everywhere. Evaluates these, legal ones first.

    If none of them is legal, the cheapest mix is evaluated first, so that there is always a genome within the limit.
    """
    space = search.space
    noise = np.where(space.allowed, 1.0, np.inf)
    if not any(map(search.goal.legal, map(space.everywhere, space.choices))):
        search.evaluate(tuple(np.argmin(_costs(search), axis=1).tolist()))
    for choice in sorted(range(len(space.choices)), key=lambda choice: not search.goal.legal(_everywhere(space, choice))):
        if search.left > 0:
            share = _noise(search.evaluate(_everywhere(space, choice))) / len(space.sites)
            noise[:, choice] = np.where(space.allowed[:, choice], share, np.inf)
    return noise


def _everywhere(space: Space, choice: int) -> Genome:
    return space.everywhere(space.choices[choice])


def _measure_singles(search: Search, noise: Noise) -> None:
    """Fill `noise` with the noise of each choice alone, with every other site at its most accurate."""
    space = search.space
    base = tuple(int(np.flatnonzero(row)[0]) for row in space.allowed)
    base_noise = _noise(search.evaluate(base))
    for site, row in enumerate(space.allowed):
        for choice in np.flatnonzero(row):
            genome = (*base[:site], int(choice), *base[site + 1 :])
            noise[site, choice] = max(_noise(search.evaluate(genome)) - base_noise, 0.0)


SEARCHES: dict[str, Callable[[Search, np.random.Generator], None]] = {"descend": descend, "evolve": evolve}
"""By name."""


def _noise(sqnr: float) -> float:
    return float(10 ** (-sqnr / 10))


def _priced(search: Search, noise: Noise) -> list[Genome]:
    """Genomes of the additive model's front: at each price the choice of least noise + price * cost at every site."""
    costs = _costs(search)
    finite = noise[np.isfinite(noise)]
    spread = np.ptp(costs[np.isfinite(costs)]) or 1.0
    prices = np.geomspace(max(finite[finite > 0].min(initial=1e-12), 1e-12), finite.max(initial=1.0) + 1e-12, 400) / spread
    genomes = list(dict.fromkeys(tuple(np.argmin(noise + price * costs, axis=1).tolist()) for price in prices))
    if search.goal.limit is not None:  # the legal ones nearest to the limit, best first
        genomes = sorted((g for g in genomes if search.goal.legal(g)), key=search.goal.cost, reverse=True)
        return genomes[: MULTIPLIERS // 4]
    places = np.linspace(0, len(genomes) - 1, min(MULTIPLIERS, len(genomes))).round().astype(int)
    return [genomes[i] for i in places]


def _exchange(search: Search, noise: Noise, best: Genome, random: np.random.Generator) -> Genome | None:
    """The unseen neighbour of the best genome, one or two sites away, that the model ranks highest.

    The model's noise of each single change is blurred by a random factor, so that its own errors do not hide good ones.
    """
    blurred = noise * random.lognormal(0.0, 0.3, noise.shape)
    total = _noise(search.sqnrs[best])
    sites, choices = np.nonzero(np.isfinite(noise))
    gains = blurred[sites, choices] - blurred[sites, np.asarray(best)[sites]]
    single = [(i, j, gain) for i, j, gain in zip(sites.tolist(), choices.tolist(), gains.tolist(), strict=True) if best[i] != j]
    candidates: list[tuple[tuple[float, ...], Genome]] = []

    def consider(changes: Sequence[tuple[int, int, float]]) -> None:
        genome = list(best)
        for site, choice, _ in changes:
            genome[site] = choice
        mixed = tuple(genome)
        if mixed in search.sqnrs or not search.goal.legal(mixed):
            return
        expected = max(total + sum(gain for _, _, gain in changes), 1e-20)
        candidates.append((search.goal.rank(mixed, -10 * float(np.log10(expected))), mixed))

    for change in single:
        consider([change])
    for number, first in enumerate(single):
        for second in single[number + 1 :]:
            if first[0] != second[0]:
                consider([first, second])
    return max(candidates)[1] if candidates else None


def _costs(search: Search) -> Noise:
    """Each choice's own cost, from changing it alone."""
    space = search.space
    base = tuple(int(np.flatnonzero(row)[0]) for row in space.allowed)
    start, costs = search.goal.cost(base), np.full(space.allowed.shape, np.inf)
    for site, row in enumerate(space.allowed):
        for choice in np.flatnonzero(row):
            costs[site, choice] = search.goal.cost((*base[:site], int(choice), *base[site + 1 :])) - start
    relative: Noise = costs - costs[np.isfinite(costs)].min()
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
