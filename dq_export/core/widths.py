"""What each width is exported with where a recipe names nothing else."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from .network import InputSite, Linear
from .rule import Rule
from .scheme import Bits, Granularity

Rounding = Literal["rtn", "mse", "gptq", "distill"]
"""What --rounding takes."""


@dataclass(frozen=True, kw_only=True)
class Width:
    """The defaults of a width, chosen so that every call of a trained network keeps 20 dB where the width can do that.

    Args:
        wide: blocks are kept at w8a8, from the first: one of so many; 0: none.
    """

    granularity: Granularity = "tensor"
    rounding: Rounding = "rtn"
    wide: int = 0

    def rules(self, blocks: Sequence[str], sites: Sequence[InputSite], linears: Mapping[str, Linear]) -> tuple[Rule, ...]:
        """The rules that come before the family's with the action `bits`: the first blocks have 8-bit weights.

        Linears that read one input need one scheme: those that read an input of later blocks, too, keep the width's bits.
        So do linears of the role `static`, which often read one text in all blocks.

        Args:
            blocks: module names in execution order; none where the network is not made of blocks.
        """
        first = blocks[: -(-len(blocks) // self.wide)] if self.wide else ()
        if not first:
            return ()
        pattern = f"^({'|'.join(map(re.escape, first))})\\."
        readers = [[name for name in site.linears if linears[name].role == "gemm"] for site in sites]
        inside = {name: bool(re.match(pattern, name)) for names in readers for name in names}
        split = [name for names in readers for name in names if len({inside[other] for other in names}) > 1]
        if not any(inside.values()):
            return ()
        rule = Rule(match=pattern, role="gemm", action="w8a8", group_size=0, reason=FIRST)
        if not split:
            return (rule,)
        return Rule(match=f"^({'|'.join(map(re.escape, split))})$", role="gemm", action="bits", reason=SHARED), rule


FIRST = "errors of the first blocks pass through all others, so w4a8 keeps 8-bit weights there"
SHARED = "reads an input that later blocks read, too"
PLAIN = Width()
WIDTHS: dict[Bits, Width] = {"w4a8": Width(granularity="token", rounding="gptq", wide=3)}
"""By bits; all others are PLAIN. On dit-digits w4a8 by token with GPTQ keeps 21.5 dB of the worst call."""
