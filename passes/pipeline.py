"""The lists of passes that every export and every backend share; each pass declares its place."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from dq_export.core.artifacts import CalibrationResult
from dq_export.core.documents import printable
from dq_export.core.plugins import PluginError, load_plugins
from dq_export.core.rule import Rule

from .base import GraphPass
from .canonical.correct_bias import CorrectBias
from .canonical.fold_scaling import FoldScaling
from .canonical.fold_transpose import FoldTranspose
from .canonical.insert_qdq import InsertQdq
from .canonical.lift_modulation import LiftModulation
from .canonical.merge_duplicates import MergeDuplicates
from .canonical.quantize_weights import QuantizeWeights
from .legalise.clip_codes import EIGHT, ClipCodes
from .legalise.factor_scale import FactorScale


def canonical_passes(result: CalibrationResult, assigned: Mapping[str, Rule]) -> tuple[GraphPass, ...]:
    """The passes from the exported float graph to the canonical Q/DQ graph in direct form."""
    return (
        FoldTranspose(),
        MergeDuplicates(),
        FoldScaling(result=result),
        LiftModulation(assigned=assigned),
        CorrectBias(result=result),
        QuantizeWeights(result=result, assigned=assigned),
        InsertQdq(result=result, assigned=assigned),
    )


def factoring_passes(result: CalibrationResult, *, shared: bool = False, limit: float = math.inf) -> tuple[GraphPass, ...]:
    """The passes from the direct form to constant scales, with activations of fewer than 8 bits clipped to their codes.

    Args:
        shared: one timestep serves the batch, and the backend runs a table in the direct form. Scales for each token are
            factored in any case, because no backend has a kernel for them, and so are narrow types, because a Clip takes
            constants.
        limit: see `FactorScale`.
    """
    narrow = any(plan.activation and plan.activation.qtype.bits < EIGHT for plan in result.sites.values())
    return (FactorScale(result=result, tables=narrow or not shared, limit=limit), ClipCodes(result=result))


def with_plugins(passes: Sequence[GraphPass], result: CalibrationResult, assigned: Mapping[str, Rule]) -> tuple[GraphPass, ...]:
    """A list of passes with those of plug-ins inserted, each at the place that it declares.

    A plug-in is a function of `result` and `assigned` that returns a pass. The pass is inserted directly after the last pass
    of its `after`, or else before the first pass of its `before`, or else at the end.

    Raises:
        PluginError: a plug-in cannot be used.
    """
    listed = list(passes)
    for name, make in load_plugins("passes", Callable).items():
        try:
            item: object = make(result=result, assigned=assigned)
        except Exception as error:  # a plug-in's function may raise anything
            raise PluginError(f"plug-in '{name}' (dq_export.passes): {type(error).__name__}: {printable(str(error))}") from error
        if not isinstance(item, GraphPass):
            raise PluginError(f"plug-in '{name}' (dq_export.passes): expected a pass, found {type(item).__name__}")
        listed.insert(_place(listed, item), item)
    return tuple(listed)


def _place(passes: Sequence[GraphPass], item: GraphPass) -> int:
    after = [index for index, other in enumerate(passes) if other.name in item.after]
    before = [index for index, other in enumerate(passes) if other.name in item.before]
    return after[-1] + 1 if after else before[0] if before else len(passes)
