"""The ONNX graph of a torch network: its inputs by name, equal blocks traced once."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from dq_export.core.network import BATCH, Axis, Input, arguments, axes_of, output_name
from dq_export.passes.sizes import name_sizes

from .float_graph import trace
from .repeat_block import repeat_block

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

TRACED = 3
"""Blocks of a run; see `repeat_block`."""
NESTED = "transformer_blocks"
"""What diffusers calls the lists inside a UNet's levels, whose blocks follow each other."""


def export_graph(model: Any, inputs: Sequence[Input], part: str, blocks: Sequence[str], *, shared: bool) -> ir.Model:
    """Trace a network: only `TRACED` blocks of each run of equal blocks if the graph confirms that they are equal, else all.

    Args:
        model: a diffusers network, which takes `inputs` by name.
        part: the prefix of the network's modules and parameters in its graph; a dot follows it.
        blocks: names of its lists of blocks, which its `forward` calls one after the other. Lists called `NESTED` are that, too.
        shared: the timestep has one row for all samples.
    """
    nested = [name for name, _ in model.named_modules() if name.endswith(f".{NESTED}")]
    listed = {name: model.get_submodule(name) for name in (*blocks, *nested)}
    runs = [(name, run) for name, modules in listed.items() for run in runs_of(modules) if len(run) > TRACED]
    if not runs:
        return _traced(model, inputs, part, shared)
    state = {f"{part}.{name}": value for name, value in model.state_dict().items()}
    try:
        for name, modules in listed.items():
            repeated = {index for other, run in runs if other == name for index in run[TRACED:]}
            _replace(model, name, _without(modules, repeated))
        graph = _traced(model, inputs, part, shared)
    finally:
        for name, modules in listed.items():
            _replace(model, name, modules)
    if all(repeat_block(graph, f"{part}.{name}", run, state) for name, run in runs):
        return graph
    return _traced(model, inputs, part, shared)


def _replace(model: Any, name: str, modules: Any) -> None:
    """Put another list of blocks in the place of a list of the network."""
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, modules)


def runs_of(blocks: Iterable[Any]) -> list[range]:
    """The longest runs of consecutive blocks that have the same modules and shapes, in order."""
    keys = [(repr(block), [(name, value.shape) for name, value in block.named_parameters()]) for block in blocks]
    runs: list[range] = []
    for index, key in enumerate(keys):
        if index and key == keys[index - 1]:
            runs[-1] = range(runs[-1].start, index + 1)
        else:
            runs.append(range(index, index + 1))
    return runs


def _without(blocks: Iterable[Any], left_out: Collection[int]) -> Any:
    """A list of blocks without some; the others keep their names."""
    import torch

    result = torch.nn.ModuleList()
    for index, block in enumerate(blocks):
        if index not in left_out:
            result.add_module(str(index), block)
    return result


def _traced(model: Any, inputs: Sequence[Input], part: str, shared: bool) -> ir.Model:
    import torch

    units = {axis.name: _unit(axis) for axis in (BATCH, *axes_of(inputs))}
    example: list[torch.Tensor] = []
    dynamic: list[dict[int, Any]] = []
    for item in inputs:
        one = shared and item.role == "timestep"
        example.append(torch.zeros([1] if one else _sizes(item), dtype=getattr(torch, item.dtype)))
        changing = {i: _dim(axis, units[axis.name]) for i, axis in enumerate(item.shape) if isinstance(axis, Axis)}
        dynamic.append({} if one else changing)
    names = [item.name for item in inputs]
    graph = trace(_named_wrapper(model, inputs, part), tuple(example), names, [output_name(names)], dynamic)
    name_sizes(graph, axes_of(inputs))
    return graph


def _sizes(item: Input) -> list[int]:
    """The size in an example. A size that may change is not 1, because torch.export would treat 1 as fixed."""
    return [max(size.size, 2 * size.multiple) // size.divisor if isinstance(size, Axis) else size for size in item.shape]


def _unit(axis: Axis) -> Any:
    """torch.export's dimension of an axis in steps."""
    import torch

    return torch.export.Dim(axis.unit, min=1, max=axis.limit // axis.multiple)


def _dim(axis: Axis, unit: Any) -> Any:
    """torch.export's dimension of an axis, from that in steps."""
    steps = axis.multiple // axis.divisor
    return unit if steps == 1 else steps * unit


def _named_wrapper(model: Any, inputs: Sequence[Input], part: str) -> Any:
    """The network with its named inputs as positional arguments; its module is named `part`."""
    import torch

    class Wrapper(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.add_module(part, model)

        def forward(self, *values: torch.Tensor) -> torch.Tensor:
            feed = {item.name: value for item, value in zip(inputs, values, strict=True)}
            output: torch.Tensor = getattr(self, part)(**arguments(inputs, feed), return_dict=False)[0]
            return output

    return Wrapper().eval()
