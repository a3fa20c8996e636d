"""Files of conditions: what is written comes back, and what a network does not take is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dq_export.core.condition_file import load_conditions, misfit, save_conditions
from dq_export.core.documents import DocumentError
from dq_export.core.network import BATCH, Axis, Conditions, Input
from dq_export.core.tensor_file import save_tensors

LENGTH = Axis("length", 5, 8)
INPUTS = (
    Input(name="sample", role="state", dtype="float32", shape=(BATCH, 3)),
    Input(name="timestep", role="timestep", dtype="int64"),
    Input(name="states", role="condition", dtype="float32", shape=(BATCH, LENGTH, 4)),
    Input(name="mask", role="condition", dtype="float32", shape=(BATCH, LENGTH)),
)


def arrays(rows: int, length: int = 5) -> dict[str, Any]:
    return {"states": np.full((rows, length, 4), 0.5, np.float32), "mask": np.ones((rows, length), np.float32)}


def test_conditions_come_back_with_their_names(tmp_path: Path) -> None:
    written = Conditions(names=("a cat", "Käse \N{SNOWMAN}", "a cat"), arrays=arrays(3), null=arrays(1))
    save_conditions(tmp_path / "one", written)
    save_conditions(tmp_path / "two", written)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    conditions = load_conditions(tmp_path / "one")
    assert (conditions.names, len(conditions)) == (written.names, 3)
    for actual, stored in ((conditions.arrays, written.arrays), (conditions.null, written.null)):
        assert set(actual) == set(stored)
        for name, rows in stored.items():
            np.testing.assert_array_equal(actual[name], rows)
    assert misfit(conditions, INPUTS, guided=True) == ""


def test_conditions_of_others_have_numbers_for_names(tmp_path: Path) -> None:
    save_tensors(tmp_path / "file", arrays(2))
    conditions = load_conditions(tmp_path / "file")
    assert conditions.names == ("1", "2")
    assert not conditions.null
    assert misfit(conditions, INPUTS, guided=False) == ""


def test_blank_conditions_fit(tmp_path: Path) -> None:
    assert misfit(Conditions.blank(INPUTS), INPUTS, guided=True) == ""


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({}, {}, "no conditions; expected a tensor"),
        ({"null.mask": np.ones((1, 5))}, {}, "no conditions; expected a tensor"),
        ({"mask": np.ones((0, 5))}, {}, "no conditions; expected a tensor"),
        (
            {"states": np.ones((2, 5, 4)), "mask": np.ones((3, 5))},
            {},
            "rows: 3 of 'mask', 2 of 'states'; expected as many of each",
        ),
        (arrays(2), {"prompts": '["a"]'}, "1 prompts in its metadata for 2 conditions"),
        (arrays(2), {"prompts": '{"a": 1}'}, "not a JSON list of texts"),
        (arrays(2), {"prompts": "[1, 2]"}, "not a JSON list of texts"),
        (arrays(2), {"prompts": "a cat"}, "not readable as JSON"),
    ],
)
def test_a_file_without_conditions_is_refused(tensors: Any, metadata: Any, message: str, tmp_path: Path) -> None:
    save_tensors(tmp_path / "file", tensors, metadata)
    with pytest.raises(DocumentError, match=message) as error:
        load_conditions(tmp_path / "file")
    assert "\n" not in str(error.value)


def changed(**more: Any) -> Conditions:
    """Good conditions with some tensors replaced; None leaves one out."""
    tensors = {**arrays(2), **{f"null.{name}": rows for name, rows in arrays(1).items()}, **more}
    present = {name: rows for name, rows in tensors.items() if rows is not None}
    null = {name.removeprefix("null."): rows for name, rows in present.items() if name.startswith("null.")}
    return Conditions(names=("a", "b"), arrays={n: r for n, r in present.items() if not n.startswith("null.")}, null=null)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"states": np.zeros((2, 5, 6), np.float32)}, "states has shape [2, 5, 6]; expected [2, length up to 8, 4]"),
        ({"states": np.zeros((2, 5), np.float32)}, "states has shape [2, 5]; expected [2, length up to 8, 4]"),
        ({"states": np.zeros((2, 0, 4), np.float32)}, "states has shape [2, 0, 4]; expected [2, length up to 8, 4]"),
        ({"states": np.zeros((2, 5, 4), np.float16)}, "states is float16; expected float32"),
        ({"mask": np.ones((2, 5), np.int64)}, "mask is int64; expected float32"),
        ({"mask": np.ones((2, 4), np.float32)}, "mask has length 4, and states has length 5; expected the same"),
        ({"mask": np.ones((2, 9), np.float32)}, "mask has shape [2, 9]; expected [2, length up to 8]"),
        ({"mask": None}, "holds 'states'; expected 'mask', 'states', the network's condition inputs"),
        ({"more": np.ones(2, np.float32)}, "holds 'mask', 'more', 'states'; expected 'mask', 'states', the network's"),
        ({"null.mask": None}, "holds 'null.states'; expected 'null.mask', 'null.states', the network's condition inputs"),
        ({"null.mask": np.ones((2, 5), np.float32)}, "null.mask has shape [2, 5]; expected [1, length up to 8]"),
        ({"null.states": np.full((1, 5, 4), np.inf, np.float32)}, "null.states has NaN or Inf in row 0"),
        ({"states": np.where(np.arange(2)[:, None, None], np.nan, arrays(2)["states"])}, "states has NaN or Inf in row 1"),
    ],
)
def test_values_that_a_network_does_not_take_are_named(more: dict[str, Any], message: str) -> None:
    assert misfit(changed(**more), INPUTS, guided=True).startswith(message)


def test_guidance_needs_rows_without_a_condition() -> None:
    actual = changed(**{"null.mask": None, "null.states": None})
    assert misfit(actual, INPUTS, guided=False) == ""
    reason = misfit(actual, INPUTS, guided=True)
    assert reason.startswith("no null.states [1, ...], null.mask [1, ...], which guidance above 1 needs; add it, or pass")
