"""The ONNX graph of a torch network: its inputs by name, equal blocks traced once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dq_export.core.network import BATCH, Axis, Input, arguments, axes_of, output_name
from dq_export.passes.sizes import name_sizes

from .float_graph import trace
from .repeat_block import repeat_block

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

ROOT = "transformer."
"""What precedes the network's names of modules and parameters in its graph."""
TRACED = 3
"""Blocks; see `repeat_block`."""


def export_graph(model: Any, inputs: Sequence[Input], blocks: str, *, shared: bool) -> ir.Model:
    """Trace a network, `TRACED` of its blocks where they are equal and all of them where they are not.

    Args:
        model: a diffusers network, which takes `inputs` by name.
        blocks: name of its list of blocks; empty: trace them all.
        shared: the timestep has one row for all samples.
    """
    listed = getattr(model, blocks) if blocks else ()
    if len(listed) <= TRACED:
        return _traced(model, inputs, shared)
    state = {f"{ROOT}{name}": value for name, value in model.state_dict().items()}
    try:
        setattr(model, blocks, listed[:TRACED])
        graph = _traced(model, inputs, shared)
    finally:
        setattr(model, blocks, listed)
    if repeat_block(graph, f"{ROOT}{blocks}", len(listed), state):
        return graph
    return _traced(model, inputs, shared)


def _traced(model: Any, inputs: Sequence[Input], shared: bool) -> ir.Model:
    import torch

    dims = {axis.name: _dim(axis) for axis in (BATCH, *axes_of(inputs))}
    example: list[torch.Tensor] = []
    dynamic: list[dict[int, Any]] = []
    for item in inputs:
        one = shared and item.role == "timestep"
        example.append(torch.zeros([1] if one else _sizes(item), dtype=getattr(torch, item.dtype)))
        changing = {i: dims[axis.name] for i, axis in enumerate(item.shape) if isinstance(axis, Axis)}
        dynamic.append({} if one else changing)
    names = [item.name for item in inputs]
    graph = trace(_named_wrapper(model, inputs), tuple(example), names, output_name(names), dynamic)
    name_sizes(graph, axes_of(inputs))
    return graph


def _sizes(item: Input) -> list[int]:
    """Of an example. One that may change is no 1, which torch.export would take for a fixed one."""
    return [max(size.size, 2 * size.multiple) if isinstance(size, Axis) else size for size in item.shape]


def _dim(axis: Axis) -> Any:
    """torch.export's dimension of an axis."""
    import torch

    if axis.multiple == 1:
        return torch.export.Dim(axis.name, min=1, max=axis.limit)
    return axis.multiple * torch.export.Dim(axis.unit, min=1, max=axis.limit // axis.multiple)


def _named_wrapper(model: Any, inputs: Sequence[Input]) -> Any:
    """The network with its named inputs as positional arguments; its module bears the name that `ROOT` is."""
    import torch

    class Wrapper(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.transformer = model

        def forward(self, *values: torch.Tensor) -> torch.Tensor:
            named = {item.name: value for item, value in zip(inputs, values, strict=True)}
            output: torch.Tensor = self.transformer(**arguments(inputs, named), return_dict=False)[0]
            return output

    return Wrapper().eval()
