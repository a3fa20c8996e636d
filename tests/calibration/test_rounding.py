"""GPTQ and bias correction: that they lower the output's error, on rows that they did not see, and stay on the grid."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import calibrate_tiny, calibration_of, feed_of, load_graph, recipe_of, run_onnx, sqnr

from dq_export.calibration.calibrate import calibrate
from dq_export.calibration.hessians import pairs_of
from dq_export.calibration.rounding import ROUNDINGS, compensate
from dq_export.core.folding import folded_weight
from dq_export.core.grid import cover
from dq_export.core.network import Linear
from dq_export.core.recipe import RecipeError
from dq_export.core.scales import TokenScale
from dq_export.core.scheme import scheme_of
from dq_export.families.reference import Reference
from dq_export.passes.base import run_passes
from dq_export.passes.pipeline import canonical_passes

W4 = scheme_of("w4a16", group_size=32)


def correlated(rows: int, seed: int, width: int = 64) -> np.ndarray:
    """float32[rows, width] whose columns are correlated, as activations' are."""
    random = np.random.default_rng(seed)
    mixing = np.random.default_rng(1).normal(size=(16, width))
    return (random.normal(size=(rows, 16)) @ mixing + 0.3 * random.normal(size=(rows, width))).astype(np.float32)


def by_hand(weight: np.ndarray, steps: np.ndarray, qmax: int, hessian: np.ndarray) -> np.ndarray:
    """GPTQ's definition, slow: round the most important column left, then refit all later ones by least squares."""
    damped = hessian.astype(np.float64) + 0.01 * np.diagonal(hessian).mean() * np.eye(len(hessian))
    left, codes = weight.astype(np.float64).copy(), np.zeros(weight.shape)
    order = list(np.argsort(-np.diagonal(hessian), kind="stable"))
    for place, column in enumerate(order):
        codes[:, column] = np.clip(np.rint(left[:, column] / steps[:, column]), -qmax, qmax)
        error, rest = left[:, column] - codes[:, column] * steps[:, column], order[place + 1 :]
        if rest:
            gain = np.linalg.solve(damped[np.ix_(rest, rest)], damped[rest, column])
            left[:, rest] += np.outer(error, gain)
    return codes


@pytest.mark.parametrize("width", [64, 160])
def test_compensation_is_the_least_squares_refit_of_the_columns_left(width: int) -> None:
    weight, rows = np.random.default_rng(2).normal(size=(8, width)).astype(np.float32), correlated(500, 0, width)
    hessian = (rows.T @ rows / len(rows)).astype(np.float32)
    grid = cover(weight, W4)
    expected = by_hand(weight, np.broadcast_to(grid.steps(width), weight.shape), 7, hessian)
    actual = compensate(weight, grid, hessian)
    # A value within float32 rounding of a tie may fall either way, and move what follows it in its row.
    assert (actual != expected).any(axis=1).sum() <= 1


def test_gptq_lowers_the_output_error_on_rows_that_it_did_not_see() -> None:
    weight, rows, others = (
        np.random.default_rng(2).normal(size=(32, 64)).astype(np.float32),
        correlated(500, 0),
        correlated(500, 1),
    )
    hessian = (rows.T @ rows / len(rows)).astype(np.float32)
    error = {}
    for name, rounding in ROUNDINGS.items():
        grid, codes = rounding(weight, W4, hessian)
        value = grid.nearest(weight) if codes is None else codes * grid.steps(64)
        assert codes is None or (np.abs(codes) <= 7).all()
        error[name] = float(np.square(others @ (value - weight).T).mean())
    assert error["mse"] < error["rtn"]
    assert error["gptq"] < 0.4 * error["mse"]


def test_an_input_that_is_always_zero_gets_the_code_zero() -> None:
    rows = correlated(100, 0)
    rows[:, 5] = 0
    weight = np.ones((4, 64), dtype=np.float32)
    assert not compensate(weight, cover(weight, W4), rows.T @ rows)[:, 5].any()


