"""The shapes of a plan, as a user writes them."""

from __future__ import annotations

import pytest

from dq_export.core.network import Axis
from dq_export.deploy.backend import BackendError
from dq_export.deploy.tensorrt.profiles import MAX_BATCH, profiles
from dq_export.passes.sizes import Dims

INPUTS: dict[str, Dims] = {"hidden_states": (None, 4, 8, 8), "timestep": (1,), "class_labels": (None,)}


def test_shapes_are_read_for_the_inputs_that_change() -> None:
    ranges = profiles(INPUTS, ("", "hidden_states:4x4x8x8,class_labels:4", f"class_labels:{MAX_BATCH}"))
    assert ranges == {
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


LENGTH = Axis("length", 300, 512)
TEXT: dict[str, Dims] = {
    "sample": (None, 4, Axis("height", 64, 256, 2), Axis("width", 32, 128, 2)),
    "text": (None, LENGTH, 8),
    "mask": (None, LENGTH),
}


def test_a_plan_is_for_the_pictures_sizes_where_no_shape_is_named() -> None:
    actual = profiles(TEXT, ("", "", ""))
    assert actual["sample"] == ((1, 4, 64, 32), (2, 4, 64, 32), (16, 4, 64, 32))
    assert actual["text"] == ((1, 300, 8), (2, 300, 8), (16, 300, 8))
    wide = profiles(TEXT, ("sample:1x4x16x16", "", "sample:4x4x128x128"))["sample"]
    assert wide == ((1, 4, 16, 16), (2, 4, 64, 32), (4, 4, 128, 128))


def test_a_part_of_an_axis_has_its_part_of_the_size() -> None:
    half = Axis("height", 64, 256, 2, divisor=2)
    inputs: dict[str, Dims] = {"sample": TEXT["sample"], "residual": (None, 8, half)}
    assert profiles(inputs, ("", "", ""))["residual"] == ((1, 8, 32), (2, 8, 32), (16, 8, 32))
    assert profiles(inputs, ("", "sample:2x4x96x32,residual:2x8x48", ""))["residual"][1] == (2, 8, 48)
    with pytest.raises(BackendError, match="'residual': its height goes from 64 over 64 to 64, and that of 'sample' from 96"):
        profiles(inputs, ("", "sample:2x4x96x32", ""))
    with pytest.raises(BackendError, match="'residual' has a height of 129; the graph takes a height/2 up to 128"):
        profiles(inputs, ("", "residual:2x8x129", ""))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("sample:2x4x65x32", "'sample' has a height of 65; the graph takes a height up to 256 in steps of 2"),
        ("sample:2x4x64x130", "'sample' has a width of 130; the graph takes a width up to 128 in steps of 2"),
        ("text:2x0x8", "'text' has a length of 0; the graph takes a length up to 512"),
        ("text=1", "expected name:AxBxC, for example sample:2x4x64x32,text:2x300x8,mask:2x300"),
        ("text:2x77x8", "'mask': its length goes from 300 over 300 to 300, and that of 'text' from 77 over 77 to 77"),
    ],
)
def test_a_size_that_the_graph_does_not_take_is_refused(shape: str, message: str) -> None:
    with pytest.raises(BackendError) as error:
        profiles(TEXT, ("", shape, ""))
    assert message in str(error.value)


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
    with pytest.raises(BackendError, match=message) as error:
        profiles(INPUTS, ("", shape, ""))
    assert len(str(error.value)) < 300


def test_shapes_default_to_batches_of_1_2_and_16() -> None:
    actual = profiles(INPUTS, ("", "", ""))
    assert actual == {
        "hidden_states": ((1, 4, 8, 8), (2, 4, 8, 8), (16, 4, 8, 8)),
        "class_labels": ((1,), (2,), (16,)),
    }


def test_shapes_in_trtexecs_syntax() -> None:
    flags = ("", "hidden_states:8x4x8x8,class_labels:8", "hidden_states:32x4x8x8,class_labels:32")
    assert profiles(INPUTS, flags)["hidden_states"] == ((1, 4, 8, 8), (8, 4, 8, 8), (32, 4, 8, 8))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("hidden_states=2", "--opt-shapes 'hidden_states=2': expected name:AxBxC"),
        ("latents:2x4x8x8", "the graph has no input 'latents'; it has hidden_states, timestep, class_labels"),
        ("hidden_states:2x4x16x16", "'hidden_states' is Bx4x8x8, found 2x4x16x16"),
    ],
)
def test_shapes_that_do_not_fit_are_errors(shape: str, message: str) -> None:
    with pytest.raises(BackendError) as error:
        profiles(INPUTS, ("", shape, ""))
    assert message in str(error.value)


def test_shapes_must_grow() -> None:
    with pytest.raises(BackendError, match="'class_labels': the shapes must grow"):
        profiles(INPUTS, ("class_labels:4", "class_labels:2", ""))
