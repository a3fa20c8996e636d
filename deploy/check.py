"""What a backend will do with each quantized GEMM of an ONNX file, before it is built."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from dq_export.passes.base import constant, stored
from dq_export.passes.match import only_user

Verdict = Literal["rejected", "float", "low precision"]
Target = Literal["trt", "trt-rtx", "ort"]
GEMMS = ("MatMul", "Gemm", "Conv")
INT8, INT4, FP8 = ir.DataType.INT8, ir.DataType.INT4, ir.DataType.FLOAT8E4M3FN
KNOWN = (INT8, INT4, FP8, ir.DataType.UINT8)
INTEGER_OPERATORS = frozenset(
    {"MatMulInteger", "QLinearMatMul", "DynamicQuantizeLinear", "ConvInteger", "QLinearConv", "MatMulNBits"}
)
VIEWS = ("Transpose", "Reshape", "Cast", "Squeeze", "Unsqueeze", "Flatten", "Identity")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What happens to one quantized node.

    Args:
        node: its name.
        verdict: `rejected`: parser or builder refuse it, or build something with other numbers; `float`: it builds, and the
            GEMM runs on floats; `low precision`: the kernel multiplies the codes, or unpacks int4 inside.
        rule: why; empty where it is as it should be.
        fix: what to change.
        weight_only: float, and meant so, as far as can be seen: only the weight is quantized.
    """

    node: str
    verdict: Verdict
    rule: str = ""
    fix: str = ""
    weight_only: bool = False

    @property
    def failed(self) -> bool:
        """Whether somebody should look at it."""
        return self.verdict == "rejected" or (self.verdict == "float" and not self.weight_only)


@dataclass(frozen=True, kw_only=True)
class Chain:
    """What a GEMM reads through a DequantizeLinear.

    Args:
        dequantize: that node.
        quantize: the QuantizeLinear before it, if the codes are not stored.
        source: what the codes are: an initializer, or what the QuantizeLinear reads.
    """

    dequantize: ir.Node
    quantize: ir.Node | None
    source: ir.Value

    @property
    def dtype(self) -> ir.DataType | None:
        """Of the codes."""
        value = self.dequantize.inputs[0]
        zero = self.dequantize.inputs[2] if len(self.dequantize.inputs) > 2 else None
        if self.quantize is not None and len(self.quantize.inputs) > 2 and self.quantize.inputs[2] is not None:
            zero = self.quantize.inputs[2]
        tensor = stored(zero) or stored(value)
        return tensor.dtype if tensor is not None else (zero.dtype if zero is not None else value.dtype if value else None)

    @property
    def weight(self) -> bool:
        """Whether all of it is known before the graph runs."""
        return stored(self.source) is not None

    @property
    def scale(self) -> np.ndarray | None:
        """The scale, if it is a constant."""
        return _folded(self.dequantize.inputs[1])

    @property
    def axis(self) -> int:
        """The axis that the scales lie along."""
        return self.dequantize.attributes.get_int("axis", 1)

    @property
    def blocked(self) -> bool:
        """Whether scales stand for blocks."""
        scale = self.scale
        return scale is not None and scale.ndim > 1


def check(model: ir.Model, target: Target, compute: Sequence[str] = ()) -> list[Finding]:
    """A verdict for every GEMM that reads a DequantizeLinear, and for every operator that the target does not know.

    Rules for `trt-rtx` were read off TensorRT-RTX 1.7's own builds, those for `trt` are the same plus what NVIDIA's pages
    forbid (scales that are not constants); `ort` is ONNX Runtime's CPU provider. No weight is read.

    Args:
        compute: for trt-rtx, the targets: sm75 … sm121.
    """
    findings = []
    for node in model.graph:
        if node.op_type in INTEGER_OPERATORS and target != "ort":
            findings.append(
                Finding(
                    node=str(node.name),
                    verdict="rejected",
                    rule=f"{node.op_type} is not imported",
                    fix="write QuantizeLinear, DequantizeLinear and MatMul",
                )
            )
        if node.op_type not in GEMMS:
            continue
        left, right = _chain(node.inputs[0]), _chain(node.inputs[1])
        if left is None and right is None:
            continue
        rules = RULES[target]
        found = next((item for rule in rules if (item := rule(node, left, right, compute)) is not None), None)
        verdict, why, fix = found or ("low precision", "", "")
        findings.append(Finding(node=str(node.name), verdict=verdict, rule=why, fix=fix, weight_only=left is None))
    return findings


