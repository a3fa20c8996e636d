"""Clip activations of fewer than 8 bits to the range of their codes, which are stored as int8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from dq_export.core.artifacts import CalibrationResult

from ..base import GraphError, GraphPass, PassReport, constant, initializer, like
from ..names import SITE

EIGHT = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class ClipCodes(GraphPass):
    """x -> Q(c) -> DQ(c)  ->  x -> Clip(-qmax c, qmax c) -> Q(c) -> DQ(c), for codes of fewer than 8 bits.

    ONNX has no 6-bit type, and no kernel takes 4-bit activations: the codes are int8, and without the Clip a value beyond
    the calibrated range would use more bits than the recipe says.

    It does not act where
        1. the codes have 8 bits, because their type saturates by itself,
        2. the input already comes from a Clip.

    Exactness: bit-exact inside the codes' range.

    Args:
        result: the sites and their element types.

    Raises:
        GraphError: a scale is computed at run time; factor_scale must run before.
    """

    name: ClassVar[str] = "clip_codes"
    after: ClassVar[tuple[str, ...]] = ("insert_qdq", "factor_scale")
    result: CalibrationResult

    def rewrite(self, model: ir.Model) -> PassReport:
        changed = []
        for quantize in [node for node in model.graph if node.op_type == "QuantizeLinear"]:
            site, source = SITE.read(quantize), quantize.inputs[0]
            plan = self.result.sites.get(site)
            assert source is not None
            producer = source.producer()
            if plan is None or plan.activation is None or plan.activation.qtype.bits >= EIGHT:
                continue
            if producer is not None and producer.op_type == "Clip":
                continue
            scale = constant(quantize.inputs[1])
            if scale is None:
                raise GraphError(f"'{quantize.name}': its scale is computed at run time; run pass factor_scale before")
            bound = plan.activation.qtype.qmax * scale.astype(np.float32).reshape(())
            low = initializer(model.graph, f"{site}.activation_low", np.asarray(-bound))
            high = initializer(model.graph, f"{site}.activation_high", np.asarray(bound))
            clip = ir.node("Clip", [source, low, high], name=f"{site}.activation_clip")
            like(clip.outputs[0], source)
            model.graph.insert_before(quantize, clip)
            quantize.replace_input_with(0, clip.outputs[0])
            changed.append(f"'{quantize.name}'")
        return PassReport(name=self.name, changed=tuple(changed))
