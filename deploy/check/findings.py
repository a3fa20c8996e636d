"""A verdict for every quantized operator of a graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from .canonical import canonical
from .elsewhere import MULTIPLY, alone, around
from .gemm import Gemm, GemmRule, Judgement, Verdict, gemm_of, readers
from .integer_operators import QUANTIZE, is_quantized, judged, multiplies
from .operand import VIEWS, operand_of
from .rules_cuda import CUDA
from .rules_nvidia import TRT, TRT_RTX
from .rules_ort import ORT
from .structure import unbuildable

Target = Literal["trt", "trt-rtx", "ort", "ort-cuda"]
RULES: dict[str, tuple[GemmRule, ...]] = {"trt": TRT, "trt-rtx": TRT_RTX, "ort": ORT, "ort-cuda": CUDA}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The verdict on one quantized operator.

    Args:
        node: its name.
        verdict: `rejected`: the target refuses it, or computes other numbers than ONNX specifies; `float`: it runs on floats;
            `low precision`: the kernel multiplies the codes, or unpacks them inside; `unknown`: no rule covers the operator.
        rule: the reason; empty if nothing is wrong.
        fix: what to change.
        weight_only: whether only the weight is quantized, so that float is probably intended.
        gemm: whether it multiplies matrices; other operators may stay in float.
    """

    node: str
    verdict: Verdict
    rule: str = ""
    fix: str = ""
    weight_only: bool = False
    gemm: bool = True

    @property
    def failed(self) -> bool:
        """Whether the user should look at it."""
        return self.verdict in ("rejected", "unknown") or (self.verdict == "float" and self.gemm and not self.weight_only)


def check(model: ir.Model, target: Target, compute: Sequence[str] = ()) -> list[Finding]:
    """A verdict for every GEMM with a quantized operand, every other operator after a DequantizeLinear, and every operator
    that works on codes by itself, in the main graph, in bodies of If, Loop and Scan, and in functions.

    The rules for `trt-rtx` come from builds of TensorRT-RTX 1.7; those for `trt` add what NVIDIA's documentation forbids
    (scales that are not constants). `ort` is ONNX Runtime 1.31's CPU provider on x86-64, and its rules come from its
    optimised graphs; `ort-cuda` is its CUDA provider. No weight is read.

    Args:
        compute: for trt-rtx, the targets: sm75 …

    Raises:
        CanonicalError: nodes or functions depend on each other in a circle.
    """
    copy = canonical(model)
    opset = copy.graph.opset_imports.get("", 21)
    nodes = [node for graph in copy.graphs() for node in graph]
    findings: dict[ir.Node, Finding] = {}
    covered: set[ir.Node] = set()
    for node in nodes:
        gemm = gemm_of(node, compute, opset)
        if gemm is not None:
            covered.update(item for operand in (*gemm.operands, *filter(None, (gemm.bias,))) for item in operand.nodes)
            findings[node] = _finding(node, _judge(gemm, target), weight_only=gemm.weight_only)
        elif is_quantized(node, target):
            covered.update(_neighbours(node))
            findings[node] = _finding(node, judged(node, target), gemm=multiplies(node))
    for node in nodes:
        fresh = {item for value in node.inputs if (operand := operand_of(value)) is not None for item in operand.nodes} - covered
        if fresh and node not in findings and node.op_type not in QUANTIZE and not _passes_on(node):
            covered |= fresh
            findings[node] = _finding(node, around(node, target, compute, opset), gemm=node.op_type in MULTIPLY)
    for node in nodes:
        if node.op_type in QUANTIZE and node not in covered and node not in findings:
            findings[node] = _finding(node, alone(node, target, compute, opset), gemm=False)
    ordered = [findings[node] for node in nodes if node in findings]
    names = unbuildable(model, target) if ordered else ()
    return [
        *(Finding(node=name, verdict=verdict, rule=rule, fix=fix, gemm=False) for name, (verdict, rule, fix) in names),
        *ordered,
    ]


def _judge(gemm: Gemm, target: Target) -> Judgement:
    judgement = next((item for rule in RULES[target] if (item := rule(gemm)) is not None), None)
    return judgement or ("low precision", "", "")


def _finding(node: ir.Node, judgement: Judgement, *, gemm: bool = True, weight_only: bool = False) -> Finding:
    verdict, rule, fix = judgement
    name = str(node.name or node.outputs[0].name or node.op_type)
    return Finding(node=name, verdict=verdict, rule=rule, fix=fix, weight_only=weight_only, gemm=gemm)


def _neighbours(node: ir.Node) -> Iterator[ir.Node]:
    """The QuantizeLinears and DequantizeLinears before and after an operator on codes."""
    makers = [value.producer() for value in node.inputs if value is not None]
    yield from (item for item in (*makers, *readers(node)) if item is not None and item.op_type in QUANTIZE)


def _passes_on(node: ir.Node) -> bool:
    """Whether a view only passes on a value, which is judged at its readers."""
    return node.op_type in VIEWS and any(reader.op_type not in QUANTIZE for reader in readers(node))
