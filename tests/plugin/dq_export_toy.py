"""A package that adds a scale method, a pass and a backend to dq-export; its family is tests/contract/toy.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from dq_export.core.artifacts import CalibrationResult
from dq_export.core.qtypes import QuantType
from dq_export.core.recipe import Recipe
from dq_export.core.rule import Rule
from dq_export.deploy.backend import Built, Engine
from dq_export.deploy.onnxruntime.cpu import Ort, open_graph
from dq_export.passes.base import GraphPass, PassReport


# --- method
def headroom(
    amax: npt.NDArray[np.float32], counts: npt.NDArray[np.int64], recipe: Recipe, qtype: QuantType
) -> npt.NDArray[np.float32]:
    """scale[t] = 1.25 amax[t] / qmax: room for activations that calibration did not see."""
    return (1.25 * amax / qtype.qmax).astype(np.float32)


# --- pass
@dataclass(frozen=True, kw_only=True)
class NameSoftmax(GraphPass):
    """Softmax  ->  Softmax, named `attention.0`, `attention.1` … in the order of the graph.

    Exactness: bit-exact.
    """

    name: ClassVar[str] = "name_softmax"
    after: ClassVar[tuple[str, ...]] = ("insert_qdq",)
    before: ClassVar[tuple[str, ...]] = ("fuse_attention",)

    def rewrite(self, model: ir.Model) -> PassReport:
        changed = []
        for number, node in enumerate([node for node in model.graph if node.op_type == "Softmax"]):
            if node.name != f"attention.{number}":
                node.name = f"attention.{number}"
                changed.append(f"'{node.name}'")
        return PassReport(name=self.name, changed=tuple(changed))


def name_softmax(*, result: CalibrationResult, assigned: Mapping[str, Rule]) -> GraphPass:
    """The pass; it needs neither the calibration nor the rules."""
    return NameSoftmax()


# --- backend
@dataclass(frozen=True)
class Plain(Ort):
    """ONNX Runtime's CPU provider without its optimiser: what the graph says, node by node."""

    name: ClassVar[str] = "plain"
    provider: ClassVar[str | None] = None
    title: ClassVar[str] = "ONNX Runtime, node by node"
    triton: ClassVar[str] = ""

    def load(self, built: Built, *, batch: int | None = None) -> Engine:
        """A session that optimises nothing."""
        engine: Any = open_graph(built.model, optimize=False)
        return engine  # type: ignore[no-any-return]


PLAIN = Plain()
