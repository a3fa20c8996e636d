"""Scale tables built from the scales of single timesteps."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dq_export.calibration.bins import TOLERANCE, build_table, partition

STEPS = st.dictionaries(st.integers(0, 999), st.floats(2**-6, 64, width=32), min_size=1, max_size=12)
BINS = st.sampled_from(["auto", "per-step", 1, 2, 3, 20])


def table_of(steps: dict[int, float], bins: Any) -> Any:
    return build_table(np.asarray(list(steps), dtype=np.float64), np.asarray(list(steps.values()), dtype=np.float32), bins)


@given(STEPS, BINS)
def test_merging_clips_no_timestep_and_is_no_wider_than_its_bin(steps: dict[int, float], bins: Any) -> None:
    table = table_of(steps, bins)
    bin_of = {timestep: int(table.bins.index(timestep)) for timestep in steps}
    for timestep in steps:
        together = [np.float32(scale) for other, scale in steps.items() if bin_of[other] == bin_of[timestep]]
        assert table.at(timestep) == max(together)  # the same float32 value, not a computed one
    assert set(bin_of.values()) == set(range(len(table.bins))), "a bin without a calibrated timestep"


@given(STEPS)
def test_per_step_gives_every_timestep_its_own_scale(steps: dict[int, float]) -> None:
    table = table_of(steps, "per-step")
    assert len(table.bins) == len(steps)
    assert all(table.at(timestep) == np.float32(scale) for timestep, scale in steps.items())


@given(STEPS)
def test_auto_adds_at_most_its_tolerance_of_noise(steps: dict[int, float]) -> None:
    table = table_of(steps, "auto")
    added = [(table.at(timestep) / np.float32(scale)) ** 2 - 1 for timestep, scale in steps.items()]
    assert np.mean(added) <= TOLERANCE + 1e-5  # float32 scales, float64 sums of at most 12 terms


def test_a_timestep_with_next_to_no_input_does_not_hide_the_noise_of_the_others() -> None:
    assert partition(np.asarray([1e-10, 1, 3, 1, 3, 1], dtype=np.float32), "auto") == [0, 1, 2, 3, 4, 5]  # 3 is no 5 % of 1


@given(STEPS, BINS, st.randoms(use_true_random=False))
def test_the_order_of_the_timesteps_does_not_matter(steps: dict[int, float], bins: Any, random: Any) -> None:
    items = list(steps.items())
    random.shuffle(items)
    assert table_of(dict(items), bins) == table_of(steps, bins)


@given(st.integers(1, 12), st.floats(2**-6, 64, width=32))
def test_auto_keeps_one_bin_where_nothing_changes(steps: int, scale: float) -> None:
    assert partition(np.full(steps, scale, dtype=np.float32), "auto") == [0]


@given(STEPS, st.integers(1, 12))
def test_one_more_bin_never_costs_more(steps: dict[int, float], bins: int) -> None:
    def added(count: int) -> float:
        table = table_of(steps, count)
        return sum((table.at(timestep) / np.float32(scale)) ** 2 - 1 for timestep, scale in steps.items())

    assert added(bins + 1) <= added(bins) * (1 + 1e-6) + 1e-6  # float64 sums in another order
