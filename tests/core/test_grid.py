"""Weight grids: what they cover, what they cost, and that two levels are whole multiples."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dq_export.core.grid import cover, fit
from dq_export.core.scheme import scheme_of

ELEMENT = st.one_of(st.just(0.0), st.floats(2**-10, 8, width=32), st.floats(-8, -(2**-10), width=32))
WEIGHT = arrays(np.float32, st.tuples(st.integers(1, 4), st.just(64)), elements=ELEMENT)
ACTIONS = ["w8a8", "w6a6", "w4a8", "w4a4", "w4a16", "w8a16", "weight-only"]


@given(weight=WEIGHT, action=st.sampled_from(ACTIONS))
def test_a_covering_grid_moves_no_weight_further_than_half_a_step(weight: np.ndarray, action: str) -> None:
    scheme = scheme_of(action, group_size=16 if action in ("w4a8", "w4a4", "w4a16", "w8a16", "weight-only") else 0)
    grid = cover(weight, scheme)
    steps = np.broadcast_to(grid.steps(64), weight.shape)
    # A thousandth of a multiple may be cut off on the way up to whole ones; float32 rounds the rest.
    assert (np.abs(grid.nearest(weight) - weight) <= steps * (0.5 + 2e-3 * grid.qtype.qmax)).all()
    assert (np.abs(grid.codes(weight)) <= grid.qtype.qmax).all()


@given(weight=WEIGHT, action=st.sampled_from(["w4a8", "w4a4"]))
def test_two_levels_are_whole_multiples_that_stay_8_bit_codes(weight: np.ndarray, action: str) -> None:
    grid = cover(weight, scheme_of(action, group_size=16))
    assert grid.multiplier is not None
    assert grid.multiplier.shape == (4, len(weight))
    assert grid.scale.shape == (len(weight),)
    wide = grid.codes(weight) * np.repeat(grid.multiplier.T, 16, axis=1)
    assert np.abs(wide).max() <= 126  # 7 * 18
    np.testing.assert_allclose(wide * grid.scale[:, None], grid.nearest(weight), rtol=1e-6)


@given(weight=WEIGHT, seed=st.integers(0, 99))
def test_a_fitted_grid_is_no_worse_by_the_errors_that_count(weight: np.ndarray, seed: int) -> None:
    importance = np.random.default_rng(seed).uniform(0.1, 10, 64).astype(np.float32)
    for action in ("w8a8", "w4a16"):
        scheme = scheme_of(action, group_size=16 if action == "w4a16" else 0)
        grids = (cover(weight, scheme), fit(weight, scheme, importance))
        error = [np.sum((grid.nearest(weight) - weight) ** 2 * importance) for grid in grids]
        assert error[1] <= error[0] * (1 + 1e-5)


def test_a_fitted_grid_clips_an_outlier_that_costs_the_others_more() -> None:
    weight = np.random.default_rng(0).normal(size=(1, 64)).astype(np.float32)
    weight[0, 0] = 8.0
    scheme = scheme_of("w4a16", group_size=64)
    plain, fitted = cover(weight, scheme), fit(weight, scheme, None)
    assert fitted.scale[0, 0] < 0.95 * plain.scale[0, 0]
    only_the_outlier = np.zeros(64, dtype=np.float32)
    only_the_outlier[0] = 1
    assert fit(weight, scheme, only_the_outlier).scale[0, 0] == pytest.approx(plain.scale[0, 0])


@pytest.mark.parametrize(("action", "size"), [("w4a8", None), ("w4a16", None), ("w4a8", 48)])
def test_blocks_that_do_not_divide_are_named(action: str, size: int | None) -> None:
    with pytest.raises(ValueError, match="its 40 inputs are not divided by"):
        cover(np.ones((2, 40), dtype=np.float32), scheme_of(action, group_size=size))


@pytest.mark.parametrize(
    ("action", "width", "block"),
    [
        ("w4a8", 1152, 64),
        ("w4a8", 96, 32),
        ("w4a16", 1152, 128),
        ("w4a16", 128, 64),
        ("weight-only", 128, 128),
        ("weight-only", 40, 0),
        ("w8a8", 100, 0),
    ],
)
def test_the_default_block_is_the_first_that_divides(action: str, width: int, block: int) -> None:
    assert scheme_of(action).block_size(width) == block


def test_a_grid_fits_weights_of_its_channels_and_blocks() -> None:
    weight = np.ones((4, 96), dtype=np.float32)
    for words in (("w8a8",), ("w4a16", None, 32), ("w4a8", None, 32)):
        grid = cover(weight, scheme_of(*words))  # type: ignore[arg-type]
        assert grid.blocks == (1 if words == ("w8a8",) else 3)
        assert grid.fits(4, 96)
        assert not grid.fits(5, 96)
        assert grid.fits(4, 100) == (grid.blocks == 1)
