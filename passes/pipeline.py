"""The order of the passes, each with the reason for its place."""

from __future__ import annotations

from collections.abc import Mapping

from dq_export.core.artifacts import CalibrationResult
from dq_export.core.recipe import Rule

from .base import GraphPass
from .canonical.absorb_one import AbsorbOne
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
    """From the exported float graph to the canonical Q/DQ graph in direct form."""
    narrow = any(plan.activation and plan.activation.qtype.bits < EIGHT for plan in result.sites.values())
    clipped = (FactorScale(), ClipCodes(result=result)) if narrow else ()  # a Clip takes constants
    return (
        FoldTranspose(),  # first: a linear's weight is then an initializer
        MergeDuplicates(),  # early: names every GEMM, and later passes see each linear once
        AbsorbOne(),  # before fold_scaling, which divides the rows that hold the 1
        FoldScaling(result=result),  # on float weights, so before they become codes
        LiftModulation(assigned=assigned),  # after fold_scaling, which looks for the Split of the Gemm
        CorrectBias(result=result),  # after fold_scaling, whose bias it adds to, and before a weight becomes codes
        QuantizeWeights(result=result, assigned=assigned),  # the folded weights
        InsertQdq(result=result, assigned=assigned),  # wires the quantized input into the finished GEMMs
        *clipped,  # last: between the quantized input and what it reads
    )
