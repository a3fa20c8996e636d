"""The algebra of a fold, on arrays of a few numbers."""

from __future__ import annotations

import numpy as np
import pytest

from dq_export.core.folds import Fold, Kind, Part, explicit, read_bias, read_weight

S, M = np.asarray([2.0, 4.0, 8.0]), np.asarray([1.0, 2.0, 3.0])


def test_rows_are_divided_and_shifted_and_others_stay() -> None:
    part = Part(kind="linear", name="a", rows=(1, 3), channels=(1, 3), shift=True)
    weight, bias = np.asarray([[8.0, 8.0]] * 4), np.asarray([8.0, 10.0, 11.0, 8.0])
    np.testing.assert_array_equal(part.divided(weight, S), [[8, 8], [2, 2], [1, 1], [8, 8]])
    np.testing.assert_array_equal(part.moved(bias, S, M), [8, (10 - 2) / 4, (11 - 3) / 8, 8])
    assert (weight[1] == 8).all()
    assert bias[1] == 10, "what was given stays as it was"


def test_a_part_without_the_shift_takes_the_scale_alone_and_the_number_of_the_graph() -> None:
    part = Part(kind="linear", name="a", rows=(0, 3), channels=(0, 3), plus=1.0)
    np.testing.assert_array_equal(part.moved(np.asarray([[1.0, 3.0, 7.0]] * 2), S, M), [[1, 1, 1]] * 2)


def test_a_convolutions_weight_is_divided_by_row_and_read_by_column() -> None:
    part = Part(kind="convolution", name="a", rows=(0, 3), channels=(0, 3))
    weight = np.full((3, 3, 2, 1), 8.0)
    np.testing.assert_array_equal(part.divided(weight, S)[:, 0, 0, 0], [4, 2, 1])
    np.testing.assert_array_equal(read_weight(weight, S)[0, :, 1, 0], [16, 32, 64])


def test_a_reader_undoes_what_the_parts_bring_about() -> None:
    rng = np.random.default_rng(0)
    producer, bias, reader, x = rng.normal(size=(3, 5)), rng.normal(size=3), rng.normal(size=(4, 3)), rng.normal(size=5)
    part = Part(kind="linear", name="a", rows=(0, 3), channels=(0, 3), shift=True)
    scaled = part.divided(producer, S) @ x + part.moved(bias, S, M)
    exact = reader @ (producer @ x + bias)
    np.testing.assert_allclose(read_weight(reader, S) @ scaled + read_bias(np.zeros(4), reader, M), exact, rtol=1e-13)


@pytest.mark.parametrize(
    ("kinds", "cost"),
    [
        (("linear", "norm", "constant", "convolution"), "free"),
        (("norm", "vector"), "vector"),
        (("linear", "vector", "token"), "token"),
    ],
)
def test_a_fold_costs_what_its_dearest_part_does(kinds: tuple[Kind, ...], cost: str) -> None:
    parts = tuple(Part(kind=kind, name=kind, rows=(0, 1), channels=(0, 1)) for kind in kinds)
    assert Fold(parts=parts).kind == cost


def test_an_explicit_fold_covers_all_channels() -> None:
    (part,) = explicit("fc2", 7).parts
    assert (part.kind, part.channels, part.shift) == ("token", (0, 7), True)
