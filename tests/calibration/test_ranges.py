"""Scale methods against the raw samples that the histograms were made of."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dq_export.calibration.ranges import METHODS, minmax, mse, percentile
from dq_export.core.grid import cover
from dq_export.core.recipe import Recipe
from dq_export.core.scheme import PRESETS, scheme_of

CELLS = 2048
VALUES = arrays(np.float32, st.integers(1, 60), elements=st.floats(-100, 100, width=32)).filter(
    lambda v: bool(np.abs(v).max() > 1e-3)
)


def counted(*rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """amax float32[T] and counts int64[T, cells] of samples of T timesteps."""
    amax = np.asarray([np.abs(row).max() for row in rows], dtype=np.float32)
    return amax, np.stack([np.histogram(np.abs(row), CELLS, (0, float(a)))[0] for row, a in zip(rows, amax, strict=True)])


def at(value: float) -> Recipe:
    return Recipe(model="m", method="percentile", percentile=value)


@given(VALUES, st.floats(50.5, 100))
def test_percentile_lies_less_than_a_cell_above_the_sample_of_that_rank(values: np.ndarray, share: float) -> None:
    amax, counts = counted(values)
    actual = float(percentile(amax, counts, at(share))[0]) * 127
    ranked = np.sort(np.abs(values.astype(np.float64)))
    sample = ranked[int(np.ceil(len(values) * (share / 100.0))) - 1]
    cell = float(amax[0]) / CELLS
    assert -1e-6 * amax[0] <= actual - sample <= cell + 1e-6 * amax[0]  # one cell, and two float32 roundings


@given(VALUES)
def test_all_of_a_hundred_percent_is_minmax(values: np.ndarray) -> None:
    amax, counts = counted(values)
    np.testing.assert_array_equal(percentile(amax, counts, at(100)), minmax(amax, counts, at(100)))


@given(VALUES, st.floats(50.5, 100), st.floats(50.5, 100))
def test_a_greater_percentile_never_gives_a_smaller_scale(values: np.ndarray, one: float, two: float) -> None:
    amax, counts = counted(values)
    assert percentile(amax, counts, at(min(one, two)))[0] <= percentile(amax, counts, at(max(one, two)))[0]


@given(VALUES)
def test_minmax_is_the_least_scale_that_clips_nothing(values: np.ndarray) -> None:
    amax, counts = counted(values)
    codes = np.abs(values.astype(np.float64)) / float(minmax(amax, counts, at(99))[0])
    assert codes.max() == pytest.approx(127, rel=1e-6)  # one float32 division


def noise(row: np.ndarray, scale: float) -> float:
    """Squared quantization error, value by value."""
    return float(np.square(row - np.clip(np.rint(row / scale), -127, 127) * scale).sum())


@pytest.mark.parametrize("kind", ["normal", "laplace", "uniform", "outliers"])
def test_mse_is_near_the_best_clipping_of_the_raw_samples(kind: str) -> None:
    random = np.random.default_rng(11)
    draw: Any = {"normal": random.normal, "laplace": random.laplace, "uniform": lambda size: random.uniform(-1, 1, size)}
    values = draw.get(kind, random.normal)(size=20000)
    if kind == "outliers":
        values[:3] = 40
    amax, counts = counted(values)
    best = min(noise(values, ratio * float(amax[0]) / 127) for ratio in np.linspace(0.3, 1, 71))
    # The centre of a cell stands for its values. Rounding errors lie within 1/2 code of step 1, a cell is at most 127 / (0.3
    # * 2048) = 0.21 of a code wide: its variance, 0.21^2 / 12, is at most 4.3 % of rounding's 1 / 12.
    assert noise(values, float(mse(amax, counts, at(99))[0])) <= 1.043 * best
    assert mse(amax, counts, at(99))[0] <= minmax(amax, counts, at(99))[0]


def test_clipping_pays_where_outliers_are_rare_and_not_where_all_values_are_alike() -> None:
    random = np.random.default_rng(5)
    rare = random.normal(size=20000)
    rare[0] = 20
    amax, counts = counted(rare, random.uniform(-1, 1, 20000))
    ratio = mse(amax, counts, at(99)) / minmax(amax, counts, at(99))
    # One value of 20 clipped to 0.4 * 20 costs 144; 20000 rounding errors of step 20 / 127 cost 41 and would cost 7. Clipped
    # to 0.8 * 20 it costs 16 and saves 15; between them the sum is least.
    assert 0.7 < ratio[0] < 1
    assert ratio[1] > 0.99  # clipping 1 % of a uniform row's range costs more than 2 % of its rounding noise saves


@pytest.mark.parametrize("name", sorted(METHODS))
def test_timesteps_are_judged_one_by_one(name: str) -> None:
    random = np.random.default_rng(2)
    rows = [random.normal(size=500), random.laplace(size=300) * 9, random.uniform(-1, 1, 400)]
    together = METHODS[name](*counted(*rows), at(97))
    assert together.dtype == np.float32
    np.testing.assert_array_equal(together, [METHODS[name](*counted(row), at(97))[0] for row in rows])


WEIGHTS = arrays(
    np.float32, st.tuples(st.integers(1, 5), st.just(12)), elements=st.floats(-8, 8, width=32, allow_subnormal=False)
)


@given(WEIGHTS, st.sampled_from([1, 3, 4, 12]))
def test_weight_scales_are_the_least_that_clip_nothing(weight: np.ndarray, block_size: int) -> None:
    rows = cover(weight, PRESETS["w8a8"]).scale
    blocks = cover(weight, scheme_of("weight-only", group_size=block_size)).scale
    # The shape that ONNX wants for weight[in, out]: a scale for each column, or for each run of inputs of each column.
    assert rows.shape == (len(weight),)
    assert blocks.shape == (12 // block_size, len(weight))
    for o, row in enumerate(weight.astype(np.float64)):
        parts = [(row, rows[o])]
        parts += [(row[b * block_size : (b + 1) * block_size], blocks[b, o]) for b in range(12 // block_size)]
        for part, scale in parts:
            # One float32 division, whose result may be subnormal for the least weights.
            expected = np.abs(part).max() / 127 if part.any() else 1.0
            assert scale == pytest.approx(expected, rel=1e-6, abs=1e-44)
