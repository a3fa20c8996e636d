"""A backend's answer about a scheme: the lowering that runs it, or a refusal."""

from __future__ import annotations

from dataclasses import dataclass

from dq_export.core.scheme import BLOCK_SIZES, Scheme


@dataclass(frozen=True)
class Lowering:
    """How a backend runs a scheme.

    Args:
        description: one phrase.
        kernel: a part of the kernel's name in the audit; empty for any kernel.
    """

    description: str
    kernel: str

    def __str__(self) -> str:
        return self.description


@dataclass(frozen=True)
class Refusal:
    """Why a backend does not run a scheme.

    Args:
        reason: the reason, without the scheme's name.
        nearest: the nearest scheme that the same backend runs.
    """

    reason: str
    nearest: Scheme

    def __str__(self) -> str:
        return f"{self.reason}; the nearest is {self.nearest}"


ANY_KERNEL = Lowering("any kernel that the runtime chooses", "")
"""For a scheme that needs no low-precision kernel."""


def integer_gemm(scheme: Scheme, kernel: str) -> Lowering:
    """The lowering of a scheme whose GEMM multiplies 8-bit codes, which also hold narrower types."""
    text = "one integer GEMM"
    if scheme.per_token:
        text += " between two Muls by the token's scale"
    if scheme.two_level:
        text += "; int4 codes are widened to 8 bits when the engine is loaded"
    return Lowering(text, kernel)


def unpacked_blocks(scheme: Scheme, detail: str = "") -> Lowering | Refusal:
    """The lowering of a scheme whose weight is unpacked in blocks by ONNX Runtime's MatMulNBits.

    Args:
        detail: what else the kernel does, as the end of a phrase.
    """
    weight = scheme.weight
    if weight is not None and weight.size is not None and weight.size not in BLOCK_SIZES:
        size = next((size for size in BLOCK_SIZES if weight.size % size == 0), None)
        return Refusal(f"its kernel unpacks blocks of {', '.join(map(str, BLOCK_SIZES))}", scheme.resized(size))
    return Lowering(f"MatMulNBits: blocks unpacked inside the GEMM{detail}", "MatMulNBits")