Told = tuple[Verdict, str, str]
Rule = Callable[[ir.Node, Chain | None, Chain | None, Sequence[str]], Told | None]


def _types(node: ir.Node, left: Chain | None, right: Chain | None, compute: Sequence[str]) -> Told | None:
    for chain in filter(None, (left, right)):
        if chain.dtype not in KNOWN:
            name = chain.dtype.name if chain.dtype else "an unknown type"
            return "rejected", f"codes of {name}", "use int8, int4 or float8e4m3fn"
        if chain.dtype == ir.DataType.UINT8:
            return "rejected", "uint8 is taken for int8: other numbers", "use int8 with zero point 0"
    since = {INT4: "sm80", FP8: "sm89"}
    order = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
    for chain in filter(None, (left, right)):
        needed = since.get(chain.dtype) if chain.dtype else None
        old = [target for target in compute if needed and order.index(target) < order.index(needed)]
        if old:
            assert chain.dtype is not None
            return "rejected", f"{chain.dtype.name} on {old[0]}", f"build for {needed} or later"
    return None


def _zero_points(node: ir.Node, left: Chain | None, right: Chain | None, compute: Sequence[str]) -> Told | None:
    for chain in filter(None, (left, right)):
        for item in filter(None, (chain.dequantize, chain.quantize)):
            zero = constant(item.inputs[2]) if len(item.inputs) > 2 else None
            if zero is not None and zero.astype(np.float32).any():
                return "rejected", "a zero point that is not 0", "fold the shift into the bias before (in_shift)"
    return None


def _scales(node: ir.Node, left: Chain | None, right: Chain | None, compute: Sequence[str]) -> Told | None:
    for chain in filter(None, (left, right)):
        scale = chain.scale
        if scale is None:
            continue
        if not (scale.astype(np.float32) > 0).all():
            return "rejected", "a scale that is not positive", "give empty channels a scale of 1"
        shape = _shape(chain.source)
        if scale.ndim == 1 and scale.size > 1 and chain.axis < len(shape) and shape[chain.axis] not in (None, scale.size):
            return "rejected", f"{scale.size} scales for {shape[chain.axis]} channels", "one scale for each index of the axis"
        if chain.blocked and shape:
            block = chain.dequantize.attributes.get_int("block_size", 0)
            if scale.ndim != len(shape):
                return (
                    "rejected",
                    f"scales of rank {scale.ndim} for blocks of a tensor of rank {len(shape)}",
                    "one axis is divided",
                )
            if any(s != d for i, (s, d) in enumerate(zip(scale.shape, shape, strict=True)) if i != chain.axis):
                return "rejected", "blocks along more than one axis", "only the axis of the blocks is divided"
            if not block or shape[chain.axis] != block * scale.shape[chain.axis]:
                told = f"block_size {block} does not divide {shape[chain.axis]} into {scale.shape[chain.axis]}"
                return "rejected", f"{told}: other blocks than ONNX's, or none", "choose a block size that divides the axis"
    return None


def _float_types(node: ir.Node, left: Chain | None, right: Chain | None, compute: Sequence[str]) -> Told | None:
    found = set()
    for index, chain in enumerate((left, right)):
        value = chain.dequantize.inputs[1] if chain else node.inputs[index]
        dtype = value.dtype if value is not None else None
        if dtype is not None:
            found.add(dtype.name)
        if chain and chain.quantize is not None and chain.quantize.inputs[0] is not None:
            read = chain.quantize.inputs[0].dtype
            found |= {read.name} if read is not None else set()
    if len(found) > 1:
        return "rejected", f"operands of {' and '.join(sorted(found))}", "one float type through x, both scales and the weight"
    return None


