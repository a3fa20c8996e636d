"""The one definition of an SQNR."""

from __future__ import annotations

import numpy as np
import pytest

from dq_export.core.compare import MAX_SQNR, decibels


@pytest.mark.parametrize(
    ("signal", "noise", "expected"),
    [(100.0, 1.0, 20.0), (1.0, 100.0, -20.0), (1.0, 0.0, MAX_SQNR), (0.0, 0.0, MAX_SQNR), (0.0, 1.0, -MAX_SQNR)],
)
def test_decibels(signal: float, noise: float, expected: float) -> None:
    assert decibels(signal, noise) == pytest.approx(expected)


@pytest.mark.parametrize("noise", [np.nan, np.inf])
def test_a_result_that_is_not_finite_is_the_worst(noise: float) -> None:
    assert decibels(1.0, noise) == -MAX_SQNR


def test_elements_are_apart() -> None:
    assert decibels(np.asarray([1.0, 1.0]), np.asarray([0.1, np.nan])) == pytest.approx([10.0, -MAX_SQNR])
