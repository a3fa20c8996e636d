"""A matrix product or convolution with quantized operands, in the form that the rules use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from .operand import Operand, attribute, operand_of, shape_of

GEMMS = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum"})
CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})
Verdict = Literal["rejected", "float", "low precision", "unknown"]
Judgement = tuple[Verdict, str, str]
"""Verdict, reason, remedy."""


@dataclass(frozen=True, kw_only=True)
class Gemm:
    """An operator of `GEMMS` that reads a DequantizeLinear.

    Args:
        node: the operator.
        left: its first operand if it is quantized; usually the activation.
        right: its second operand if it is quantized; usually the weight.
        bias: the bias of a Gemm or convolution if it is quantized.
        compute: the GPUs for which TensorRT-RTX builds: sm75 …
        opset: the opset of the graph.
    """

    node: ir.Node
    left: Operand | None
    right: Operand | None
    bias: Operand | None
    compute: Sequence[str] = ()
    opset: int = 21

    @property
    def operands(self) -> tuple[Operand, ...]:
        """The quantized operands among left and right."""
        return tuple(item for item in (self.left, self.right) if item is not None)

    @property
    def weight_only(self) -> bool:
        """Whether only the second operand, stored in the file, is quantized."""
        return self.left is None and self.right is not None and self.right.quantize is None

    @property
    def output_axis(self) -> int | None:
        """The axis of the second operand's codes that holds the output channels; None if a view hides it."""
        assert self.right is not None
        if self.node.op_type in CONVOLUTIONS:
            return 0 if self.node.op_type == "Conv" else 1
        codes = self.right.dequantize.inputs[0]
        rank = len(shape_of(codes)) if codes is not None else 0
        axis: int | None = rank - 1
        if self.node.op_type == "Gemm" and attribute(self.node, "transB", 0) == 1:
            axis = rank - 2
        if self.node.op_type == "Einsum":
            axis = _einsum_axis(self.node)
        for view in self.right.after:
            if view.op_type == "Transpose" and axis is not None:
                order = view.attributes.get("perm")
                axis = order.as_ints()[axis] if order is not None else rank - 1 - axis
            elif view.op_type not in ("Transpose", "Cast"):
                return None
        return axis


GemmRule = Callable[[Gemm], Judgement | None]
"""A rule: it judges a GEMM, or returns None and leaves it to the next rule."""


def gemm_of(node: ir.Node, compute: Sequence[str], opset: int) -> Gemm | None:
    """`node` with its quantized operands; None if it is not a GEMM or reads no DequantizeLinear."""
    if node.op_type not in GEMMS or len(node.inputs) < 2:
        return None
    left, right = operand_of(node.inputs[0]), operand_of(node.inputs[1])
    bias = operand_of(node.inputs[2]) if len(node.inputs) > 2 and node.op_type != "Einsum" else None
    if left is None and right is None and bias is None:
        return None
    return Gemm(node=node, left=left, right=right, bias=bias, compute=compute, opset=opset)


def readers(node: ir.Node) -> list[ir.Node]:
    """The nodes that read a node's results, one for each use."""
    return [user for output in node.outputs for user, _ in output.uses()]


def only_reader(node: ir.Node) -> ir.Node | None:
    """The only node that reads a node's results, through one input; None if there are several, or if it is a graph output."""
    users = readers(node)
    return users[0] if len(users) == 1 and not any(output.is_graph_output() for output in node.outputs) else None


def _einsum_axis(node: ir.Node) -> int | None:
    """The axis of the second operand that only the result has: `btk,kn->btn` gives 1."""
    equation = node.attributes.get("equation")
    text = equation.as_string().replace(" ", "") if equation is not None else ""
    if "..." in text or "->" not in text or text.count(",") != 1:
        return None
    operands, result = text.split("->")
    first, second = operands.split(",")
    axes = [index for index, letter in enumerate(second) if letter in result and letter not in first]
    return axes[-1] if axes else None