@pytest.mark.parametrize("hessian", [np.eye(3), np.full((64, 64), np.nan)])
def test_a_hessian_of_another_size_or_not_finite_is_refused(hessian: np.ndarray) -> None:
    weight = np.ones((4, 64), dtype=np.float32)
    with pytest.raises(ValueError, match=r"expected a finite Hessian \[64, 64\]"):
        compensate(weight, cover(weight, W4), hessian.astype(np.float32))


@pytest.mark.parametrize("bits", ["w4a8", "w4a16"])
def test_gptq_and_the_fitted_grid_bring_the_network_nearer(bits: str, tiny: Reference, tiny_onnx: Path) -> None:
    actual = {}
    for rounding in ROUNDINGS:
        result, assigned = calibrate_tiny(tiny, recipe_of(tiny, bits=bits, rounding=rounding, calib_size=8))
        assert bool(result.codes) == (rounding == "gptq")
        graph = load_graph(tiny_onnx)
        run_passes(graph, canonical_passes(result, assigned))
        exact = [tiny.forward(feed_of(tiny, t, seed=7)) for t in (900, 500, 100)]
        values = [sqnr(a, run_onnx(graph, feed_of(tiny, t, seed=7))) for a, t in zip(exact, (900, 500, 100), strict=True)]
        actual[rounding] = float(np.mean(values))
    assert actual["gptq"] > actual["rtn"] + 1


def test_stored_codes_are_what_the_graph_holds(tiny: Reference, tiny_onnx: Path) -> None:
    result, assigned = calibrate_tiny(tiny, recipe_of(tiny, bits="w4a8", rounding="gptq"))
    graph = load_graph(tiny_onnx)
    run_passes(graph, canonical_passes(result, assigned))
    for name, codes in result.codes.items():
        stored = graph.graph.initializers[f"{name}.weight_codes"].const_value
        assert stored is not None
        np.testing.assert_array_equal(stored.numpy().astype(np.int8).T, codes)


def test_bias_correction_takes_most_of_the_mean_error_away(tiny: Reference, tiny_onnx: Path) -> None:
    result, assigned = calibrate_tiny(
        tiny, recipe_of(tiny, bits="w4a4", granularity="token", bias_correction=True, calib_size=16)
    )
    rows: dict[str, list[np.ndarray]] = {name: [] for name in result.sites}
    with tiny.observe(lambda name, value: rows[name].append(value.numpy().copy())):
        tiny.trajectory(np.arange(8) % 5, steps=5, seed=99, guidance=2.0, before=lambda feed: None)
    left, removed = 0.0, 0.0
    for name, plan in result.sites.items():
        inputs = np.concatenate(rows[name])
        exact, rounded = (inputs - plan.in_shift) / plan.in_scale, plan.quantized(inputs, 0.0)
        for linear in plan.site.linears:
            weights = assigned[linear].scheme.weight
            assert weights is not None
            weight = folded_weight(tiny.weight(linear), linear, list(result.sites.values()))
            error = (exact @ weight.T - rounded @ result.grid(linear, weights.qtype).nearest(weight).T).mean(axis=0)
            removed += float(np.square(error).sum())
            left += float(np.square(error - result.correction[linear]).sum())
    assert left < 0.8 * removed  # of 256 kept rows; a mean over them has a noise of its own
    graph = load_graph(tiny_onnx)
    run_passes(graph, canonical_passes(result, assigned))
    plan = next(iter(result.sites.values()))
    for linear in plan.site.linears[:2]:  # whose rows no other site divides
        stored = graph.graph.initializers[f"{linear}.bias_1"].const_value
        assert stored is not None
        expected = tiny.bias(linear) + tiny.weight(linear).astype(np.float64) @ plan.in_shift + result.correction[linear]
        np.testing.assert_allclose(stored.numpy(), expected, atol=1e-5)


def test_a_scale_for_each_token_is_its_own_amax() -> None:
    rows = np.asarray([[1.0, -0.5, 0.0, 0.25], [100.0, 0.3, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]], dtype=np.float32)
    actual = TokenScale(constant=1.0).nearest(rows)
    np.testing.assert_allclose(actual[0] * 127, np.rint(rows[0] * 127), atol=1e-4)
    assert actual[1, 1] == 0  # 0.3 of 100 is less than half a code
    assert not actual[2].any()
    grouped = TokenScale(constant=1.0, group=2).nearest(rows)
    assert grouped[0, 3] == pytest.approx(0.25)
    with pytest.raises(ValueError, match="constant must be finite"):
        TokenScale(constant=0.0)


