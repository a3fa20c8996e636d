"""A plan as a graph that ONNX Runtime loads: one EPContext operator, which names the plan's file.

Source: ONNX Runtime's design of EP context; both of its TensorRT providers take a plan that was built elsewhere.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from dq_export.passes.legalise.fuse_attention import ORT_DOMAIN

CONTEXT = "context.onnx"


def write_context(model: Path, plan: Path, provider: str) -> None:
    """Write `context.onnx` beside a plan, with the inputs and outputs of the graph that the plan was built from.

    Args:
        provider: the name of the execution provider that loads it.
    """
    graph = ir.load(model).graph
    inputs = [_copied(value) for value in graph.inputs]
    outputs = [_copied(value) for value in graph.outputs]
    values: dict[str, str | int] = {"main_context": 1, "embed_mode": 0, "ep_cache_context": plan.name, "source": provider}
    node = ir.node("EPContext", inputs, values, domain=ORT_DOMAIN, name="plan", outputs=outputs)
    context = ir.Graph(inputs, outputs, nodes=[node], name="context", opset_imports={"": 21, ORT_DOMAIN: 1})
    ir.save(ir.Model(context, ir_version=10), plan.with_name(CONTEXT))


def _copied(value: ir.Value) -> ir.Value:
    return ir.Value(name=value.name, type=value.type, shape=value.shape)
