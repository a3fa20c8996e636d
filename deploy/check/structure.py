"""What a runtime refuses about the graph around quantized operators."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import onnx_ir as ir

from .gemm import Judgement
from .integer_operators import QUANTIZE

TWICE: Judgement = (
    "rejected",
    "several QuantizeLinears or DequantizeLinears have this name; a function that is called twice also writes them",
    "a different name for each",
)
SHARED_NAME: Judgement = ("rejected", "several nodes of one graph have this name", "a different name for each")
SCAN: Judgement = ("rejected", "a Scan is not imported", "write its steps out, or a Loop")


def unbuildable(model: ir.Model, target: str) -> Iterator[tuple[str, Judgement]]:
    """(name, judgement) of names and Scans that a target refuses. The model's functions must not call themselves."""
    if target in ("ort", "ort-cuda"):
        for inner in model.graphs():
            repeated = Counter(node.name for node in inner if node.name)
            yield from ((name, SHARED_NAME) for name, count in repeated.items() if count > 1)
        return
    names: Counter[str] = Counter()
    for graph, times in _written_out(model):
        for node in graph.all_nodes() if times else ():
            if node.op_type in QUANTIZE and node.name:
                names[node.name] += times
            if node.op_type == "Scan" and any(inner.op_type in QUANTIZE for inner in _inside(node)):
                yield str(node.name or node.op_type), SCAN
    yield from ((name, TWICE) for name, count in names.items() if count > 1)


def _written_out(model: ir.Model) -> list[tuple[ir.Graph | ir.Function, int]]:
    """The main graph and the functions, each with the number of copies of its nodes in the expanded graph."""
    calls = {key: Counter(node.op_identifier() for node in item.all_nodes()) for key, item in model.functions.items()}
    main = Counter(node.op_identifier() for node in model.graph.all_nodes())
    times: dict[ir.OperatorIdentifier, int] = {}

    def count(key: ir.OperatorIdentifier) -> int:
        if key not in times:
            callers = (caller for caller, callees in calls.items() if callees[key])
            times[key] = main[key] + sum(calls[caller][key] * count(caller) for caller in callers)
        return times[key]

    return [(model.graph, 1), *((function, count(key)) for key, function in model.functions.items())]


def _inside(node: ir.Node) -> Iterator[ir.Node]:
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield from attribute.as_graph().all_nodes()
