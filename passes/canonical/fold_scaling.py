"""Fold the equivalent scaling of every site into weights and biases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from dq_export.core.artifacts import CalibrationResult, SitePlan

from ..base import GraphError, GraphPass, PassReport, initializer, like, stored
from ..match import LinearNode, find_linear, linears
from ..names import FOLDED


@dataclass(frozen=True, kw_only=True, eq=False)
class FoldScaling(GraphPass):
    """h -> W h + b  becomes  (h - m) / s -> (W diag(s)) h' + (b + W m), and (h - m) / s is folded into h's producer.

    F1 `modulation`: h = x * G + B with G, B rows of an adaLN linear: rows of G: W /= s, b /= s; rows of B: W /= s,
       b = (b - m) / s. Needs the "1 +" absorbed.
    F2 `value`: rows of the value projection: W /= s, b = (b - m) / s; softmax rows sum to 1, so m passes through.
    F3 `explicit`: Mul(h, 1 / s), and Add(-m / s) where there is a shift: GELU does not commute with s.

    It does not act where
        1. the plan has no scaling,
        2. the site was folded before (stamped on its first reader).

    Exactness: exact in real arithmetic; the float output changes by reordering only, relative 1e-5 at the most.
    Source: SmoothQuant (arXiv 2211.10438) section 4 for the principle; F1 and F2 as in DiTAS (arXiv 2409.07756).

    Args:
        result: the calibration, whose sites are folded.
    """

    name: ClassVar[str] = "fold_scaling"
    # It changes float weights, and each linear once.
    after: ClassVar[tuple[str, ...]] = ("fold_transpose", "merge_duplicates")
    before: ClassVar[tuple[str, ...]] = ("quantize_weights",)
    result: CalibrationResult

    def rewrite(self, model: ir.Model) -> PassReport:
        changed, skipped = [], []
        found = linears(model)
        for plan in self.result.sites.values():
            site = plan.site
            readers = [find_linear(found, name) for name in site.linears]
            if not plan.scaled:
                skipped.append(f"'{site.name}': nothing to scale (case 1)")
            elif FOLDED.read(readers[0].gemm):
                skipped.append(f"'{site.name}': folded before (case 2)")
            else:
                _fold_producer(model, plan, found, readers)
                for reader in readers:
                    _fold_reader(reader, plan)
                FOLDED.write(readers[0].gemm, plan.method)
                changed.append(f"'{site.name}': {plan.method} into {site.producer or 'an explicit Mul'}")
        return PassReport(name=self.name, changed=tuple(changed), skipped=tuple(skipped))


def _fold_reader(reader: LinearNode, plan: SitePlan) -> None:
    in_scale, in_shift, weight = plan.in_scale, plan.in_shift, reader.weight_reader()
    if in_shift.any():
        reader.change_bias(lambda bias: bias + weight().astype(np.float64) @ in_shift)
    reader.change_weight(lambda weight: weight * in_scale)


def _fold_producer(model: ir.Model, plan: SitePlan, found: dict[str, LinearNode], readers: list[LinearNode]) -> None:
    site = plan.site
    if site.fold == "explicit":
        _scale_explicitly(model, plan, readers)
        return
    producer = find_linear(found, site.producer)
    in_scale, in_shift = plan.in_scale, plan.in_shift
    if site.fold == "value":
        producer.change_weight(lambda weight: weight / in_scale[:, None])
        producer.change_bias(lambda bias: (bias - in_shift) / in_scale)
        return
    _require_absorbed(producer, site.scale_rows)
    shift, scale = slice(*site.shift_rows), slice(*site.scale_rows)

    def divided(weight: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        weight = weight.copy()
        weight[shift] /= in_scale[:, None]
        weight[scale] /= in_scale[:, None]
        return weight

    def moved(bias: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        bias[shift] = (bias[shift] - in_shift) / in_scale
        bias[scale] /= in_scale
        return bias

    producer.change_weight(divided)
    producer.change_bias(moved)


def _scale_explicitly(model: ir.Model, plan: SitePlan, readers: list[LinearNode]) -> None:
    source = readers[0].input
    inverse = (1.0 / plan.in_scale).astype(np.float32)
    factor = initializer(model.graph, f"{plan.site.name}.inverse_in_scale", inverse)
    node = ir.node("Mul", [source, factor])
    nodes = [node]
    if plan.in_shift.any():
        offset = initializer(model.graph, f"{plan.site.name}.scaled_in_shift", -plan.in_shift * inverse)
        nodes.append(ir.node("Add", [node.outputs[0], offset]))
    for made in nodes:
        like(made.outputs[0], source)
    model.graph.insert_before(readers[0].gemm, nodes)
    for reader in readers:
        reader.gemm.replace_input_with(0, nodes[-1].outputs[0])


def _require_absorbed(producer: LinearNode, rows: tuple[int, int]) -> None:
    """The chunk that makes G must reach its Mul without a "1 +" on the way."""
    split = next((user for user, _ in producer.output.uses() if user.op_type == "Split"), None)
    if split is None:
        raise GraphError(f"'{producer.name}': expected a Split of its output into adaLN's chunks")
    width = rows[1] - rows[0]
    value = split.outputs[rows[0] // width]
    for user, _ in value.uses():
        ends = [user] if user.op_type != "Unsqueeze" else [end for end, _ in user.outputs[0].uses()]
        if any(end.op_type == "Add" and any(stored(v) is not None for v in end.inputs) for end in ends):
            raise GraphError(f"'{producer.name}': the '1 +' of adaLN is not absorbed; run pass absorb_one before fold_scaling")
