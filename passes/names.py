"""How nodes refer to one another: metadata properties with one writer and reader each, and the names of the passes."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

PASSES = (
    "cast_floats",
    "clip_codes",
    "correct_bias",
    "factor_scale",
    "fold_scaling",
    "fold_transpose",
    "fuse_attention",
    "insert_qdq",
    "integer_convolutions",
    "lift_modulation",
    "merge_duplicates",
    "plain_group_norms",
    "quantize_attention",
    "quantize_embeddings",
    "quantize_weights",
    "raise_biases",
    "trim_text",
    "unsign_codes",
    "widen_codes",
    "widen_floats",
)
"""Every pass of this package; the check of the order refuses declarations that name an unknown pass."""


@dataclass(frozen=True)
class Property:
    """A metadata property of a node; passes read it, and runtimes ignore it.

    Args:
        key: its name in the file.
    """

    key: str

    def write(self, node: ir.Node, text: str) -> None:
        """Set it."""
        node.metadata_props[self.key] = text

    def read(self, node: ir.Node) -> str:
        """Its text; empty if the node does not have it."""
        return node.metadata_props.get(self.key, "")


PASS = Property("dq_export.pass")
"""The pass that inserted the node."""
SITE = Property("dq_export.site")
"""On a QuantizeLinear and DequantizeLinear: the site whose input they quantize."""
FACTOR = Property("dq_export.factor")
"""On a Mul after a GEMM: the GEMM whose result it scales back."""
FOLDED = Property("dq_export.folded")
"""On a site's first reader: the method of the folded scaling."""
CORRECTED = Property("dq_export.corrected")
"""On a GEMM: its bias contains the correction."""


def origin(operator: str) -> str:
    """The name of the node that a runtime's operator comes from; a runtime that fuses the node appends `/` and a suffix."""
    return operator.partition("/")[0]
