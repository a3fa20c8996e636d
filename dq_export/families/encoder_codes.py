"""Linears and embeddings of a text encoder's graph with weights of 8 bits."""

from __future__ import annotations

import onnx_ir as ir

from dq_export.core.artifacts import CalibrationResult
from dq_export.core.grid import WeightGrid, cover
from dq_export.core.rule import Rule
from dq_export.core.scheme import scheme_of
from dq_export.passes.base import run_passes, stored
from dq_export.passes.canonical.fold_transpose import FoldTranspose
from dq_export.passes.canonical.quantize_embeddings import QuantizeEmbeddings
from dq_export.passes.canonical.quantize_weights import QuantizeWeights
from dq_export.passes.match import LinearNode, linears

BLOCK = 32
"""Inputs that share a scale. ONNX Runtime's kernel also rounds what the weight multiplies in these blocks, so that the few large
channels of a T5 cost only their own blocks digits: with 32 instead of 64, `pixart-digits` gains 2 dB for 6 % of the bytes."""


def quantize_encoder(model: ir.Model) -> None:
    """Linears that read all tokens of a prompt, and tables of embeddings: see `QuantizeWeights` and `QuantizeEmbeddings`.

    ONNX Runtime's CPU provider makes one MatMulNBits of both; before a Relu it unpacks the weight at every call instead.
    Normalizations and linears that read one row of a prompt stay float. The weights are computed when the graph is saved, a few
    at a time.

    Exactness: each weight moves by at most half its scale, which is the largest of its block / 127.

    Raises:
        GraphError: see `linears`.
    """
    run_passes(model, (FoldTranspose(),))
    layers = linears(model)
    assigned = {name: _rule(linear) for name, linear in layers.items()}
    scales = {
        name: cover(linear.weight(), rule.scheme).scale
        for (name, linear), rule in zip(layers.items(), assigned.values(), strict=True)
        if rule.scheme.weight
    }
    result = CalibrationResult(sites={}, weight_scale=scales, provenance={})
    run_passes(model, (QuantizeWeights(result=result, assigned=assigned), QuantizeEmbeddings(grids=_tables(model))))


def _tables(model: ir.Model) -> dict[str, WeightGrid]:
    """The grids of the tables whose rows blocks divide."""
    scheme, grids = scheme_of("weight-only", group_size=BLOCK), {}
    for node in model.graph:
        table = node.inputs[0] if node.op_type == "Gather" and not node.attributes.get_int("axis", 0) else None
        tensor = stored(table)
        if table is None or tensor is None or tensor.dtype != ir.DataType.FLOAT or len(tensor.shape) != 2:
            continue
        if int(tensor.shape.numpy()[1]) % BLOCK == 0:
            grids[str(table.name)] = cover(tensor.numpy(), scheme)
    return grids


def _rule(linear: LinearNode) -> Rule:
    if linear.gemm.op_type != "MatMul":
        return Rule(action="float", reason="reads one row of a prompt")
    width = linear.shape[1]
    return Rule(action="weight-only", group_size=None if width % BLOCK else BLOCK).fitted(width)
