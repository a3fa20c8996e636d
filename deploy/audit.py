"""Which GEMMs and convolutions of a built engine run on low-precision kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from dq_export.core.rule import Rule
from dq_export.core.scheme import Scheme
from dq_export.passes.match import linears, module_of
from dq_export.passes.names import origin
from dq_export.passes.sizes import read_sizes, size_of, sizes_of

from .check import Finding, check, read_model
from .check.integer_operators import PRODUCTS, UNPACKING
from .check.ort_unpacking import BYTES_IN_FLOAT

CONVOLUTIONS = ("Conv", "ConvInteger")
ATTENTION = ("Attention", "MultiHeadAttention")


class AuditError(Exception):
    """Too few of the quantized GEMMs run on low-precision kernels; the message names each one and the reason."""


@dataclass(frozen=True, kw_only=True)
class Gemm:
    """One GEMM or convolution of the graph. The bounds of the fields are checked when a report is read back.

    Args:
        name: module name, or the node's name if no weight is involved (attention).
        flops: multiply-adds times 2, for one sample.
        wanted: the recipe's action; `none` for GEMMs without a weight, `float` for convolutions without a rule.
        required: whether the recipe asks for a low-precision kernel.
        kernel: the operator that runs it after optimisation.
        integer: whether that operator has the recipe's precision: multiplies integers or 8-bit floats, or unpacks blocks.
        reason: why a required low-precision kernel is missing; empty otherwise.
    """

    name: str
    flops: int = field(metadata={"ge": 0, "le": 2**63})
    wanted: str
    required: bool
    kernel: str
    integer: bool
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Audit:
    """The kernels that an engine runs.

    Args:
        coverage: FLOPs in low-precision kernels / FLOPs for which the recipe requires low-precision kernels.
        integer_share: FLOPs in low-precision kernels / FLOPs of all GEMMs and convolutions of the network, including attention.
        gemms: all GEMMs and convolutions of the network.
    """

    coverage: float
    integer_share: float
    gemms: tuple[Gemm, ...]

    @staticmethod
    def of(gemms: Iterable[Gemm]) -> Audit:
        """The audit of these GEMMs."""
        items = tuple(gemms)
        return Audit(coverage=_low_share([g for g in items if g.required]), integer_share=_low_share(items), gemms=items)


def _low_share(gemms: Sequence[Gemm]) -> float:
    return sum(g.flops for g in gemms if g.integer) / max(sum(g.flops for g in gemms), 1)


def audit_graph(
    model: Path,
    assigned: Mapping[str, Rule],
    kernel_of: Callable[[str], tuple[str, bool]],
    why_float: Callable[[ir.Node, str], str],
) -> Audit:
    """Audit every GEMM and convolution of a graph.

    Args:
        model: the graph that the runtime got.
        assigned: the recipe's decisions.
        kernel_of: the runtime's operator for a node's name, and whether it multiplies integers.
        why_float: the reason why a node does not run on a required low-precision kernel, from the node and its operator.
    """
    graph = _load(model)
    sizes = _shapes(model, sizes_of(read_sizes(graph)))
    by_node = {node: module_of(node) for node in graph.graph if node.op_type in CONVOLUTIONS}
    by_node |= {linear.gemm: name for name, linear in linears(graph).items()}
    gemms = []
    for node in graph.graph:
        if node.op_type not in ("MatMul", "Gemm", *ATTENTION, *CONVOLUTIONS):
            continue
        module = by_node.get(node)
        wanted, required = _action(assigned.get(module)) if module else _action_of_attention(node)
        kernel, integer = kernel_of(str(node.name))
        reason = "" if integer or not required else why_float(node, kernel)
        gemms.append(
            Gemm(
                name=module or str(node.name),
                flops=_flops(node, sizes),
                wanted=wanted,
                required=required,
                kernel=kernel,
                integer=integer,
                reason=reason,
            )
        )
    present = set(by_node.values())
    missing = [(name, rule.action) for name, rule in assigned.items() if rule.scheme.low_precision and name not in present]
    gemms += [
        Gemm(name=name, flops=1, wanted=action, required=True, kernel="none", integer=False, reason="the graph has no such GEMM")
        for name, action in missing
    ]
    return Audit.of(gemms)


def audit_ort(model: Path, optimized: Path, assigned: Mapping[str, Rule]) -> Audit:
    """Audit an ONNX Runtime session by its optimised graph.

    Args:
        model: the graph that ONNX Runtime got.
        optimized: the optimised graph that the session wrote.
        assigned: the recipe's decisions.

    Raises:
        AuditError: one of the two files is damaged.
    """
    # ONNX Runtime names a float convolution on channels in blocks after its output.
    blocked = {f"{node.outputs[0].name}_nchwc": str(node.name) for node in _load(model).graph if node.op_type == "Conv"}
    kernels = {blocked.get(str(node.name), origin(str(node.name))): node.op_type for node in _load(optimized).graph}

    def kernel_of(name: str) -> tuple[str, bool]:
        kernel = kernels.get(name, "not found")
        scheme = assigned[name].scheme if name in assigned else Scheme()
        unpacks = kernel in UNPACKING and scheme.low_precision and scheme.graph_type is None
        return kernel, kernel in PRODUCTS - UNPACKING or unpacks

    @cache
    def findings() -> list[Finding]:
        return check(read_model(model), "ort")

    @cache
    def rules() -> dict[str, str]:
        return {item.node: f"{item.rule}; {item.fix}" for item in findings() if item.rule}

    @cache
    def unpacked() -> set[str]:  # by the version that the rules are of; an earlier one may take another kernel
        return {item.node for item in findings() if item.weight_only and item.verdict == "low precision"}

    def why_float(node: ir.Node, kernel: str) -> str:
        name = str(node.name)
        if kernel in UNPACKING or name in unpacked():
            scheme = assigned[name].scheme if name in assigned else Scheme()
            if scheme.graph_type is not None:
                return "the activation has no DequantizeLinear before it; quantize it, too"
            if scheme.weight is not None and scheme.weight.qtype.bits == 8:
                return f"{BYTES_IN_FLOAT}; install that or a later one"
        return rules().get(name) or f"ONNX Runtime chose {kernel}; no known rule says why"

    return audit_graph(model, assigned, kernel_of, why_float)


def _load(path: Path) -> ir.Model:
    from google.protobuf.message import DecodeError

    try:
        return ir.load(path)
    except (DecodeError, ir.serde.SerdeError, ValueError) as error:
        raise AuditError(f"{path}: not readable as ONNX; was it cut short? Export again") from error


def _action(rule: Rule | None) -> tuple[str, bool]:
    """The action, and whether it needs a low-precision kernel."""
    return (rule.action, rule.scheme.low_precision) if rule is not None else ("float", False)


def _action_of_attention(node: ir.Node) -> tuple[str, bool]:
    """Return the same for a matmul of attention. Either both operands are float8, or none."""
    producers = [value.producer() if value is not None else None for value in node.inputs[:2]]
    in_float8 = len(producers) == 2 and all(item is not None and item.op_type == "DequantizeLinear" for item in producers)
    return ("fp8", True) if in_float8 else ("none", False)


def _flops(node: ir.Node, sizes: Mapping[str, tuple[int, ...]]) -> int:
    left, result = (sizes.get(str(value.name), ()) for value in (node.inputs[0], node.outputs[0]) if value is not None)
    if not left or not result:
        return 0
    if node.op_type in ATTENTION:  # scores and their product with the values: query [B, tokens, width], key alike
        key = sizes.get(str(node.inputs[1].name), left) if node.inputs[1] is not None else left
        return 4 * int(np.prod(left)) * key[-2]
    if node.op_type in CONVOLUTIONS:
        kernel = node.inputs[1].shape if node.inputs[1] is not None else None
        return 2 * int(np.prod(result)) * int(np.prod(kernel.numpy()[1:])) if kernel is not None else 0
    return 2 * int(np.prod(result)) * left[-1]


def _shapes(model: Path, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Shapes of all values for a batch of one and the pictures' sizes, without reading any weight.

    Shape inference does not find all sizes that a graph computes from those of its inputs; the exporter's shapes are used
    for these.

    Args:
        sizes: sizes of the dimensions by name; others are 1.
    """
    import onnx

    proto = onnx.load(model, load_external_data=False)
    exported = list(proto.graph.value_info)
    del proto.graph.value_info[:]
    for value in (*proto.graph.input, *exported):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param:
                dimension.dim_value = size_of(dimension.dim_param, sizes)
    for output in proto.graph.output:
        output.type.tensor_type.ClearField("shape")
    shapes = _inferred(proto)
    computed = [value for value in exported if value.name not in shapes]
    if not computed:
        return shapes
    proto.graph.value_info.extend(computed)
    return _inferred(proto)


def _inferred(proto: Any) -> dict[str, tuple[int, ...]]:
    """All shapes that shape inference finds."""
    import onnx

    inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    shapes = {}
    for value in (*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output):
        kind = value.type.tensor_type
        shape = [d.dim_value for d in kind.shape.dim]
        if kind.HasField("shape") and all(shape):  # without the field even the number of dimensions is unknown
            shapes[value.name] = tuple(shape)
    return shapes
