"""Move the "1 +" of adaLN's modulation into the bias of the modulation linear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..base import GraphPass, PassReport, stored
from ..match import LinearNode, linears, only_user


@dataclass(frozen=True, kw_only=True)
class AbsorbOne(GraphPass):
    """Linear -> Split -> Unsqueeze -> Add(1) -> Mul  ->  Linear(bias rows + 1) -> Split -> Unsqueeze -> Mul.

    Without it a folded scaling would compute 1 + (g + 1 - s) / s with g' near -1, which cancels in low precision.

    It does not act where
        1. the Add's other input is not a chunk of a linear with a bias,
        2. the chunk is read by anything else, which needs it without the 1,
        3. the constant is not exactly one.

    Exactness: reorders float additions; relative error at most 2^-23 of |g| + 1.
    Source: facts of an adaLN-zero block, arXiv 2212.09748 section 3.2.
    """

    name: ClassVar[str] = "absorb_one"
    # Which divides the rows that hold the 1.
    after: ClassVar[tuple[str, ...]] = ("merge_duplicates",)
    before: ClassVar[tuple[str, ...]] = ("fold_scaling",)

    def rewrite(self, model: ir.Model) -> PassReport:
        by_output = {linear.output: linear for linear in linears(model).values()}
        changed, skipped = [], []
        for add in [node for node in model.graph if node.op_type == "Add"]:
            value = _plus_one(add)
            if value is None:
                continue
            split = _split_behind(value)
            linear = by_output.get(split.inputs[0]) if split is not None and split.inputs[0] is not None else None
            if split is None or linear is None:
                skipped.append(f"'{add.name}': no chunk of a linear with a bias (case 1)")
                continue
            chunk = _chunk_of(value, split)
            if only_user(value) is not add or (chunk is not value and only_user(chunk) is not value.producer()):
                skipped.append(f"'{add.name}': the chunk has other readers (case 2)")
                continue
            _add_one(linear, split, chunk)
            for user, index in list(add.outputs[0].uses()):
                user.replace_input_with(index, value)
            changed.append(f"'{linear.name}' chunk {split.outputs.index(chunk)}")
        return PassReport(name=self.name, changed=tuple(changed), skipped=tuple(skipped))


def _plus_one(add: ir.Node) -> ir.Value | None:
    for value, other in (add.inputs, reversed(add.inputs)):
        tensor = stored(other)
        if tensor is not None and tensor.size == 1 and float(tensor.numpy().reshape(())) == 1.0:
            return value
    return None


def _split_behind(value: ir.Value) -> ir.Node | None:
    producer = value.producer()
    if producer is not None and producer.op_type == "Unsqueeze" and producer.inputs[0] is not None:
        producer = producer.inputs[0].producer()
    return producer if producer is not None and producer.op_type == "Split" else None


def _chunk_of(value: ir.Value, split: ir.Node) -> ir.Value:
    if value in split.outputs:
        return value
    producer = value.producer()
    source = producer.inputs[0] if producer is not None else None
    assert source is not None
    return source


def _add_one(linear: LinearNode, split: ir.Node, chunk: ir.Value) -> None:
    width = linear.shape[0] // len(split.outputs)
    start = split.outputs.index(chunk) * width

    def add(bias: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        bias[start : start + width] += 1.0
        return bias

    linear.change_bias(add)
