"""Ranges, bins and equivalent scaling against slow, obvious versions of themselves."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dq_export.calibration.bins import TOLERANCE, build_table, partition
from dq_export.calibration.collect.statistics import SiteStatistics
from dq_export.calibration.in_scale import dilate, smooth
from dq_export.calibration.ranges import METHODS, minmax, mse, percentile
from dq_export.calibration.scaling import choose_scaling
from dq_export.core.grid import cover
from dq_export.core.recipe import Recipe
from dq_export.core.scheme import PRESETS, scheme_of

RECIPE = Recipe(model="m")
W8A8 = PRESETS["w8a8"]
SCALES = st.lists(st.floats(0.1, 10), min_size=1, max_size=8).map(lambda s: np.asarray(s, dtype=np.float32))


def cost(scale: np.ndarray, starts: tuple[int, ...]) -> float:
    """Added noise of a partition, from its definition."""
    total = 0.0
    for a, b in zip(starts, (*starts[1:], len(scale)), strict=True):
        part = scale[a:b].astype(float)
        total += float(((part.max() / part) ** 2 - 1).sum())
    return total


@given(SCALES, st.integers(1, 8))
@settings(max_examples=60)
def test_the_partition_is_optimal(scale: np.ndarray, bins: int) -> None:
    actual = tuple(partition(scale, bins))
    assert actual[0] == 0
    assert len(actual) <= min(bins, len(scale))
    candidates = [(0, *rest) for k in range(min(bins, len(scale))) for rest in combinations(range(1, len(scale)), k)]
    best = min(cost(scale, starts) for starts in candidates)
    assert cost(scale, actual) <= best + 1e-6 * max(1.0, best)  # float64 sums in another order


@given(SCALES)
def test_auto_takes_the_fewest_bins_within_the_tolerance(scale: np.ndarray) -> None:
    actual = tuple(partition(scale, "auto"))
    limit = TOLERANCE * len(scale)
    assert cost(scale, actual) <= limit + 1e-6
    if len(actual) > 1:
        assert cost(scale, tuple(partition(scale, len(actual) - 1))) > limit - 1e-6


def test_tables_keep_the_largest_scale_of_a_bin_and_cut_half_way() -> None:
    table = build_table(np.asarray([900.0, 500.0, 100.0]), np.asarray([2, 1, 4], dtype=np.float32), 2)
    assert table.bins.edges == (300.0,)
    assert table.scale.tolist() == [4.0, 2.0]
    steps = build_table(np.asarray([900.0, 500.0, 100.0]), np.asarray([1, 2, 4], dtype=np.float32), "per-step")
    assert steps.scale.tolist() == [4.0, 2.0, 1.0]


def test_a_timestep_where_the_input_is_zero_takes_the_least_scale() -> None:
    table = build_table(np.asarray([2.0, 1.0]), np.asarray([0, 3], dtype=np.float32), "per-step")
    assert table.scale.tolist() == [3.0, 3.0]


def histogram(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    amax = np.abs(samples).max(axis=1).astype(np.float32)
    return amax, np.stack([np.histogram(np.abs(s), 2048, (0, a))[0] for s, a in zip(samples, amax, strict=True)])


def samples() -> np.ndarray:
    random = np.random.default_rng(3)
    values = random.normal(size=(2, 20000))
    values[1, :5] = 60  # a few outliers far from the rest
    return values


def test_minmax_clips_nothing() -> None:
    amax, counts = histogram(samples())
    assert np.allclose(minmax(amax, counts, RECIPE) * 127, amax, rtol=1e-6)  # one float32 division


def test_percentile_is_that_of_the_samples() -> None:
    amax, counts = histogram(samples())
    actual = percentile(amax, counts, RECIPE.model_copy(update={"percentile": 99.0})) * 127
    exact = np.percentile(np.abs(samples()), 99.0, axis=1)
    assert (np.abs(actual - exact) <= 2 * amax / 2048).all()  # the documented cell, and the percentile's own cell


def test_mse_is_near_the_brute_force_optimum() -> None:
    values = samples()
    amax, counts = histogram(values)
    actual = mse(amax, counts, RECIPE)

    def error(row: np.ndarray, scale: float) -> float:
        return float(np.square(row - np.clip(np.rint(row / scale), -127, 127) * scale).sum())

    for row, limit, scale in zip(values, amax, actual, strict=True):
        best = min(error(row, r * limit / 127) for r in np.linspace(0.3, 1.0, 71))
        assert error(row, float(scale)) <= 1.02 * best  # a cell's centre stands for its values: 2 % of the error
    assert set(METHODS) == {"minmax", "percentile", "mse"}


def test_weight_scales_clip_nothing() -> None:
    weight = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
    weight[2] = 0
    scale = cover(weight, PRESETS["w8a8"]).scale
    assert scale[2] == 1
    assert np.allclose(np.abs(weight).max(axis=1)[[0, 1, 3]], (scale * 127)[[0, 1, 3]], rtol=1e-6)
    blocks = cover(weight, scheme_of("weight-only", group_size=4)).scale
    assert blocks.shape == (2, 6)
    assert blocks[1, 3] == np.float32(np.abs(weight[3, 4:]).max() / 127)


def test_dilation_grows_no_row_and_only_grows() -> None:
    weight = np.random.default_rng(1).normal(size=(5, 40)).astype(np.float32) * np.logspace(-2, 0, 40, dtype=np.float32)
    weight[:, 7] = 0
    activation = np.ones(40, dtype=np.float32)
    in_scale = dilate(weight, activation, 1.0)
    assert (in_scale >= 1).all()
    assert in_scale[7] == 1
    assert in_scale.max() > 5, "small columns must be dilated"
    amax = np.abs(weight).max(axis=1)
    np.testing.assert_allclose(np.abs(weight * in_scale).max(axis=1), amax, rtol=1e-6)  # one float32 product


def test_relaxed_dilation_shrinks_the_range_by_rho_and_grows_no_row_by_more() -> None:
    weight = np.random.default_rng(1).normal(size=(5, 40)).astype(np.float32)
    activation = np.linspace(1, 30, 40, dtype=np.float32)
    one, three = dilate(weight, activation, 1.0), dilate(weight, activation, 3.0)
    assert (activation / three).max() == pytest.approx((activation / one).max() / 3, rel=1e-6)  # float32 divisions
    assert (np.abs(weight * three).max(axis=1) <= 3.00001 * np.abs(weight).max(axis=1)).all()  # likewise
    assert (three == one).any(), "channels that do not set the range stay"


def test_smooth_is_the_papers_formula() -> None:
    activation, weight = np.asarray([4.0, 9.0, 0.0], dtype=np.float32), np.asarray([1.0, 4.0, 1.0], dtype=np.float32)
    assert smooth(activation, weight, 0.5).tolist() == [2.0, 1.5, 1.0]
    assert smooth(activation, weight, 1.0).tolist() == [4.0, 9.0, 1.0]


def statistics(rows: np.ndarray) -> SiteStatistics:
    return SiteStatistics(
        timesteps=np.asarray([1.0]),
        low=rows.min(axis=0, keepdims=True),
        high=rows.max(axis=0, keepdims=True),
        rows=rows,
        row_step=np.zeros(len(rows), dtype=np.int64),
    )


def outliers() -> tuple[SiteStatistics, np.ndarray]:
    random = np.random.default_rng(5)
    factor = np.ones(32, dtype=np.float32)
    factor[3] = 50
    rows = (random.normal(size=(256, 32)) * factor).astype(np.float32)
    return statistics(rows), (random.normal(size=(16, 32)) / factor).astype(np.float32)


def chosen(scaling: str, **options: object) -> tuple[str, float]:
    samples, weight = outliers()
    recipe = Recipe.parse({"model": "m", "scaling": scaling, **options}, "test")
    result = choose_scaling(samples, [weight], recipe, scheme=W8A8)
    return result.method, result.error


def test_auto_is_at_least_as_good_as_every_fixed_rule() -> None:
    auto = chosen("auto")[1]
    fixed = [chosen("none")[1], chosen("dilate")[1], chosen("smooth")[1], chosen("dilate", rho=2.0)[1]]
    assert auto <= min(fixed)
    assert auto < chosen("none")[1] / 100, "an outlier of 50x must not decide the scale"


def test_auto_prefers_none_on_a_tie() -> None:
    rows = np.eye(4, dtype=np.float32)[np.arange(40) % 4] * 127
    rows[::2] *= -1
    weight = np.eye(4, dtype=np.float32)
    result = choose_scaling(statistics(rows), [weight], RECIPE, scheme=W8A8)
    assert result.method == "none"  # every candidate is exact here, but for the rounding of float32 scales
    assert result.error < 1e-15


def test_a_shift_centres_one_sided_channels() -> None:
    rows = np.random.default_rng(2).uniform(10, 12, size=(200, 8)).astype(np.float32)
    recipe = Recipe(model="m", scaling="none", shift=True)
    result = choose_scaling(statistics(rows), [np.eye(8, dtype=np.float32)], recipe, scheme=W8A8)
    assert np.abs(result.in_shift - 11).max() < 0.1
    assert statistics(rows).amax(result.in_scale, result.in_shift)[0] == pytest.approx(1, rel=0.02)


def test_options_have_an_effect() -> None:
    assert chosen("smooth", alpha=0.2) != chosen("smooth", alpha=0.8)
    assert chosen("dilate", rho=1.0)[1] != chosen("dilate", rho=4.0)[1]
    assert chosen("smooth", shift=True)[0] == "smooth(0.5)+shift"
