"""Element types and granularities."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dq_export.core.qtypes import FP8, INT8, QUANT_TYPES, UINT8, QuantType

SHAPES = st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple)


INTEGERS = [qtype for qtype in QUANT_TYPES if not qtype.mantissa]


@pytest.mark.parametrize("qtype", INTEGERS, ids=lambda qtype: qtype.name)
def test_every_code_fits_its_element_type(qtype: QuantType) -> None:
    lowest = 0 if qtype.name.startswith("u") else -(2 ** (qtype.bits - 1))
    assert lowest <= qtype.qmin < qtype.qmax <= lowest + 2**qtype.bits - 1


@given(st.sampled_from(INTEGERS), st.floats(1e-3, 1e3), st.floats(-1, 1))
def test_a_value_inside_the_range_is_off_by_half_a_scale_at_most(qtype: QuantType, scale: float, part: float) -> None:
    value = part * scale * (qtype.qmax - qtype.zero_point)
    code = min(qtype.qmax, max(qtype.qmin, round(value / scale) + qtype.zero_point))
    assert abs(scale * (code - qtype.zero_point) - value) <= scale / 2 * (1 + 1e-12)  # float64, three operations


def test_the_two_types_hold_the_same_numbers() -> None:
    int8, uint8 = INT8, UINT8
    assert range(int8.qmin - int8.zero_point, int8.qmax + 1) == range(
        uint8.qmin - uint8.zero_point, uint8.qmax - uint8.zero_point + 1
    )


@given(st.lists(st.floats(-2000, 2000, width=32), min_size=1, max_size=50))
def test_float8_rounds_as_the_type_itself(values: list[float]) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    array = np.asarray(values, dtype=np.float32)
    expected = np.clip(array, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(FP8.round(array), expected)


def test_integers_round_half_to_even_and_are_clipped() -> None:
    rounded = INT8.round(np.asarray([0.5, 1.5, -2.5, 126.6, 400, -400], dtype=np.float32))
    np.testing.assert_array_equal(rounded, [0, 2, -2, 127, 127, -127])
