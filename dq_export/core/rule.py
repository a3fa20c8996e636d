"""A rule of a recipe: what happens to the linears that it matches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict, Field, field_validator

from .documents import shown
from .network import Linear, Role
from .patterns import require_pattern, search
from .scheme import BLOCK_SIZES, Action, Granularity, Scheme, scheme_of
from .violations import nearest


class Rule(BaseModel):
    """What happens to linears of a role whose module name `match` finds, in RE2's syntax. The first rule that matches decides.

    Actions: `bits`: whatever the recipe's `bits` names; `w8a8`: int8 weights (a scale per output channel) and int8
    activations, integer GEMM; `w6a6`: the same with codes of 6 bits; `w4a8` and `w4a4`: int4 weights in groups along the
    input, whose scales are whole multiples of the channel's, under activations of 8 or 4 bits, 8-bit integer GEMM; `fp8`: as
    w8a8 in float8 E4M3; `w8a16` and `w4a16`: weights in blocks along the input, unpacked inside the GEMM; `weight-only`: as
    w8a16, for memory alone, whatever runs it; `float`: left alone.

    Args:
        match: empty: any name.
        role: what the linears work on, see `Linear`. null: any.
        granularity: of the activation's scale: one for the `tensor` (from the table of its timestep), one for each `token`,
            or for each token and group of inputs; the last two are measured as the engine runs. null: the recipe's.
        group_size: inputs that share a weight scale; 0: all. null: the recipe's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    match: str = ""
    role: Role | None = None
    action: Action
    reason: str = ""
    granularity: Granularity | None = None
    group_size: int | None = Field(default=None, ge=0, le=65536)

    def matches(self, linear: Linear) -> bool:
        """Whether it is for a linear."""
        return self.role in (None, linear.role) and search(self.match, linear.name)

    @property
    def label(self) -> str:
        """What it matches, in words: `role gemm`, a regular expression, or both."""
        return " ".join(filter(None, [self.role and f"role {self.role}", self.match]))

    @staticmethod
    def of(match: str, scheme: Scheme, reason: str = "") -> Rule:
        """The rule that gives linears a scheme; see `Scheme.words`."""
        return Rule.model_validate({"match": match, "reason": reason, **scheme.words})

    @property
    def scheme(self) -> Scheme:
        """How the linears are quantized.

        Raises:
            KeyError: the action is `bits`; `Recipe.complete` puts the recipe's in its place.
            ValueError: no kernel can exist for the rule; see `Scheme`.
        """
        return scheme_of(self.action, self.granularity, self.group_size)

    def placed(self, linear: Linear, written: Rule) -> Rule:
        """The rule for a linear; what the recipe asks of all of them, and a convolution cannot have, is left out of it.

        Args:
            written: the rule before the recipe's bits, granularity and group size were put into it.
        """
        preset = scheme_of(self.action)
        if not linear.convolution or preset.weight is None:
            return self
        if preset.activation is None and written.action == "bits":
            return Rule(match=self.match, role=self.role, action="float", reason="no kernel unpacks a convolution's weight")
        if preset.activation is None or written.granularity is not None or self.granularity in (None, "tensor"):
            return self
        reason = "; ".join(filter(None, [self.reason, "a convolution takes one scale for its input"]))
        return self.model_copy(update={"granularity": "tensor", "reason": reason})

    def fitted(self, width: int) -> Rule:
        """The rule for a linear of `width` inputs, with the size of its blocks.

        Raises:
            ValueError: see `Scheme` and `Scheme.fitted`.
        """
        scheme, fitted = self.scheme, self.scheme.fitted(width)
        if fitted == scheme or fitted.weight is None:
            return self
        reasons = [self.reason]
        if fitted.weight.granularity == "channel":
            sizes = f"{min(BLOCK_SIZES)} to {max(BLOCK_SIZES)}"
            reasons.append(f"no block of {sizes} divides its {width} inputs: one scale for each channel")
        return self.model_copy(update={"group_size": fitted.weight.size or 0, "reason": "; ".join(filter(None, reasons))})

    @field_validator("match")
    @classmethod
    def _compiles(cls, value: str) -> str:
        require_pattern(value)
        return value


DEFAULT_RULES = (
    Rule(role="gemm", action="bits"),
    Rule(role="static", action="bits"),
    Rule(
        role="vector",
        action="weight-only",
        reason="works on one row per sample: integer GEMMs gain nothing there, 8-bit blocks save memory",
    ),
    Rule(role="edge", action="float", reason="embedders and final projection stay float"),
)
"""The rules of a family that has none of its own."""


def unmatched(rules: Sequence[Rule], linears: Mapping[str, Linear]) -> list[str]:
    """Rules whose names are those of no linear, and linears that no rule matches. A role may have no linear."""
    wrong = []
    for rule in rules:
        if (rule.match or rule.role is None) and not any(rule.matches(linear) for linear in linears.values()):
            hint = nearest(rule.match, list(linears)) or f" Names look like '{next(iter(linears))}'."
            wrong.append(f"rule {shown(rule.label)} ({rule.action}) matches none of {len(linears)} linears.{hint}")
    left = [name for name, linear in linears.items() if not any(rule.matches(linear) for rule in rules)]
    if left:
        names = ", ".join(f"'{name}'" for name in left[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
        wrong.append(f"no rule matches {names}; add a last rule such as {{match: '', action: float}}")
    return wrong


def misplaced(decided: Mapping[str, Rule], linears: Mapping[str, Linear]) -> list[str]:
    """Rules that a linear cannot have for its place in the network."""
    wrong = []
    for name, rule in decided.items():
        role, preset = linears[name].role, scheme_of(rule.action)
        if preset.activation is not None and role == "vector":
            wrong.append(
                f"'{name}' works on one row per sample, where {rule.action.upper()} runs in float; use weight-only or float"
            )
        if linears[name].convolution and preset.weight is not None and preset.activation is None:
            wrong.append(f"'{name}' is a convolution, whose weight no kernel unpacks; set its action to w8a8 or float")
        if linears[name].convolution and rule.granularity in ("token", "token-group"):
            wrong.append(
                f"'{name}' is a convolution, whose patches share pixels: granularity {rule.granularity} does not exist for it; "
                "set granularity tensor"
            )
        if preset.weight is not None and role == "edge":
            wrong.append(f"'{name}' is an embedder or a final projection and stays float; set its action to float")
    return wrong


def unfit(decided: Mapping[str, Rule], linears: Mapping[str, Linear]) -> list[str]:
    """Rules that no kernel can run, or whose blocks do not divide the width of their linear; one line for each reason."""
    impossible: dict[str, None] = {}
    blocks: dict[str, list[str]] = {}
    for name, rule in decided.items():
        try:
            scheme = rule.scheme
        except ValueError as error:
            impossible[str(error)] = None
            continue
        try:
            scheme.fitted(linears[name].width)
        except ValueError as error:
            blocks.setdefault(f"{rule.action}: {error}", []).append(f"'{name}'")
    lines = [f"{names[0]}{f' and {len(names) - 1} more' if names[1:] else ''} to {text}" for text, names in blocks.items()]
    return [*impossible, *lines]
