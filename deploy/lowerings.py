"""How each backend runs each quantized form of a linear, or why it does not: one table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from dq_export.core.recipe import RecipeError, Rule
from dq_export.core.scheme import BLOCK_SIZES

Target = Literal["ort", "openvino", "trt"]
Weights = Literal["channel", "blocks"]
GEMM = "one integer GEMM"
TOKEN = "one integer GEMM, the token's scale before and behind it"
LEVELS = "one integer GEMM; int4 codes become 8-bit codes when the engine is loaded"
LEVELS_TOKEN = "the same, the token's scale before and behind it"
UNPACKED = "MatMulNBits: blocks unpacked inside the GEMM, which rounds its input to 8 bits a block"
INT4_GEMM = "int4 blocks unpacked inside the GEMM"
FLOAT8 = "one float8 GEMM"
NO_GROUPS = "no: an integer GEMM has one scale a token; granularity token"


@dataclass(frozen=True, kw_only=True)
class Lowering:
    """One row: a form of a linear and what runs it. A cell that begins with `no:` is a refusal and names the nearest form.

    Args:
        bits: the recipe's actions, which differ in their codes alone.
        granularity: of the activation; None where it stays float.
        weights: a scale for each output channel, or for each block along the input.
    """

    bits: tuple[str, ...]
    granularity: str | None
    weights: Weights
    ort: str
    openvino: str
    trt: str

    def fits(self, rule: Rule) -> bool:
        """Whether a completed rule has this form."""
        weight = rule.scheme.weight
        blocks = weight is not None and weight.granularity == self.weights
        return rule.action in self.bits and rule.granularity == self.granularity and blocks

    def on(self, target: Target) -> str:
        """The target's cell."""
        return {"ort": self.ort, "openvino": self.openvino, "trt": self.trt}[target]


UNTRIED = "no: only --bits w8a8 with granularity tensor was measured there"
LOWERINGS = (
    Lowering(bits=("w8a8",), granularity="tensor", weights="channel", ort=GEMM, openvino=GEMM, trt=GEMM),
    Lowering(bits=("w6a6",), granularity="tensor", weights="channel", ort=GEMM, openvino=UNTRIED, trt=GEMM),
    Lowering(bits=("w8a8", "w6a6"), granularity="token", weights="channel", ort=TOKEN, openvino=UNTRIED, trt=TOKEN),
    Lowering(bits=("w8a8", "w4a8"), granularity="token-group", weights="blocks", ort=UNPACKED, openvino=UNTRIED, trt=NO_GROUPS),
    Lowering(bits=("w4a8", "w4a4"), granularity="tensor", weights="blocks", ort=LEVELS, openvino=UNTRIED, trt=LEVELS),
    Lowering(bits=("w4a8", "w4a4"), granularity="tensor", weights="channel", ort=LEVELS, openvino=UNTRIED, trt=LEVELS),
    Lowering(bits=("w4a8", "w4a4"), granularity="token", weights="blocks", ort=LEVELS_TOKEN, openvino=UNTRIED, trt=LEVELS_TOKEN),
    Lowering(bits=("w4a8", "w4a4"), granularity="token", weights="channel", ort=LEVELS_TOKEN, openvino=UNTRIED, trt=LEVELS_TOKEN),
    Lowering(bits=("w4a16",), granularity=None, weights="blocks", ort=UNPACKED, openvino=UNTRIED, trt=INT4_GEMM),
    Lowering(
        bits=("w8a16",), granularity=None, weights="blocks", ort=UNPACKED, openvino=UNTRIED,
        trt="no: int8 blocks are unpacked by a kernel of their own; w4a16, or w8a8",
    ),
    Lowering(
        bits=("fp8",), granularity="tensor", weights="channel", trt=FLOAT8,
        ort="no: no CPU kernel for float8; w8a8, or --format trt", openvino="no: no CPU kernel for float8; w8a8, or --format trt",
    ),
    Lowering(
        bits=("fp8",), granularity="token", weights="channel", trt="no: float8 keeps its precision over 15 octaves; tensor",
        ort="no: no CPU kernel for float8; w8a8, or --format trt", openvino="no: no CPU kernel for float8; w8a8, or --format trt",
    ),
)  # fmt: skip


def require_lowerings(target: Target, rules: Iterable[Rule]) -> None:
    """Let rules pass that a target runs.

    Args:
        rules: completed, as `Recipe.assign` gives them.

    Raises:
        RecipeError: a rule that the target refuses, with the nearest that it runs; all of them in one message.
    """
    wrong = [f"{_form(rule)} on {target}: {reason}" for rule in dict.fromkeys(rules) if (reason := _refusal(target, rule))]
    if wrong:
        raise RecipeError("\n".join(dict.fromkeys(wrong)))


def _refusal(target: Target, rule: Rule) -> str:
    if rule.action in ("float", "weight-only"):
        return ""
    cell = next((row.on(target) for row in LOWERINGS if row.fits(rule)), "no: no such form; see the README's table")
    if cell == UNPACKED and rule.group_size and rule.group_size not in BLOCK_SIZES:
        sizes = ", ".join(str(size) for size in BLOCK_SIZES)
        return f"its kernel unpacks blocks of {sizes}; choose one of them"
    return cell.removeprefix("no: ") if cell.startswith("no: ") else ""


def _form(rule: Rule) -> str:
    parts = [rule.action, rule.granularity and f"granularity {rule.granularity}"]
    return " ".join(filter(None, [*parts, f"group_size {rule.group_size}" if rule.group_size is not None else ""]))
