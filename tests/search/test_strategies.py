"""The strategies of the search, on a small problem whose best mix is known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dq_export.core.scheme import scheme_of
from dq_export.search.space import Genome, Space
from dq_export.search.strategies import SEARCHES, Goal, Search, evaluations_of

SITES, CHOICES = 6, 4


RANDOM = np.random.default_rng(3)


NOISE = 10 ** RANDOM.uniform(-6, -2, (SITES, CHOICES)) * np.asarray([1e-3, 0.1, 1, 3])


SIZE = np.asarray([4.0, 2.0, 1.0, 0.5]) * RANDOM.uniform(0.5, 2, (SITES, 1))


def problem() -> Space:
    names = tuple(f"s{i}" for i in range(SITES))
    schemes = tuple(scheme_of("w4a8", "token", 16 * (1 + i)) for i in range(CHOICES))
    allowed = np.ones((SITES, CHOICES), dtype=bool)
    return Space(sites=names, linears={name: (name,) for name in names}, choices=schemes, allowed=allowed, size=SIZE)


def truth(genome: Genome) -> float:
    """Noise that adds up, except for a pair of sites that make each other worse."""
    chosen = list(genome)
    noise = NOISE[np.arange(SITES), chosen].sum() + 5 * NOISE[0, chosen[0]] * (chosen[1] > 1)
    return float(-10 * np.log10(noise))


@pytest.mark.parametrize("strategy", list(SEARCHES))
def test_a_search_keeps_its_bound_and_its_budget_and_repeats(strategy: str) -> None:
    space = problem()
    goal = Goal(cost=space.bytes_of, limit=0.4 * SIZE[:, 0].sum())
    actual = []
    for _ in range(2):
        counted: list[Genome] = []

        def evaluate(genome: Genome, counted: list[Genome] = counted) -> float:
            counted.append(genome)
            return truth(genome)

        search = Search(space, goal, evaluate, 120, lambda done, total, best: None)
        SEARCHES[strategy](search, np.random.default_rng(0))
        best = search.best()
        assert best is not None
        assert goal.legal(best)
        assert len(counted) == len(set(counted)) <= 120
        actual.append(best)
        front = search.front()
        assert [point[0] for point in front] == sorted(point[0] for point in front)
        assert [point[1] for point in front] == sorted(point[1] for point in front)
    assert actual[0] == actual[1]


@pytest.mark.parametrize("strategy", list(SEARCHES))
def test_a_bound_that_only_the_cheapest_mixes_meet_is_met(strategy: str) -> None:
    space = problem()
    goal = Goal(cost=space.bytes_of, limit=SIZE.min(axis=1).sum() * 1.05)
    search = Search(space, goal, truth, 40, lambda done, total, best: None)
    SEARCHES[strategy](search, np.random.default_rng(0))
    best = search.best()
    assert best is not None
    assert goal.legal(best)


@pytest.mark.parametrize("strategy", list(SEARCHES))
@pytest.mark.parametrize("evaluations", [1, 3, 8, 12, 22])
def test_however_few_evaluations_the_winner_is_within_the_limit_and_beaten_by_no_uniform_choice(
    strategy: str, evaluations: int
) -> None:
    space = problem()
    assert evaluations <= evaluations_of(space) == CHOICES + 2 + SITES * (CHOICES - 1)
    goal = Goal(cost=space.bytes_of, limit=0.4 * SIZE[:, 0].sum())
    search = Search(space, goal, truth, evaluations, lambda done, total, best: None)
    SEARCHES[strategy](search, np.random.default_rng(0))
    best = search.best()
    assert best is not None
    assert goal.legal(best)
    uniform = [(truth(g), space.bytes_of(g)) for scheme in space.choices if goal.legal(g := space.everywhere(scheme))]
    assert len(uniform) == 2
    if evaluations >= len(uniform):
        assert truth(best) >= max(uniform)[0]
        assert not any(sqnr > truth(best) and size < space.bytes_of(best) for sqnr, size in uniform)
    if strategy == "descend" and evaluations >= 12:
        assert truth(best) > max(uniform)[0], "the rest of the evaluations is used, too"


def test_the_network_without_anything_quantized_is_no_winner() -> None:
    space = problem()
    for goal in (
        Goal(cost=space.bytes_of, limit=1e9, quantizes=lambda genome: any(genome)),
        Goal(cost=space.bytes_of, sqnr=200.0, quantizes=lambda genome: any(genome)),
    ):
        search = Search(space, goal, lambda genome: truth(genome) if any(genome) else 200.0, 60, lambda done, total, best: None)
        SEARCHES["descend"](search, np.random.default_rng(0))
        best = search.best()
        assert best is not None
        assert any(best)
        assert goal.met(best, search.sqnrs[best]) == (goal.limit is not None)


def test_descend_finds_the_best_of_all_with_a_fraction_of_them() -> None:
    space = problem()
    goal = Goal(cost=space.bytes_of, limit=0.4 * SIZE[:, 0].sum())
    legal = [g for g in itertools.product(range(CHOICES), repeat=SITES) if goal.legal(g)]
    exact = max(map(truth, legal))
    search = Search(space, goal, truth, 100, lambda done, total, best: None)
    SEARCHES["descend"](search, np.random.default_rng(0))
    best = search.best()
    assert best is not None
    assert truth(best) == pytest.approx(exact)
    assert len(legal) > 500


def test_a_target_is_reached_at_the_least_cost() -> None:
    space = problem()
    target = 25.0
    goal = Goal(cost=space.bytes_of, sqnr=target)
    enough = [g for g in itertools.product(range(CHOICES), repeat=SITES) if truth(g) >= target]
    search = Search(space, goal, truth, 150, lambda done, total, best: None)
    SEARCHES["descend"](search, np.random.default_rng(0))
    best = search.best()
    assert best is not None
    assert truth(best) >= target
    assert space.bytes_of(best) <= min(map(space.bytes_of, enough)) * 1.02