def test_a_fitted_grid_asks_for_the_diagonal_alone(tiny: Reference, tmp_path: Path) -> None:
    recipe = recipe_of(tiny, bits="w4a8", rounding="mse", scaling="none")
    shapes: list[tuple[int, ...]] = []
    calibration = calibration_of(
        tiny, recipe, tmp_path, progress=lambda done, total, unit="": shapes.append((done, total)), space=8 * 32 * 32
    )
    calibrate(calibration)
    calls = calibration.sampling.calls
    assert shapes.count((calls, calls)) == 2  # the ranges, and all second moments at once
    weight, rows = np.random.default_rng(2).normal(size=(8, 64)).astype(np.float32), correlated(500, 0)
    hessian = (rows * np.linspace(0.1, 10, 64, dtype=np.float32)).T @ rows
    whole, diagonal, none = (ROUNDINGS["mse"](weight, W4, item)[0].scale for item in (hessian, np.diagonal(hessian), None))
    np.testing.assert_array_equal(whole, diagonal)
    assert none is not None
    assert not np.array_equal(whole, none)


class Halved:
    """Quantizes half of every weight, and rounds by a Hessian of its own."""

    name = "halved"

    def prepare(self, linear: str, weight: np.ndarray) -> np.ndarray:
        return weight / 2

    def hessian(self, linear: str, streamed: np.ndarray | None, in_scale: np.ndarray) -> np.ndarray | None:
        assert in_scale.shape == (len(streamed),) if streamed is not None else True
        return np.eye(len(in_scale), dtype=np.float32)


@pytest.mark.parametrize("rounding", list(ROUNDINGS))
def test_a_plug_in_gives_the_weights_and_hessians_that_are_rounded(
    rounding: str, tiny: Reference, tiny_onnx: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(tiny, bits="w4a16", rounding=rounding, scaling="none")
    calibration = calibration_of(tiny, recipe, tmp_path, plugin=Halved())
    result, assigned = calibrate(calibration), calibration.assigned
    assert result is not None
    graph = load_graph(tiny_onnx)
    run_passes(graph, canonical_passes(result, assigned))
    for name, rule in assigned.items():
        if rule.scheme.weight is None:
            continue
        expected = ROUNDINGS[rounding](tiny.weight(name) / 2, rule.scheme, np.eye(tiny.weight(name).shape[1], dtype=np.float32))
        np.testing.assert_array_equal(result.weight_scale[name], expected[0].scale)
        stored = graph.graph.initializers[f"{name}.weight_codes"].const_value
        assert stored is not None
        codes = expected[0].codes(tiny.weight(name) / 2) if expected[1] is None else expected[1]
        np.testing.assert_array_equal(stored.numpy().astype(np.float32).T, codes)


def test_float8_is_not_rounded_by_gptq(tiny: Reference) -> None:
    with pytest.raises(RecipeError, match="float8 codes are rounded to nearest; use rounding rtn or mse"):
        recipe_of(tiny, bits="fp8", rounding="gptq").assign(tiny.linears)


def test_a_convolution_of_large_patches_is_rounded_to_nearest_by_its_inputs_mean_squares() -> None:
    small, large = (Linear(name="blocks.0.conv", role="gemm", width=9 * channels, convolution=True) for channels in (640, 1280))
    assert pairs_of(small)
    assert not pairs_of(large)
    assert pairs_of(replace(large, convolution=False)), "a linear of any width"
    rng = np.random.default_rng(0)
    weight, squares = rng.normal(size=(4, 36)).astype(np.float32), rng.uniform(1, 9, 36).astype(np.float32)
    (grid, codes), (same, _) = (
        rounding(weight, scheme_of("w8a8"), squares) for rounding in (ROUNDINGS["gptq"], ROUNDINGS["mse"])
    )
    assert codes is None
    np.testing.assert_array_equal(grid.scale, same.scale)