def _mixed(node: ir.Node, left: Chain | None, right: Chain | None, compute: Sequence[str]) -> Told | None:
    if left is None or right is None:
        return None
    if left.dtype == INT4:
        return "rejected", "int4 activations", "int4 is for weights"
    if right.blocked:
        return "rejected", "weights in blocks under quantized activations", "leave the activation float, or one scale a channel"
    if right.dtype == INT4:
        return "float", "int4 weights under quantized activations", "leave the activation float (w4a16), or int8 weights"
    if {left.dtype, right.dtype} == {INT8, FP8}:
        return "rejected", "an int8 and a float8 operand", "give both operands one type"
    return None


def _run_time(node: ir.Node, left: Chain | None, right: Chain | None, compute: Sequence[str]) -> Told | None:
    for chain in filter(None, (left, right)):
        if chain.scale is None:
            return "float", "a scale that is computed at run time", "factor it: x*(c/s) -> Q/DQ with constant c -> GEMM -> *(s/c)"
    return None


def _run_time_trt(node: ir.Node, left: Chain | None, right: Chain | None, compute: Sequence[str]) -> Told | None:
    found = _run_time(node, left, right, compute)
    return ("rejected", *found[1:]) if found else None


def _one_sided(node: ir.Node, left: Chain | None, right: Chain | None, compute: Sequence[str]) -> Told | None:
    if right is None:
        return "float", "the weight has no QuantizeLinear and DequantizeLinear", "quantize the weight, too"
    if left is not None:
        return None
    if right.dtype != INT4:
        return "float", "the activation has no QuantizeLinear and DequantizeLinear", "quantize it, or store int4 blocks"
    if right.scale is not None and right.scale.size > 1 and right.blocked and right.scale.shape[right.axis] == 1:
        return "float", "one block a channel is unpacked by a kernel of its own", "at least two blocks along the axis"
    if not right.blocked:
        return "float", "int4 without blocks is unpacked by a kernel of its own", "blocks along the input, of 64 or 128"
    return None


def _granularity(node: ir.Node, left: Chain | None, right: Chain | None, compute: Sequence[str]) -> Told | None:
    if left is not None and left.scale is not None and left.scale.size > 1:
        return "float", "a scale along an axis of the activation", "one scale a tensor; factor per-token scales out"
    if right is None or right.scale is None or right.dtype == INT4:
        return None
    if right.blocked:
        return "float", f"{'int8' if right.dtype == INT8 else 'float8'} weights in blocks", "one scale an output channel"
    if right.scale.size > 1 and _output_axis(node, right) != right.axis % len(_shape(right.source) or (0, 0)):
        return "float", "the weight's scales lie along its input", "one scale an output channel"
    return None


def _split(node: ir.Node, left: Chain | None, right: Chain | None, compute: Sequence[str]) -> Told | None:
    """One GEMM for q, k and v, whose stored weight has a scale an output channel: the builder cuts it into heads."""
    if left is None or right is None or right.quantize is not None or right.scale is None or right.scale.size == 1:
        return None
    user = only_user(node.outputs[0])
    while user is not None and user.op_type == "Add":
        user = only_user(user.outputs[0])
    if user is None:
        return None
    readers = [reader.op_type for output in user.outputs for reader, _ in output.uses()]
    if user.op_type == "Reshape" and readers == ["Transpose"]:
        turned = only_user(user.outputs[0])
        readers = [reader.op_type for reader, _ in turned.outputs[0].uses()] if turned else []
        cut = readers.count("Gather") > 1 or readers == ["Split"]
    else:
        cut = user.op_type == "Split" and "Reshape" in readers
    if cut:
        return "float", "one GEMM for q, k and v with a scale an output channel", "a GEMM for each of q, k and v"
    return None


