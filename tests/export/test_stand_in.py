"""A network of arrays answers a diffusers pipeline as its denoiser does, or refuses the call in one line."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel

from dq_export.core.network import BATCH, Axis, Feed, Float32, Input
from dq_export.families.dit import DIT
from dq_export.families.stand_in import StandIn

CONFIG = SimpleNamespace(in_channels=2, sample_size=4, num_embeds_ada_norm=10)
LENGTH = Axis("length", 5, 7)
TEXT = (
    Input(name="hidden_states", role="state", dtype="float32", shape=(BATCH, 2, Axis("height", 4), Axis("width", 4))),
    Input(name="timestep", role="timestep", dtype="float32"),
    Input(name="encoder_hidden_states", role="condition", dtype="float32", shape=(BATCH, LENGTH, 8)),
    Input(name="encoder_attention_mask", role="condition", dtype="bool", shape=(BATCH, LENGTH)),
    Input(name="resolution", role="condition", dtype="float32", shape=(BATCH, 2), within="added_cond_kwargs"),
)


class Double:
    """A network that returns twice its state and records its inputs."""

    def __init__(self) -> None:
        self.feeds: list[Feed] = []

    def __call__(self, feed: Feed) -> Float32:
        self.feeds.append(feed)
        return 2 * feed["hidden_states"]


def dit(network: Any, *, shared: bool = True) -> StandIn:
    return StandIn(network, DIT.inputs(SimpleNamespace(config=CONFIG)), CONFIG, DiTTransformer2DModel, shared)


def pixart(network: Any) -> StandIn:
    return StandIn(network, TEXT, CONFIG, PixArtTransformer2DModel, shared=True)


def call(rows: int = 2, **changes: Any) -> dict[str, Any]:
    """A call of a DiT's `forward`."""
    arguments = {
        "hidden_states": torch.randn(rows, 2, 4, 4),
        "timestep": torch.full((rows,), 500),
        "class_labels": torch.arange(rows),
    }
    return {name: value for name, value in {**arguments, **changes}.items() if value is not ...}


def text_call(**changes: Any) -> dict[str, Any]:
    """A call of a PixArt's `forward`, as its pipelines make it."""
    return {
        "encoder_hidden_states": torch.randn(2, 6, 8),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0, 0]] * 2),
        "timestep": torch.full((2,), 999),
        "added_cond_kwargs": {"resolution": torch.full((2, 2), 64.0), "aspect_ratio": None},
        **changes,
    }


def test_the_first_argument_may_be_positional_and_the_result_is_diffusers_own() -> None:
    network = Double()
    arguments = call()
    state = arguments.pop("hidden_states")
    result = dit(network)(state, **arguments)
    assert type(result).__name__ == "Transformer2DModelOutput"
    assert torch.equal(result.sample, 2 * state)
    (tensor,) = dit(network)(state, **arguments, cross_attention_kwargs=None, return_dict=False)
    assert torch.equal(tensor, 2 * state)
    for feed in network.feeds:
        assert {name: (value.dtype, value.shape) for name, value in feed.items()} == {
            "hidden_states": (np.float32, (2, 2, 4, 4)), "timestep": (np.int64, (1,)), "class_labels": (np.int64, (2,))
        }  # fmt: skip


@pytest.mark.parametrize("timestep", [500, 500.0, torch.tensor(500), torch.tensor([500.0]), torch.full((3,), 500)])
@pytest.mark.parametrize("shared", [True, False])
def test_a_timestep_has_the_rows_that_the_network_takes(timestep: Any, shared: bool) -> None:
    network = Double()
    dit(network, shared=shared)(**call(3, timestep=timestep))
    np.testing.assert_array_equal(network.feeds[0]["timestep"], [500] * (1 if shared else 3), strict=False)
    assert network.feeds[0]["timestep"].dtype == np.int64


def test_samples_may_have_their_own_timesteps_where_the_network_takes_them() -> None:
    network, timesteps = Double(), torch.tensor([7, 500, 999])
    dit(network, shared=False)(**call(3, timestep=timesteps))
    assert network.feeds[0]["timestep"].tolist() == [7, 500, 999]
    with pytest.raises(
        ValueError, match=r"^different timesteps in one call \(7, 500, 999\), and the network takes one .*--timesteps per-"
    ):
        dit(network)(**call(3, timestep=timesteps))


