"""The exporter's traps: sizes that are multiples, a squeeze of an axis that is longer than 1, tables with an axis before them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from conftest import run_onnx

from dq_export.core.network import BATCH, Axis, Input
from dq_export.families import torch_export

PATCH, WIDTH, BLOCKS = 2, 32, 5
HEIGHT, ACROSS = Axis("height", 6, 24, PATCH), Axis("width", PATCH, 24, PATCH)  # one patch wide
INPUTS = (
    Input(name="states", role="state", dtype="float32", shape=(BATCH, 3, HEIGHT, ACROSS)),
    Input(name="timestep", role="timestep", dtype="float32"),
)


class Block(torch.nn.Module):
    """Modulated as a block of PixArt: by a table that all samples share, and a part of one modulation of the network's."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc = torch.nn.Parameter(torch.randn(2, WIDTH)), torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, modulation: torch.Tensor) -> torch.Tensor:
        shift, scale = (self.table[None] + modulation.reshape(x.shape[0], 2, -1)).chunk(2, dim=1)
        result: torch.Tensor = x + self.fc(x * (1 + scale) + shift)
        return result


class Network(torch.nn.Module):
    """Patches, blocks, and patches laid out as a picture again."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = torch.nn.Conv2d(3, WIDTH, PATCH, PATCH), torch.nn.Linear(WIDTH, 3 * PATCH**2)
        self.modulation = torch.nn.Linear(1, 2 * WIDTH)
        self.layers = torch.nn.ModuleList([Block() for _ in range(BLOCKS)])

    def forward(self, states: torch.Tensor, timestep: torch.Tensor, return_dict: bool = True) -> tuple[torch.Tensor]:
        height, width = (size // PATCH for size in states.shape[-2:])
        x = self.embed(states).flatten(2).transpose(1, 2)
        modulation = self.modulation(timestep[:, None])
        for layer in self.layers:
            x = layer(x, modulation)
        patches = self.out(x).squeeze(1).reshape(-1, height, width, PATCH, PATCH, 3)
        return (torch.einsum("nhwpqc->nchpwq", patches).reshape(-1, 3, height * PATCH, width * PATCH),)


class Level(torch.nn.Module):
    """A level of a UNet: its blocks stand in a list of their own."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.transformer_blocks = torch.nn.ModuleList([Block() for _ in range(blocks)])

    def forward(self, x: torch.Tensor, modulation: torch.Tensor) -> torch.Tensor:
        for block in self.transformer_blocks:
            x = block(x, modulation)
        return x


class Levels(Network):
    """The same network with blocks in three levels, one of which is too short for a run."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([Level(BLOCKS), Level(1), Level(BLOCKS + 1)])


def export(network: Network, *blocks: str) -> tuple[Network, ir.Model, list[int]]:
    """Return the network, its graph, and the number of blocks in each trace."""
    traced: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        whole = torch_export._traced

        def counted(model: Any, *arguments: Any) -> ir.Model:
            traced.append(sum(isinstance(module, Block) for module in model.modules()))
            return whole(model, *arguments)

        patch.setattr(torch_export, "_traced", counted)
        graph = torch_export.export_graph(network.eval(), INPUTS, "transformer", blocks, shared=False)
    graph.ir_version = 10
    return network, graph, traced


@pytest.fixture(scope="module")
def exported() -> tuple[Network, ir.Model, list[int]]:
    torch.manual_seed(0)
    return export(Network(), "layers")


def test_sizes_have_their_axes_names(exported: Any) -> None:
    _, graph, _ = exported
    for value in (graph.graph.inputs[0], graph.graph.outputs[0]):
        assert str(value.shape) == "[batch,3,height,width]"
    assert str(next(node for node in graph.graph if node.op_type == "MatMul").inputs[0].shape).startswith("[batch,height_by_2*wi")


@pytest.mark.parametrize("shape", [(1, 3, 6, 6), (3, 3, 2, 2), (2, 3, 24, 4)])
def test_the_graph_takes_every_size_that_the_axes_allow(shape: tuple[int, ...], exported: Any) -> None:
    network, graph, _ = exported
    rng = np.random.default_rng(0)
    feed = {"states": rng.normal(size=shape).astype(np.float32), "timestep": rng.normal(size=shape[:1]).astype(np.float32)}
    with torch.no_grad():
        exact = network(**{name: torch.from_numpy(value) for name, value in feed.items()})[0].numpy()
    np.testing.assert_allclose(run_onnx(graph, feed), exact, rtol=0, atol=1e-5 * np.abs(exact).max())


def test_tables_with_an_axis_before_them_are_their_blocks_parameters(exported: Any) -> None:
    network, graph, traced = exported
    assert traced == [3], "three blocks stand for all"
    for index, layer in enumerate(network.layers):
        stored = graph.graph.initializers[f"transformer.layers.{index}.table"].const_value.numpy()
        np.testing.assert_array_equal(stored, layer.table.detach().numpy()[None])


def test_blocks_inside_the_levels_of_a_network_stand_for_their_runs() -> None:
    torch.manual_seed(0)
    network, graph, traced = export(Levels())
    assert traced == [3 + 1 + 3], "three blocks of each run stand for all"
    assert [len(level.transformer_blocks) for level in network.layers] == [BLOCKS, 1, BLOCKS + 1], "the network is as before"
    rng = np.random.default_rng(0)
    feed = {"states": rng.normal(size=(2, 3, 8, 8)).astype(np.float32), "timestep": rng.normal(size=2).astype(np.float32)}
    with torch.no_grad():
        exact = network(**{name: torch.from_numpy(value) for name, value in feed.items()})[0].numpy()
    np.testing.assert_allclose(run_onnx(graph, feed), exact, rtol=0, atol=1e-5 * np.abs(exact).max())
    assert sum(node.op_type == "MatMul" for node in graph.graph) == 2 * BLOCKS + 2 + 1
