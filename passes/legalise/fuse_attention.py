"""Fuse scaled dot-product attention into one operator, Attention or MultiHeadAttention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from ..base import GraphPass, PassReport, initializer, like, redirect, stored
from ..match import only_user, upstream
from ..sizes import read_sizes, size_of, sizes_of

OPSET, IR_VERSION = 23, 11
HEADS = (0, 2, 1, 3)
ORT_DOMAIN = "com.microsoft"
MANY_SCORES = 1024 * 1024
"""Scores of a head from which MultiHeadAttention is faster: they no longer fit into a core's cache."""


@dataclass(frozen=True, kw_only=True)
class FuseAttention(GraphPass):
    """Reshape, Transpose, Mul, MatMul, Add, Softmax, MatMul, Transpose, Reshape  ->  Attention(q, k, v, mask).

    q, k and v are [B, tokens, width]; the Add of a mask is optional. ONNX Runtime's kernel makes no transposed copies. It needs
    the mask as [B, 1, queries, keys], with a row for each query. Blocks with the same mask share it. The graph's opset becomes
    at least 23, the first with this operator.

    Attention keeps all scores, [B, heads, queries, keys], in memory. Without a mask the operator is ONNX Runtime's own
    MultiHeadAttention, which keeps a tile of them, if a head has many in the pictures' size.

    It does not act where
        1. another operation than the Add of a mask [B, 1, 1, keys], or of its copies for each head, is between scores and
           Softmax,
        2. query, key and value are not heads split from [B, tokens, width] as in torch's decomposition,
        3. the result is not merged back to [B, tokens, width].

    Exactness: reorders float operations; the scores are scaled once, instead of query and key each by the root of the scale.
    Source: ONNX Attention-23; com.microsoft MultiHeadAttention-1. Measured on two cores with heads of 72 channels: with 1,024
        tokens MultiHeadAttention takes 0.8 of Attention's time, with 256 tokens 1.3.
    """

    name: ClassVar[str] = "fuse_attention"

    def rewrite(self, model: ir.Model) -> PassReport:
        changed, skipped = [], []
        masks: dict[object, ir.Value] = {}
        sizes = sizes_of(read_sizes(model))
        for softmax in [node for node in model.graph if node.op_type == "Softmax"]:
            pattern = _attention(softmax)
            if isinstance(pattern, str):
                skipped.append(f"'{softmax.name}': {pattern}")
                continue
            _fuse(model.graph, pattern, masks, has_many_scores=_scores(pattern, sizes) >= MANY_SCORES)
            changed.append(f"'{softmax.name}'")
        if changed:
            model.opset_imports[""] = max(model.opset_imports.get("", 0), OPSET)
            model.ir_version = max(model.ir_version or 0, IR_VERSION)
        if any(node.domain == ORT_DOMAIN for node in model.graph):
            model.opset_imports[ORT_DOMAIN] = 1
        return PassReport(name=self.name, changed=tuple(changed), skipped=tuple(skipped))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Pattern:
    query: ir.Value
    key: ir.Value
    value: ir.Value
    heads: int
    scale: float
    last: ir.Node
    mask: ir.Value | None


def _attention(softmax: ir.Node) -> _Pattern | str:
    """Match attention around a Softmax; return the reason if it does not match."""
    biased = upstream(softmax.inputs[0], "Add")
    scores = upstream(biased.inputs[0] if biased is not None else softmax.inputs[0], "MatMul")
    mask = _one_head(biased.inputs[1]) if biased is not None else None
    if scores is None or (biased is not None and mask is None):
        return "its input is not a product of query and key, with or without a mask of keys (case 1)"
    product = only_user(softmax.outputs[0])
    merged = only_user(product.outputs[0]) if product is not None and product.op_type == "MatMul" else None
    last = only_user(merged.outputs[0]) if merged is not None and _permutes(merged, HEADS) else None
    if product is None or last is None or last.op_type != "Reshape":
        return "its result is not merged back from heads (case 3)"
    query, scale = unscaled(scores.inputs[0])
    key, key_scale = unscaled(scores.inputs[1])
    sources = (split_source(query), split_source(untransposed(key)), split_source(product.inputs[1]))
    heads = query.shape[1] if query is not None and query.shape is not None and len(query.shape) == 4 else None
    if any(source is None for source in sources) or not isinstance(heads, int):
        return "query, key or value is not split into heads (case 2)"
    first, second, third = (source for source in sources if source is not None)
    return _Pattern(query=first, key=second, value=third, heads=heads, scale=scale * key_scale, last=last, mask=mask)