def test_arguments_of_a_text_pipeline_reach_the_inputs() -> None:
    network = Double()
    pixart(network)(torch.randn(2, 2, 6, 8), **text_call(cross_attention_kwargs={}))
    (feed,) = network.feeds
    assert list(feed) == [item.name for item in TEXT]
    assert feed["encoder_attention_mask"].dtype == bool
    assert feed["encoder_attention_mask"].sum() == 6
    assert feed["resolution"].tolist() == [[64, 64]] * 2
    assert (feed["timestep"].dtype, feed["timestep"].tolist()) == (np.float32, [999])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_pipeline_of_another_precision_gets_its_own_back(dtype: Any) -> None:
    network, arguments = Double(), call()
    state = arguments.pop("hidden_states").to(dtype)
    result = dit(network)(state, **arguments).sample
    assert network.feeds[0]["hidden_states"].dtype == np.float32
    assert result.dtype == dtype
    assert torch.equal(result, 2 * state)


def test_a_pipeline_asks_it_for_type_device_and_configuration() -> None:
    stand_in = dit(Double())
    assert (stand_in.dtype, stand_in.device, stand_in.config.sample_size) == (torch.float32, torch.device("cpu"), 4)
    assert repr(stand_in) == "StandIn of DiTTransformer2DModel, to be set as pipe.transformer"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_labels": None}, "misses class_labels (it takes class_labels, hidden_states, timestep)"),
        ({"timestep": ...}, "this DiTTransformer2DModel misses timestep"),
        ({"encoder_hidden_states": torch.zeros(2, 3, 4)}, "got an unexpected keyword argument 'encoder_hidden_states'"),
        ({"cross_attention_kwargs": {"scale": 0.5}}, "this DiTTransformer2DModel does not take cross_attention_kwargs.scale"),
    ],
)  # fmt: skip
def test_a_pipeline_for_another_network_is_refused(changes: dict[str, Any], message: str) -> None:
    network = Double()
    with pytest.raises(TypeError) as error:
        dit(network)(**call(**changes))
    assert message in str(error.value)
    assert str(error.value).endswith("; use a pipeline that is for this network")
    assert network.feeds == []


def test_a_condition_that_this_network_was_not_trained_with_is_refused() -> None:
    added = {"resolution": torch.full((2, 2), 64.0), "aspect_ratio": torch.ones(2, 1)}
    with pytest.raises(
        TypeError, match=r"does not take added_cond_kwargs\.aspect_ratio \(it takes added_cond_kwargs\.resolution"
    ):
        pixart(Double())(torch.randn(2, 2, 6, 8), **text_call(added_cond_kwargs=added))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timestep": torch.full((2,), 857.7)},
         "the scheduler sends the fractional timestep 857.7, and the network takes integers"),
        ({"class_labels": torch.tensor([0.5, 1])}, "class_labels holds 0.5, and the network takes int64"),
        ({"class_labels": torch.tensor([3, 1000])}, "class_labels holds 1000, and the network takes 0 to 10"),
        ({"class_labels": torch.tensor([-1, 10])}, "class_labels holds -1, and the network takes 0 to 10"),
        ({"class_labels": torch.arange(3)}, "class_labels has shape [3], and the network takes [2]"),
        ({"timestep": torch.full((3,), 500)}, "timestep has shape [3], and the network takes [2] or [1]"),
        ({"hidden_states": torch.zeros(2, 2, 8, 8)},
         "hidden_states has shape [2, 2, 8, 8], and the network takes [batch up to 1024, 2, 4, 4]"),
        ({"hidden_states": torch.zeros(2, 2, 4)},
         "hidden_states has shape [2, 2, 4], and the network takes [batch up to 1024, 2, 4, 4]"),
    ],
)  # fmt: skip
def test_values_and_shapes_that_the_network_does_not_take_are_refused(changes: dict[str, Any], message: str) -> None:
    network = Double()
    with pytest.raises(ValueError) as error:  # noqa: PT011  # the whole message is compared
        dit(network)(**call(**changes))
    assert str(error.value) == message
    assert network.feeds == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_hidden_states": torch.zeros(2, 8, 8)},
         "encoder_hidden_states has shape [2, 8, 8], and the network takes [2, length up to 7, 8]"),
        ({"encoder_attention_mask": torch.ones(2, 5)}, "encoder_attention_mask has shape [2, 5], and the network takes [2, 6]"),
        ({"encoder_attention_mask": torch.full((2, 6), 0.5)}, "encoder_attention_mask holds 0.5, and the network takes bool"),
    ],
)  # fmt: skip
def test_inputs_of_one_dimension_agree_about_it(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011  # the whole message is compared
        pixart(Double())(torch.randn(2, 2, 6, 8), **text_call(**changes))
    assert str(error.value) == message
