"""Batches of a plan, as a user writes them; see test_trt for the rest of the syntax."""

from __future__ import annotations

import pytest

from dq_export.deploy.backend import BackendError
from dq_export.deploy.tensorrt.profiles import MAX_BATCH, profiles

INPUTS = {"hidden_states": (None, 4, 8, 8), "timestep": (1,), "class_labels": (None,)}


def test_shapes_are_read_for_the_inputs_that_change() -> None:
    read = profiles(INPUTS, ("", "hidden_states:4x4x8x8,class_labels:4", f"class_labels:{MAX_BATCH}"))
    assert read == {
        "hidden_states": ((1, 4, 8, 8), (4, 4, 8, 8), (16, 4, 8, 8)),
        "class_labels": ((1,), (4,), (MAX_BATCH,)),
    }


def test_sizes_beside_the_batch_are_those_of_the_best_shape() -> None:
    inputs = {"sample": (None, 4, None, None), "timestep": (1,)}
    assert profiles(inputs, ("", "sample:2x4x64x32", ""))["sample"] == ((1, 4, 64, 32), (2, 4, 64, 32), (16, 4, 64, 32))
    assert profiles(inputs, ("sample:2x4x8x8", "sample:2x4x64x32", ""))["sample"][0] == (2, 4, 8, 8)
    with pytest.raises(BackendError, match=r"'sample' is Bx4x\?x\?: name its shape with --opt-shapes sample:AxBxC"):
        profiles(inputs, ("", "", ""))
    with pytest.raises(BackendError, match=r"'sample' is Bx4x\?x\?, found 2x5x8x8"):
        profiles(inputs, ("", "sample:2x5x8x8", ""))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("class_labels:²", "--opt-shapes 'class_labels:²': expected name:AxBxC"),
        ("class_labels:" + "9" * 5000, "--opt-shapes 'class_labels:999.*: expected name:AxBxC"),
        ("class_labels:1025", "'class_labels' has a batch of 1025; expected 1 to 1024, as the graph takes"),
        ("class_labels:0", "'class_labels' has a batch of 0; expected 1 to 1024"),
    ],
)
def test_a_shape_that_the_graph_does_not_take_is_refused(shape: str, message: str) -> None:
    with pytest.raises(BackendError, match=message) as caught:
        profiles(INPUTS, ("", shape, ""))
    assert len(str(caught.value)) < 300
