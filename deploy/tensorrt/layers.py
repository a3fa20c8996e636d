"""The list of layers that TensorRT and TensorRT-RTX print during a build, and which of its GEMMs have low precision."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

GEMMS = ("gemm", "correlation")
"""Layer types that multiply matrices with one of the library's kernels."""
LOW = frozenset({"Int8", "FP8", "FP8E4M3", "Float8E4M3", "FP8 E4M3", "FP4E2M1"})
WEIGHT_ONLY = frozenset({"Int4"})


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer of a plan.

    Args:
        name: the builder's name.
        kind: its layer type: gemm, kgen, runtime_fusion …
        operands: element types of its inputs, first tensors, then constants.
        nodes: names of the ONNX nodes that it computes.
    """

    name: str
    kind: str
    operands: tuple[str, ...]
    nodes: tuple[str, ...]

    @property
    def attention(self) -> bool:
        """Whether it is a fused attention."""
        return "mha" in self.name

    @property
    def multiplies(self) -> bool:
        """Whether it may contain a GEMM."""
        return self.kind in GEMMS or self.attention or (self.kind == "runtime_fusion" and "Fc" in self.name)

    @property
    def precision(self) -> str:
        """`Int8` or `FP8 …` if both operands are codes, `Int4` if the GEMM unpacks the weight's codes, otherwise empty."""
        first = self.operands[:2]
        if self.kind == "runtime_fusion":
            codes = [item for item in self.operands if item in WEIGHT_ONLY]
            return codes[0] if codes else ""
        return first[0] if len(first) == 2 and set(first) <= LOW and first[0] == first[1] else ""


def read_layers(text: str) -> tuple[Layer, ...]:
    """Parse the list.

    Raises:
        ValueError: a line has another form, because the library has changed its format.
    """
    layers = []
    for line in text.split("\n\n")[0].split("\n")[1:]:
        if line.startswith("I/O Tensors"):
            break
        head = re.match(r"Name: (.*?), LayerType: (.*?), Inputs: ", line)
        if head is None:
            raise ValueError(f"expected 'Name: …, LayerType: …, Inputs: …', found '{line[:100]}'")
        inputs = line.split(", Outputs: [")[0]
        operands = re.findall(r"Datatype: (.+?), Format", inputs)
        nodes = re.findall(r"\[ONNX Layer: ([^\]]*)\]", line)
        layers.append(Layer(name=head[1], kind=head[2], operands=tuple(operands), nodes=tuple(nodes)))
    return tuple(layers)


def kernel_of(layers: Iterable[Layer], node: str) -> tuple[str, str]:
    """The layer type that runs a GEMM of the graph, and its precision (see `Layer.precision`).

    If the builder split a GEMM, its worst part counts.
    """
    parts = [layer for layer in layers if node in layer.nodes and layer.multiplies]
    if not parts:
        return "not found", ""
    worst = min(parts, key=lambda layer: bool(layer.precision))
    return f"{worst.kind} {'x'.join(worst.operands[:2])}", worst.precision