def _ort_zero_points(node: ir.Node, left: Chain | None, right: Chain | None, compute: Sequence[str]) -> Told | None:
    for label, chain in (("activation", left), ("weight", right)):
        if chain is not None and (len(chain.dequantize.inputs) < 3 or chain.dequantize.inputs[2] is None):
            return "float", f"the DequantizeLinear of its {label} has no zero point", "write it, although it is 0"
    return None


def _ort_form(node: ir.Node, left: Chain | None, right: Chain | None, compute: Sequence[str]) -> Told | None:
    if node.op_type == "Gemm":
        return "float", "a Gemm", "MatMul and Add, with an input of rank 3"
    if right is None:
        return "float", "the weight has no DequantizeLinear", "quantize the weight, too"
    if left is None:
        if right.blocked:
            return None
        return "float", "the activation has no DequantizeLinear", "quantize it, or store the weight in blocks"
    if right.blocked:
        return "float", "weights in blocks under quantized activations", "one scale an output channel, or float activations"
    if FP8 in (left.dtype, right.dtype) or INT4 in (left.dtype, right.dtype):
        return "float", "no kernel for these types on a CPU", "int8 weights and uint8 activations"
    if "axis" in left.dequantize.attributes and left.scale is not None and left.scale.size > 1:
        return "float", "a scale along an axis of the activation", "one scale a tensor; factor per-token scales out"
    if left.dtype == INT8 and len(list(left.dequantize.outputs[0].uses())) > 1:
        return "float", "an int8 activation that several GEMMs read", "uint8 with zero point 128"
    return None


NVIDIA: tuple[Rule, ...] = (_types, _zero_points, _scales, _float_types, _mixed)
RULES: dict[str, tuple[Rule, ...]] = {
    "trt-rtx": (*NVIDIA, _run_time, _one_sided, _granularity, _split),
    "trt": (*NVIDIA, _run_time_trt, _one_sided, _granularity, _split),
    "ort": (_ort_zero_points, _ort_form),
}


def _chain(value: ir.Value | None) -> Chain | None:
    """The DequantizeLinear behind an operand, through views."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in VIEWS:
        source = node.inputs[0]
        node = source.producer() if source is not None else None
    if node is None or node.op_type != "DequantizeLinear" or node.inputs[0] is None:
        return None
    quantize = node.inputs[0].producer()
    if quantize is not None and quantize.op_type == "QuantizeLinear" and quantize.inputs[0] is not None:
        return Chain(dequantize=node, quantize=quantize, source=quantize.inputs[0])
    return Chain(dequantize=node, quantize=None, source=node.inputs[0])


def _folded(value: ir.Value | None) -> np.ndarray | None:
    """The content of a constant, or of arithmetic on constants; None for what depends on an input."""
    content = constant(value)
    if content is not None or value is None:
        return content
    node = value.producer()
    if node is None or node.op_type not in ("Mul", "Div", "Add", "Sub", "Constant", "Cast", "Reshape", "Squeeze"):
        return None
    if node.op_type == "Constant":
        tensor = node.attributes.get_tensor("value")
        return None if tensor is None else tensor.numpy()
    operands = [_folded(item) for item in node.inputs]
    if any(item is None for item in operands):
        return None
    a = operands[0]
    assert a is not None
    if node.op_type in ("Cast", "Reshape", "Squeeze"):
        return a
    b = operands[1]
    assert b is not None
    result: np.ndarray = {"Mul": np.multiply, "Div": np.divide, "Add": np.add, "Sub": np.subtract}[node.op_type](a, b)
    return result


def _shape(value: ir.Value) -> tuple[int | None, ...]:
    if value.shape is None:
        return ()
    return tuple(dim if isinstance(dim, int) else None for dim in value.shape)


def _output_axis(node: ir.Node, chain: Chain) -> int:
    """The axis of the stored weight that becomes the GEMM's output channels."""
    if node.op_type == "Conv":
        return 0
    turned = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
    value = node.inputs[1]
    producer = value.producer() if value is not None else None
    while producer is not None and producer is not chain.dequantize:
        if producer.op_type == "Transpose":
            turned = not turned
        producer = producer.inputs[0].producer() if producer.inputs[0] is not None else None
    return 0 if turned else 1
