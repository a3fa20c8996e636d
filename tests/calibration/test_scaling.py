"""Equivalent scaling against its formulas, element by element, and against the output error that it promises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import calibrate_tiny, recipe_of
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dq_export.calibration import calibrate as calibrate_module
from dq_export.calibration.collect.statistics import SiteStatistics
from dq_export.calibration.in_scale import balance, dilate, equalize, smooth
from dq_export.calibration.scaling import AUTO_ALPHA, AUTO_RHO, Scaling, choose_scaling
from dq_export.core.recipe import Recipe
from dq_export.core.rule import Rule
from dq_export.core.scheme import PRESETS
from dq_export.families.reference import Reference

# 2^-10 … 8 or 0: no column then needs more than the largest scale, so that every formula below holds as written.
W8A8 = PRESETS["w8a8"]
ELEMENT = st.one_of(st.just(0.0), st.floats(2**-10, 8, width=32), st.floats(-8, -(2**-10), width=32))
WEIGHT = arrays(np.float32, st.tuples(st.integers(1, 4), st.just(5)), elements=ELEMENT)
ACTIVATION = arrays(np.float32, 5, elements=st.one_of(st.just(0.0), st.floats(2**-10, 64, width=32)))
ROUNDING = 1e-6
"""A handful of float32 operations of 6e-8 each."""


@given(WEIGHT, ACTIVATION)
def test_dilation_keeps_every_rows_range_and_is_the_largest_that_does(weight: np.ndarray, activation: np.ndarray) -> None:
    in_scale = dilate(weight, activation, 1.0)
    assert (in_scale >= 1).all()
    amax = np.abs(weight).max(axis=1)
    np.testing.assert_allclose(np.abs(weight * in_scale).max(axis=1), amax, rtol=ROUNDING)
    for k, column in enumerate(weight.T):
        if column.any():
            assert max(abs(w) * in_scale[k] / a for w, a in zip(column, amax, strict=True) if w) == pytest.approx(1, rel=ROUNDING)
        else:
            assert in_scale[k] == 1


@given(WEIGHT, ACTIVATION, st.floats(1, 8))
def test_relaxed_dilation_is_its_formula(weight: np.ndarray, activation: np.ndarray, rho: float) -> None:
    d = [
        min((float(np.abs(row).max()) / abs(float(row[k])) for row in weight if row[k]), default=1.0)
        for k in range(weight.shape[1])
    ]
    target = max(float(a) / x for a, x in zip(activation, d, strict=True)) / rho
    expected = [x * min(max(float(a) / x / target, 1.0), rho) if target else x for a, x in zip(activation, d, strict=True)]
    np.testing.assert_allclose(dilate(weight, activation, rho), expected, rtol=ROUNDING)


@given(ACTIVATION, ACTIVATION, st.floats(0, 1))
def test_smooth_is_its_formula(activation: np.ndarray, weight: np.ndarray, alpha: float) -> None:
    expected = [float(a) ** alpha / float(w) ** (1 - alpha) if a and w else 1.0 for a, w in zip(activation, weight, strict=True)]
    np.testing.assert_allclose(smooth(activation, weight, alpha), expected, rtol=1e-5)  # powers of float32: some more roundings


def test_scales_stay_within_four_decades_of_1() -> None:
    tiny, huge = np.asarray([1e-9, 1e9], dtype=np.float32), np.asarray([1e9, 1e-9], dtype=np.float32)
    assert smooth(tiny, huge, 0.5).tolist() == [np.float32(1e-4), np.float32(1e4)]
    assert dilate(np.asarray([[1, 1e-30]], dtype=np.float32), np.ones(2, dtype=np.float32), 1.0).tolist() == [1.0, 1e4]


@pytest.mark.parametrize(
    "weight", [[[0, 0], [1, 0.5]], [[1, 1e-42], [2, 0]], [[0, 0]]], ids=["zero row", "subnormal", "all zero"]
)
def test_degenerate_weights_give_finite_scales_and_no_warning(weight: list[list[float]]) -> None:
    in_scale = dilate(np.asarray(weight, dtype=np.float32), np.ones(2, dtype=np.float32), 2.0)  # a warning is an error here
    assert np.isfinite(in_scale).all()
    assert (in_scale >= 1).all()


def statistics(*steps: np.ndarray) -> SiteStatistics:
    """The statistics of all rows of some timesteps, every row kept."""
    return SiteStatistics(
        timesteps=np.arange(len(steps), 0, -1, dtype=np.float64),
        low=np.stack([rows.min(axis=0) for rows in steps]),
        high=np.stack([rows.max(axis=0) for rows in steps]),
        rows=np.concatenate(steps),
        row_step=np.repeat(np.arange(len(steps)), [len(rows) for rows in steps]),
    )


def two_steps(seed: int = 0) -> tuple[SiteStatistics, np.ndarray]:
    """Channels of different size and centre, at two timesteps of different range; and a weight."""
    random = np.random.default_rng(seed)
    factor, middle = random.lognormal(0, 1.5, 8), random.normal(size=8) * 3
    steps = [((random.normal(size=(24, 8)) + middle) * factor * size).astype(np.float32) for size in (1, 6)]
    return statistics(*steps), random.normal(size=(6, 8)).astype(np.float32)


def output_error(samples: SiteStatistics, weight: np.ndarray, in_scale: np.ndarray, in_shift: np.ndarray) -> float:
    """|W x - W8A8 of it|^2 / |W x|^2, one row and one output at a time, from the definition."""
    scaled = [(row.astype(np.float64) - in_shift) / in_scale for row in samples.rows]
    # All rows are kept, so the range of a timestep is that of its rows.
    limit = [max(np.abs(x).max() for x, s in zip(scaled, samples.row_step, strict=True) if s == step) for step in (0, 1)]
    noise = signal = 0.0
    for x, row, step in zip(scaled, samples.rows, samples.row_step, strict=True):
        size = limit[step] / 127
        codes = [round(float(v / size)) for v in x]
        for w in weight:
            folded = w * in_scale  # in float32 up to its codes: one of them that lies between two counts in all rows
            unit = np.abs(folded).max() / np.float32(127)
            product = sum(c * round(float(v / unit)) for c, v in zip(codes, folded, strict=True)) * size * float(unit)
            noise += (float(x @ (w.astype(np.float64) * in_scale)) - product) ** 2
            signal += float(w.astype(np.float64) @ row) ** 2
    return noise / signal


def choose(samples: SiteStatistics, weight: np.ndarray, **options: Any) -> Scaling:
    recipe = Recipe.parse({"model": "m", **options}, "test")
    return choose_scaling(samples, [weight], recipe, scheme=W8A8)


# Float32 puts an occasional value that lies between two codes on the other one: of 48 rows by 8 codes hardly any.
TIES = 0.02


@pytest.mark.parametrize(
    "options",
    [{"scaling": "none"}, {"scaling": "smooth", "shift": True}, {"scaling": "dilate", "rho": 4}, {"scaling": "auto"}],
    ids=lambda options: options["scaling"],
)
def test_the_error_of_a_choice_is_the_output_error_of_w8a8(options: dict[str, Any]) -> None:
    samples, weight = two_steps()
    result = choose(samples, weight, **options)
    assert result.error == pytest.approx(output_error(samples, weight, result.in_scale, result.in_shift), rel=TIES)


@given(st.integers(0, 10_000))
@settings(max_examples=8)
def test_auto_takes_the_rule_of_least_error_and_then_the_shift_of_least_error(seed: int) -> None:
    samples, weight = two_steps(seed)
    middle = (samples.low.min(axis=0) + samples.high.max(axis=0)) / 2

    def error(rule: tuple[str, float], in_shift: np.ndarray) -> float:
        amax = np.abs(samples.rows - in_shift).max(axis=0)
        name, strength = rule
        if name == "none":
            return output_error(samples, weight, np.ones(8), in_shift)
        columns = np.abs(weight).max(axis=0)
        in_scale = {
            "dilate": lambda: dilate(weight, amax, strength),
            "smooth": lambda: smooth(amax, columns, strength),
            "balance": lambda: balance(np.maximum(np.abs(samples.high), np.abs(samples.low)), columns),
            "equalize": lambda: equalize(np.ptp(np.concatenate([samples.high, samples.low]), axis=0), np.ptp(weight, axis=0)),
        }[name]()
        return output_error(samples, weight, in_scale, in_shift)

    none = np.zeros(8, dtype=np.float32)
    rules = [("none", 0.0), *(("dilate", rho) for rho in AUTO_RHO), *(("smooth", alpha) for alpha in AUTO_ALPHA)]
    rules += [("balance", 0.0), ("equalize", 0.0)]
    by_rule = {rule: error(rule, none) for rule in rules}
    best = min(by_rule, key=lambda rule: by_rule[rule])
    minimum = min(by_rule[best], error(best, middle), error(best, samples.rows.mean(axis=0)))
    # Two rules whose errors differ by less than TIES may change places; the shifts that follow then differ as well.
    near = [rule for rule in rules if by_rule[rule] <= by_rule[best] * (1 + 2 * TIES)]
    unshifted = choose(samples, weight, scaling="auto", shift=False)
    assert unshifted.error == pytest.approx(by_rule[best], rel=2 * TIES)
    assert not unshifted.in_shift.any()
    if len(near) == 1 and best[0] in ("none", "dilate", "smooth"):  # the shift moves what the others are measured by
        assert choose(samples, weight, scaling="auto").error == pytest.approx(minimum, rel=2 * TIES)


@pytest.mark.parametrize("scaling", ["auto", "none", "dilate", "smooth"])
def test_no_shift_means_none(scaling: str) -> None:
    samples, weight = two_steps()
    assert not choose(samples, weight, scaling=scaling, shift=False).in_shift.any()
    if scaling != "auto":
        assert not choose(samples, weight, scaling=scaling).in_shift.any(), "only auto shifts unasked"


@pytest.mark.parametrize("side", [1, -1])
def test_a_shift_halves_the_range_of_one_sided_channels(side: int) -> None:
    rows = np.abs(np.random.default_rng(3).normal(size=(50, 4))).astype(np.float32) * side
    rows[0] = 0
    rows[1] = 4 * side
    samples = statistics(rows)
    plain, shifted = (choose(samples, np.eye(4, dtype=np.float32), scaling="none", shift=shift) for shift in (False, True))
    assert samples.amax(plain.in_scale, plain.in_shift).tolist() == [4]
    assert samples.amax(shifted.in_scale, shifted.in_shift).tolist() == [2]  # powers of 2: exact
    assert shifted.error < plain.error


def test_an_operation_on_all_tokens_must_gain_one_decibel() -> None:
    paid = 0
    for seed in range(30):
        samples, weight = two_steps(seed)
        recipe = Recipe.parse({"model": "m", "scaling": "auto"}, "test")
        free, token = (choose_scaling(samples, [weight], recipe, scheme=W8A8, free=free) for free in (True, False))
        none = token.alternatives["none"]
        unshifted = min(error for name, error in token.alternatives.items() if "+" not in name)
        assert token.error >= free.error
        if token.method == "none":
            assert unshifted > none * 10**-0.1, "a Mul that gains 1 dB is left out"
        elif not token.in_shift.any():
            assert token.error == unshifted <= none * 10**-0.1, "a Mul gains less than 1 dB"
        else:
            base = token.alternatives[token.method.partition("+")[0]]
            assert token.error <= base * 10**-0.1, "an Add gains less than 1 dB"
        paid += token.error > free.error
    assert paid, "no candidate gains less than 1 dB: the test shows nothing"


@pytest.mark.parametrize("scaling", ["dilate", "smooth", "balance", "equalize", "auto"])
def test_the_elements_of_a_channels_patch_have_one_scale(scaling: str) -> None:
    """They are neighbours, and a Mul on the image scales all of them."""
    samples, weight = two_steps()
    low, high = samples.low.reshape(2, 4, 2).min(axis=2).repeat(2, 1), samples.high.reshape(2, 4, 2).max(axis=2).repeat(2, 1)
    samples = replace(samples, low=low, high=high)
    recipe = Recipe.parse({"model": "m", "scaling": scaling, "shift": False}, "test")
    tied, free = (choose_scaling(samples, [weight], recipe, scheme=W8A8, taps=taps) for taps in (2, 1))
    channels = tied.in_scale.reshape(4, 2)
    assert (channels[:, 0] == channels[:, 1]).all()
    assert len(np.unique(channels)) > 1
    assert (free.in_scale.reshape(4, 2)[:, 0] != free.in_scale.reshape(4, 2)[:, 1]).any(), "the test shows nothing"
    if scaling == "dilate":
        grown = np.abs(weight * tied.in_scale).max(axis=1)
        np.testing.assert_allclose(grown, np.abs(weight).max(axis=1), rtol=1e-6)


def test_below_8_bits_every_gain_counts() -> None:
    """Codes of few bits cannot afford to lose a decibel."""
    for seed in range(30):
        samples, weight = two_steps(seed)
        recipe = Recipe.parse({"model": "m", "scaling": "auto"}, "test")
        free, token = (choose_scaling(samples, [weight], recipe, scheme=PRESETS["w6a6"], free=free) for free in (True, False))
        assert (token.method, token.error) == (free.method, free.error)


def test_clipping_counts_sixteen_times_and_only_codes_of_4_bits_clip() -> None:
    clipped = 0
    by_channel = replace(PRESETS["w4a4"], weight=PRESETS["w8a8"].weight)
    recipe = Recipe.parse({"model": "m", "scaling": "auto"}, "test")
    for seed in range(30):
        random = np.random.default_rng(seed)
        samples = statistics(random.standard_t(6, size=(400, 8)).astype(np.float32))  # large values are rare
        weight = random.normal(size=(6, 8)).astype(np.float32)
        six, four = (choose_scaling(samples, [weight], recipe, scheme=scheme) for scheme in (PRESETS["w6a6"], by_channel))
        assert (six.clip, [name for name in six.alternatives if "*" in name]) == (1, [])
        method = four.method.partition("*")[0]
        scaled = (samples.rows.astype(np.float64) - four.in_shift) / four.in_scale
        amax = samples.amax(four.in_scale, four.in_shift)[samples.row_step, None]
        signal = np.square(samples.rows.astype(np.float64) @ weight.T).sum()
        cost = {}
        for name, error in four.alternatives.items():
            if name.partition("*")[0] == method:
                bound = float(name.partition("*")[2] or 1) * amax
                lost = (scaled - np.clip(scaled, -bound, bound)) * four.in_scale @ weight.T
                cost[name] = error + 16 * np.square(lost).sum() / signal
        assert cost[four.method] == pytest.approx(min(cost.values()), rel=1e-4)
        assert len(cost) == 7
        clipped += four.clip < 1
    assert 0 < clipped < 30


@pytest.mark.parametrize("scaling", ["auto", "dilate", "smooth"])
def test_readers_are_judged_as_one_linear_of_all_their_outputs(scaling: str) -> None:
    samples, weight = two_steps()
    rows = np.concatenate([weight * size for size in np.geomspace(0.1, 10, 60, dtype=np.float32)])  # 360 outputs, of which 256
    recipe = Recipe.parse({"model": "m", "scaling": scaling}, "test")
    differences = choose_scaling(samples, [rows[:100], rows[100:101], rows[101:]], recipe, scheme=W8A8)
    stacked = choose_scaling(samples, [rows], recipe, scheme=W8A8)
    np.testing.assert_array_equal(differences.in_scale, stacked.in_scale)
    np.testing.assert_array_equal(differences.in_shift, stacked.in_shift)
    assert (differences.method, differences.error, differences.alternatives) == (
        stacked.method,
        stacked.error,
        stacked.alternatives,
    )


def test_linears_that_stay_float_do_not_count(tiny: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    judged = []

    def watched(statistics: SiteStatistics, weights: Sequence[Any], *words: Any, **options: Any) -> Scaling:
        judged.append([weight.tolist() for weight in weights])
        return choose_scaling(statistics, weights, *words, **options)

    monkeypatch.setattr(calibrate_module, "choose_scaling", watched)
    left_out = Rule(match=r"blocks\.0\.attn1\.to_k$", action="float", reason="a test")
    calibrate_tiny(tiny, recipe_of(tiny, rules=(left_out, *tiny.rules), scaling="smooth"))
    names = [f"transformer_blocks.0.attn1.to_{letter}" for letter in "qv"]
    assert [tiny.weight(name).tolist() for name in names] in judged


def test_auto_never_shifts_a_constant_input_away() -> None:
    rows = np.tile(np.asarray([3, -2, 0.5], dtype=np.float32), (10, 1))
    result = choose(statistics(rows), np.eye(3, dtype=np.float32), scaling="auto")
    assert np.isfinite(result.error)
    assert statistics(rows).amax(result.in_scale, result.in_shift).all()


def test_scales_that_float16_rounds_to_nothing_are_no_choice() -> None:
    """An input that hardly varies: without its centre 1e-6 remains, and its scales have the same size."""
    random = np.random.default_rng(0)
    rows = (random.normal(size=8) + 1e-6 * random.normal(size=(32, 8))).astype(np.float32)
    samples, weight = statistics(rows, rows), random.normal(size=(6, 8)).astype(np.float32)
    assert choose(samples, weight).method.endswith(("+shift", "+mean"))
    half = choose(samples, weight, dtype="fp16", format="trt")
    smallest = min(samples.amax(half.in_scale, half.in_shift).min(), np.abs(weight * half.in_scale).max(axis=1).min()) / 127
    assert smallest > 2**-17
    assert np.isfinite(half.error)