def _fuse(graph: ir.Graph, pattern: _Pattern, masks: dict[object, ir.Value], *, has_many_scores: bool) -> None:
    operands: list[ir.Value | None] = [pattern.query, pattern.key, pattern.value]
    if pattern.mask is None and has_many_scores:
        sizes = {"num_heads": pattern.heads}
        node = ir.node("MultiHeadAttention", operands, attributes={**sizes, "scale": pattern.scale}, domain=ORT_DOMAIN)
    else:
        sizes = {"q_num_heads": pattern.heads, "kv_num_heads": pattern.heads}
        operands += _for_each_query(graph, pattern, masks)
        node = ir.node("Attention", operands, attributes={**sizes, "scale": pattern.scale})
    result = pattern.last.outputs[0]
    like(node.outputs[0], result)
    graph.insert_before(pattern.last, node)
    redirect(result, node.outputs[0])


def _scores(pattern: _Pattern, sizes: Mapping[str, int]) -> int:
    """Return the number of scores of a head in the pictures' size; an unknown number of tokens counts as one."""
    return _tokens(pattern.query, sizes) * _tokens(pattern.key, sizes)


def _tokens(value: ir.Value, sizes: Mapping[str, int]) -> int:
    """Return the number of tokens in [B, tokens, width]; 1 if it is unknown."""
    tokens = value.shape[1] if value.shape is not None else 1
    return size_of(str(tokens), sizes) if isinstance(tokens, ir.SymbolicDim) else tokens


def _one_head(mask: ir.Value | None) -> ir.Value | None:
    """Return the mask [B, 1, 1, keys] before diffusers repeats it for each head; None if the mask has another form."""
    shape = _shape(mask)
    source, before = mask, upstream(mask, "Reshape")
    while before is not None:
        source = before.inputs[0]
        before = upstream(source, "Reshape")
    repeat = upstream(source, "Expand")
    if repeat is not None and len(shape) == 4 and _shape(source) == shape:
        mask = repeat.inputs[0]
    small = _shape(mask)
    return mask if len(small) == 4 and small[1:3] == (1, 1) and small[::3] == shape[::3] else None


def _for_each_query(graph: ir.Graph, pattern: _Pattern, masks: dict[object, ir.Value]) -> list[ir.Value]:
    """Expand the mask [B, 1, 1, keys] to [B, 1, queries, keys], once for each number of queries; empty without a mask."""
    if pattern.mask is None:
        return []
    queries = _shape(pattern.query)[1:2]
    key = (pattern.mask, *(queries or (pattern.query,)))
    if key not in masks:
        name = f"{pattern.mask.name}.{len(masks)}"
        one = initializer(graph, f"{name}.one", np.ones(1, dtype=np.int64))
        size = ir.node("Shape", [pattern.query], attributes={"start": 1, "end": 2}, name=f"{name}.queries")
        sizes = ir.node("Concat", [one, one, size.outputs[0], one], attributes={"axis": 0}, name=f"{name}.sizes")
        expand = ir.node("Expand", [pattern.mask, sizes.outputs[0]], name=f"{name}.rows")
        graph.insert_before(pattern.last, [size, sizes, expand])
        masks[key] = expand.outputs[0]
    return [masks[key]]


def _shape(value: ir.Value | None) -> tuple[object, ...]:
    """Return the sizes of a value, symbolic names included; empty if one is unknown."""
    sizes = tuple(value.shape) if value is not None and value.shape is not None else ()
    return () if any(isinstance(size, ir.SymbolicDim) and size.value is None for size in sizes) else sizes


def unscaled(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """Return the input and the factor of a scalar Mul; without one the value itself and 1."""
    node = upstream(value, "Mul")
    factor = stored(node.inputs[1]) if node is not None else None
    if node is None or factor is None or factor.size != 1:
        return value, 1.0
    return node.inputs[0], float(factor.numpy().reshape(()))


def untransposed(key: ir.Value | None) -> ir.Value | None:
    """Return the value before the transpose to [B, heads, head, tokens], which torch does at rank 3."""
    outer = upstream(key, "Reshape")
    middle = upstream(outer.inputs[0], "Transpose") if outer is not None else None
    inner = upstream(middle.inputs[0], "Reshape") if middle is not None and _permutes(middle, (0, 2, 1)) else None
    return inner.inputs[0] if inner is not None else None


def split_source(value: ir.Value | None) -> ir.Value | None:
    """Return the [B, tokens, width] before Reshape and Transpose to [B, heads, tokens, head]; None without them."""
    transpose = upstream(value, "Transpose")
    reshape = upstream(transpose.inputs[0], "Reshape") if transpose is not None and _permutes(transpose, HEADS) else None
    source = reshape.inputs[0] if reshape is not None else None
    return source if source is not None and source.shape is not None and len(source.shape) == 3 else None


def _permutes(node: ir.Node, order: tuple[int, ...]) -> bool:
    return node.op_type == "Transpose" and tuple(node.attributes.get_ints("perm", ())) == order
