"""A network's inputs and what is drawn with them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dq_export.core.network import BATCH, Axis, Conditions, Input, arguments, axes_of, batch_of, output_name, resized, sized


def test_an_inputs_zeros_have_its_type_and_the_sizes_of_the_pictures() -> None:
    state = Input(name="x", role="state", dtype="float32", shape=(BATCH, 3, Axis("height", 6), Axis("width", 8)))
    assert (state.zeros().shape, state.zeros(5).shape, state.zeros().dtype) == ((2, 3, 6, 8), (5, 3, 6, 8), np.float32)
    assert Input(name="timestep", role="timestep", dtype="int64").zeros(4).tolist() == [0, 0, 0, 0]


def test_a_changing_dimension_takes_sizes_up_to_its_limit() -> None:
    assert [Axis("length", 5, 7).takes(size) for size in (0, 1, 7, 8)] == [False, True, True, False]
    pairs = Axis("height", 6, 24, multiple=2)
    assert [size for size in range(30) if pairs.takes(size)] == list(range(2, 25, 2))
    assert str(pairs) == "height up to 24 in steps of 2"


def test_a_dimension_may_be_a_part_of_an_axis() -> None:
    height = Axis("height", 16, 48, multiple=8)
    quarter = replace(height, divisor=4)
    inputs = [Input(name=str(axis), role="state", dtype="float32", shape=(BATCH, axis)) for axis in (quarter, height)]
    assert [item.zeros(1).shape for item in inputs] == [(1, 4), (1, 16)]
    assert [length for length in range(20) if quarter.takes(length)] == [2, 4, 6, 8, 10, 12]
    assert str(quarter) == "height/4 up to 12 in steps of 2"
    assert axes_of(inputs) == [height]
    assert [item.zeros(1).shape for item in resized(inputs, {"height": 24})] == [(1, 6), (1, 24)]


def test_inputs_have_the_sizes_of_the_conditions() -> None:
    length, height = Axis("length", 300, 512), Axis("height", 6, 24, multiple=2)
    inputs = [
        Input(name="x", role="state", dtype="float32", shape=(BATCH, 3, height)),
        Input(name="text", role="condition", dtype="float32", shape=(BATCH, length, 2)),
        Input(name="mask", role="condition", dtype="float32", shape=(BATCH, length)),
    ]
    text = Conditions(names=("a",), arrays={"text": np.zeros((1, 77, 2)), "mask": np.zeros((1, 77))}, null={})
    inputs_of_text = sized(inputs, text)
    assert axes_of(inputs_of_text) == [height, Axis("length", 77, 512)]
    assert [item.zeros(2).shape for item in inputs_of_text] == [(2, 3, 6), (2, 77, 2), (2, 77)]
    assert inputs_of_text[0].shape[0] is BATCH
    assert sized(inputs_of_text, text.only(["other"])) == inputs_of_text


def test_inputs_inside_a_dictionary_argument_are_given_in_one() -> None:
    inputs = [
        Input(name="x", role="state", dtype="float32"),
        Input(name="size", role="condition", dtype="float32", within="added"),
        Input(name="ratio", role="condition", dtype="float32", within="added"),
    ]
    assert arguments(inputs, {"size": 2, "x": 1, "ratio": 3}) == {"x": 1, "added": {"size": 2, "ratio": 3}}


def test_residuals_are_given_in_one_tuple() -> None:
    inputs = [Input(name=f"sums_{number}", role="residual", dtype="float32", within="sums") for number in range(3)]
    inputs.append(Input(name="last", role="residual", dtype="float32"))
    assert arguments(inputs, {"sums_1": 2, "sums_0": 1, "sums_2": 3, "last": 4}) == {"sums": (1, 2, 3), "last": 4}


def test_a_condition_is_an_index_into_every_conditional_input() -> None:
    text, size = np.arange(12.0).reshape(3, 2, 2), np.asarray([[1], [2], [3]])
    null_text = np.full((1, 2, 2), -1.0)
    conditions = Conditions(names=("a", "b", "c"), arrays={"text": text, "size": size}, null={"text": null_text})
    assert len(conditions) == 3
    rows = conditions.rows(np.asarray([2, 0, 2]))
    np.testing.assert_array_equal(rows["text"], text[[2, 0, 2]])
    assert rows["size"].tolist() == [[3], [1], [3]]
    null = conditions.null_rows(2)
    assert null.keys() == {"text"}
    np.testing.assert_array_equal(null["text"], np.full((2, 2, 2), -1.0))


def test_a_network_without_conditions_draws_one_thing() -> None:
    nothing = Conditions(names=("",), arrays={}, null={})
    assert (len(nothing), nothing.rows(np.zeros(4, dtype=np.int64)), nothing.null_rows(4)) == (1, {}, {})


def test_the_batch_is_that_of_the_inputs_beside_a_shared_timestep() -> None:
    states, one = np.zeros((6, 2)), np.zeros(1)
    assert batch_of({"timestep": one, "x": states}) == 6
    assert batch_of({"x": states[:1], "timestep": one}) == 1


def test_the_output_never_has_an_inputs_name() -> None:
    assert output_name(["hidden_states", "timestep"]) == "sample"
    assert output_name(["sample", "timestep"]) == "out_sample"
