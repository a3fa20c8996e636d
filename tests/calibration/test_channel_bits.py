"""Widths by output channel."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import calibrate_tiny, recipe_of

from dq_export.calibration.channel_bits import mixed
from dq_export.calibration.rounding import ROUNDINGS
from dq_export.core.recipe import RecipeError
from dq_export.core.scheme import scheme_of
from dq_export.families.reference import Reference

RANDOM = np.random.default_rng(0)
WEIGHT = RANDOM.standard_normal((40, 64)).astype(np.float32)
WEIGHT[::10] *= (1 + 30 * (RANDOM.random((4, 64)) < 0.05)).astype(np.float32)
"""Four channels of 40 have outliers."""
INPUTS = RANDOM.standard_normal((500, 64)).astype(np.float32)
HESSIAN = INPUTS.T @ INPUTS / len(INPUTS)


def bits_of(codes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """By channel: the bits that its codes need."""
    return np.ceil(np.log2(np.abs(codes).max(axis=1) + 1)).astype(int) + 1


@pytest.mark.parametrize("rounding", ["rtn", "mse", "gptq"])
def test_channels_with_outliers_get_one_bit_more_and_as_many_others_one_less(rounding: str) -> None:
    grid, codes = mixed(WEIGHT, scheme_of("w8a8"), HESSIAN, 4, ROUNDINGS[rounding])
    assert codes is not None
    actual = bits_of(codes)
    assert set(actual[::10]) == {5}
    assert sorted(set(actual)) == [3, 4, 5]
    assert actual.mean() == 4
    narrow = mixed(WEIGHT[1::10], scheme_of("w8a8"), HESSIAN, 4, ROUNDINGS[rounding])  # of four channels: none without outliers
    assert grid.fits(40, 64)
    assert narrow[0].fits(4, 64)
    alone = ROUNDINGS[rounding](WEIGHT, scheme_of("w4a8", None, 0), HESSIAN)
    uniform = alone[0].nearest(WEIGHT) if alone[1] is None else alone[1] * alone[0].steps(64)
    error, plain = (float(np.square((part - WEIGHT) @ INPUTS.T).sum()) for part in (codes * grid.steps(64), uniform))
    assert error < 0.7 * plain


def test_a_calibration_keeps_the_codes_in_int8(tiny: Reference) -> None:
    result, assigned = calibrate_tiny(tiny, recipe_of(tiny, channel_bits=4))
    for name, rule in assigned.items():
        if rule.scheme.mixes_widths:
            assert result.codes[name].dtype == np.int8
            assert result.weight_scale[name].shape == (len(result.codes[name]),)
            assert 3 <= np.abs(result.codes[name]).max() <= 15
        else:
            assert name not in result.codes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": "w4a8"}, "channel_bits with bits w4a8: the widths are mixed inside 8-bit codes; take bits w8a8"),
        ({"rounding": "distill"}, "channel_bits with rounding distill: .* take rounding gptq"),
        ({"granularity": "token-group", "group_size": 32}, "no linear has 8-bit weights with a scale for each channel"),
    ],
)
def test_recipes_that_cannot_mix_widths_are_refused(options: dict[str, Any], message: str, tiny: Reference) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_of(tiny, channel_bits=4, **options).assign(tiny.linears)
