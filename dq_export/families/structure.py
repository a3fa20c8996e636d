"""The structure of a network, from its graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from dq_export.core.network import Input
from dq_export.passes.analysis.sites import Structure, structure

if TYPE_CHECKING:
    import onnx_ir as ir

STRUCTURES: dict[tuple[str, ...], Structure] = {}
"""Cache by architecture, configuration and inputs, which determine the graph except for its weights."""


def structure_of(model: Any, inputs: Sequence[Input], graph: Callable[[], ir.Model]) -> Structure:
    """The structure of a diffusers network. Of equal networks in a process, only the graph of the first is traced.

    Args:
        inputs: the inputs of the network.
        graph: returns its float graph, which is not changed.
    """
    options = {name: value for name, value in model.config.items() if not name.startswith("_")}  # diffusers' notes
    key = (type(model).__name__, str(options), *(item.name for item in inputs))
    if key not in STRUCTURES:
        STRUCTURES[key] = structure(graph(), [item.name for item in inputs if item.role in ("condition", "setting")])
    return STRUCTURES[key]
