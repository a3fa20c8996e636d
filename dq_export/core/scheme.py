"""Schemes: how a linear is quantized, as an object, and the words of a recipe that name one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, get_args

from .qtypes import FP8, INT4, INT6, INT8, QuantType

Bits = Literal["w8a8", "w8a16", "w6a6", "w4a8", "w4a16", "w4a4", "fp8"]
"""Presets that need a low-precision kernel: what --bits takes."""
Action = Literal[Bits, "bits", "weight-only", "float"]
"""What a rule takes: any preset, or `bits`, which stands for the recipe's own."""
Granularity = Literal["tensor", "token", "token-group"]
"""What --granularity takes: the elements of an activation that share a scale."""
Attention = Literal["float", "fp8"]
"""What --attention takes."""
ATTENTION_TYPES: dict[str, QuantType | None] = {"float": None, "fp8": FP8}
"""By the name of Attention: the codes of the operands of its two matmuls."""
BLOCK_SIZES = (128, 64, 32, 16)
"""Sizes of blocks that kernels unpack themselves. Without a requested size the first that divides the width is taken."""
GROUP_SIZES = (64, 32, 16, 96, 128, 192, 288)
"""The same for int4 weights under quantized activations, where any other size that divides the width may be requested."""


@dataclass(frozen=True, kw_only=True)
class TensorScheme:
    """How one operand of a GEMM is quantized.

    Args:
        qtype: element type of the codes.
        granularity: the elements that share a scale: the whole `tensor` (at one timestep), an output `channel`, `blocks`
            along the inputs of an output channel, a `token`, or a `token-group` (a token's inputs in groups).
        size: inputs in a block or group; None: by the width, see `Scheme.fitted`. Other granularities have none.
    """

    qtype: QuantType
    granularity: Literal["tensor", "channel", "blocks", "token", "token-group"]
    size: int | None = None


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How the GEMM of a linear is quantized.

    Args:
        weight: None: the linear stays float.
        activation: None: the GEMM's input stays float.
        for_memory: the weight is quantized to save memory alone, so any kernel will do.

    Raises:
        ValueError: no backend can have a kernel for the two together; the message names the nearest scheme.
    """

    weight: TensorScheme | None = None
    activation: TensorScheme | None = None
    for_memory: bool = False

    def __post_init__(self) -> None:
        if problem := self._problem():
            raise ValueError(f"{self}: {problem}")

    @property
    def low_precision(self) -> bool:
        """Whether the GEMM must run on a low-precision kernel."""
        return self.weight is not None and not self.for_memory

    @property
    def graph_type(self) -> QuantType | None:
        """The type of the codes that the graph quantizes the input to; None: it stays float, or the kernel quantizes it."""
        if self.activation is None or self.activation.granularity == "token-group":
            return None
        return self.activation.qtype

    @property
    def per_token(self) -> bool:
        """Whether the graph computes a scale for each token."""
        return self.activation is not None and self.activation.granularity == "token"

    @property
    def two_level(self) -> bool:
        """Whether int4 codes become the 8-bit codes of one integer GEMM: in blocks times a whole multiplier each."""
        return self.graph_type is not None and self.weight is not None and self.weight.qtype.stored_bits < 8

    @property
    def mixes_widths(self) -> bool:
        """Whether output channels may use different shares of their codes: of 8 bits, with a scale for each channel."""
        weight = self.weight
        return self.activation is not None and weight is not None and (weight.qtype, weight.granularity) == (INT8, "channel")

    @property
    def name(self) -> str:
        """The preset with the same element types."""
        return next(name for name, preset in PRESETS.items() if _types(preset) == _types(self))

    @property
    def words(self) -> dict[str, str | int | None]:
        """The fields of a rule that gives the scheme whatever the recipe says; blocks without a size take the recipe's."""
        granularity = None if self.activation is None else self.activation.granularity
        size = None if self.weight is None else self.weight.size if self._has_blocks else 0
        return {"action": self.name, "granularity": granularity, "group_size": size}

    @property
    def label(self) -> str:
        """In short, for a drawing or a line of progress: `w4a8 token 32`."""
        return " ".join(str(word) for word in self.words.values() if word not in (None, 0))

    def __str__(self) -> str:
        """In the words of a recipe: `w4a8 granularity token group_size 32`."""
        words, preset = [self.name], PRESETS[self.name]
        if self.activation is not None:
            words += ["granularity", self.activation.granularity]
        if self.weight is not None and (self.weight.size or (self.weight != preset.weight and not self._has_blocks)):
            words += ["group_size", str(self.weight.size or 0)]
        return " ".join(words)

    def fitted(self, width: int) -> Scheme:
        """The scheme for a linear of `width` inputs: its blocks have a size.

        A weight that is quantized for memory alone gets a scale for each output channel where no block divides the width.

        Raises:
            ValueError: no block divides the width; the message says which were tried and what to choose instead.
        """
        if self.weight is None or self.weight.granularity != "blocks":
            return self
        size = self.weight.size
        candidates = (GROUP_SIZES if self.two_level else BLOCK_SIZES) if size is None else (size,)
        # TensorRT unpacks a weight with a single block of int4 outside the GEMM.
        fewest = 2 if size is None and self.weight.qtype.stored_bits < 8 else 1
        fitting = next((size for size in candidates if width % size == 0 and width // size >= fewest), None)
        if fitting is not None:
            return self.resized(fitting)
        if self.for_memory and size is None:
            return replace(self, weight=TensorScheme(qtype=self.weight.qtype, granularity="channel"))
        sizes, other = ", ".join(str(size) for size in sorted(candidates)), self._without_blocks()
        raise ValueError(f"its {width} inputs are not divided by {sizes}; {other}, or leave it float with --exclude")

    def resized(self, size: int | None) -> Scheme:
        """The scheme with blocks, and groups of a token, of another size."""
        assert self.weight is not None
        weight, activation = replace(self.weight, granularity="blocks", size=size), self.activation
        if activation is not None and activation.granularity == "token-group":
            activation = replace(activation, size=size)
        return replace(self, weight=weight, activation=activation)

    def block_size(self, width: int) -> int:
        """Inputs that share a weight scale, of `width` in all; 0: one scale for each output channel.

        Raises:
            ValueError: see `fitted`.
        """
        weight = self.fitted(width).weight
        return 0 if weight is None else weight.size or 0

    @property
    def _has_blocks(self) -> bool:
        return self.weight is not None and self.weight.granularity == "blocks"

    def _without_blocks(self) -> str:
        """What to choose where no block divides a width."""
        if self.activation is not None and self.activation.granularity == "token-group":
            packed = self.weight is not None and self.weight.qtype.stored_bits < 8
            return "choose granularity token" + (" with group_size 0" if packed else "")
        return "group_size 0 gives each output channel one scale" if self.two_level else "choose bits w8a8"

    def _problem(self) -> str:
        """Why no kernel can exist, and the nearest scheme that has one; empty if one can."""
        if self.weight is None:
            return ""
        if self.activation is None:
            if self._has_blocks or not self.low_precision:
                return ""
            return "only blocks are unpacked inside a GEMM; use group_size 128, 64, 32 or 16"
        if self.activation.granularity == "token-group":
            if self.activation.qtype != INT8:
                return "kernels round each token's groups to 8 bits; use w4a8, w8a8 or token"
            return "" if self._has_blocks else "group_size 0 leaves no groups; give the groups a size, or use granularity token"
        if self._has_blocks and not self.two_level:
            return (
                "an 8-bit integer GEMM has one weight scale per output channel; use group_size 0, int4 weights (w4a8), or "
                "granularity token-group"
            )
        return ""


def _types(scheme: Scheme) -> tuple[object, ...]:
    weight, activation = scheme.weight, scheme.activation
    return weight and weight.qtype, activation and activation.qtype, scheme.for_memory


def _channel(qtype: QuantType) -> TensorScheme:
    return TensorScheme(qtype=qtype, granularity="channel")


def _blocks(qtype: QuantType) -> TensorScheme:
    return TensorScheme(qtype=qtype, granularity="blocks")


def _tensor(qtype: QuantType) -> TensorScheme:
    return TensorScheme(qtype=qtype, granularity="tensor")


PRESETS: dict[str, Scheme] = {
    "w8a8": Scheme(weight=_channel(INT8), activation=_tensor(INT8)),
    "w8a16": Scheme(weight=_blocks(INT8)),
    "w6a6": Scheme(weight=_channel(INT6), activation=_tensor(INT6)),
    "w4a8": Scheme(weight=_blocks(INT4), activation=_tensor(INT8)),
    "w4a16": Scheme(weight=_blocks(INT4)),
    "w4a4": Scheme(weight=_blocks(INT4), activation=_tensor(INT4)),
    "fp8": Scheme(weight=_channel(FP8), activation=_tensor(FP8)),
    "weight-only": Scheme(weight=_blocks(INT8), for_memory=True),
    "float": Scheme(),
}
"""By the name that a recipe gives them."""


@lru_cache
def scheme_of(action: str, granularity: Granularity | None = None, group_size: int | None = None) -> Scheme:
    """The scheme that a recipe names. This and `PRESETS` are the only code that knows the words.

    Args:
        action: a key of PRESETS.
        granularity: of the activation, where it is quantized; None: one scale for the tensor.
        group_size: inputs that share a weight scale; 0: all of an output channel's; None: the preset's.

    Raises:
        KeyError: there is no such preset.
        ValueError: see `Scheme`.
    """
    preset = PRESETS[action]
    if preset.weight is None:
        return preset
    weight, activation = preset.weight, preset.activation
    if activation is not None and granularity is not None:
        activation = replace(activation, granularity=granularity)
        if activation.granularity == "token-group":
            weight, activation = replace(weight, granularity="blocks"), replace(activation, size=group_size or None)
    if group_size == 0:
        weight = replace(weight, granularity="channel")
    elif group_size is not None:
        weight = replace(weight, granularity="blocks", size=group_size)
    return replace(preset, weight=weight, activation=activation)


def all_schemes() -> Iterator[Scheme]:
    """Every scheme that a recipe can name for a low-precision kernel, without sizes of blocks of its own."""
    names = set()
    for bits in get_args(Bits):
        for granularity in get_args(Granularity):
            for group_size in (None, 0):
                try:
                    scheme = scheme_of(bits, granularity, group_size)
                except ValueError:
                    continue
                if scheme not in names:
                    names.add(scheme)
                    yield scheme
