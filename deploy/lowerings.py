"""A backend's answer about a scheme: the lowering that runs it, or a refusal."""

from __future__ import annotations

from dataclasses import dataclass

from dq_export.core.scheme import BLOCK_SIZES, Scheme


@dataclass(frozen=True)
class Lowering:
    """How a backend runs a scheme.

    Args:
        how: a description.
        kernel: a part of the kernel's name in the audit; empty for any kernel.
    """

    how: str
    kernel: str

    def __str__(self) -> str:
        return self.how


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
    how = "one integer GEMM"
    if scheme.per_token:
        how += " between two Muls by the token's scale"
    if scheme.two_level:
        how += "; int4 codes are widened to 8 bits when the engine is loaded"
    return Lowering(how, kernel)


def unpacked_blocks(scheme: Scheme, how: str = "") -> Lowering | Refusal:
    """The lowering of a scheme whose weight is unpacked in blocks by ONNX Runtime's MatMulNBits.

    Args:
        how: what else the kernel does, in words.
    """
    weight = scheme.weight
    if weight is not None and weight.size is not None and weight.size not in BLOCK_SIZES:
        size = next((size for size in BLOCK_SIZES if weight.size % size == 0), None)
        return Refusal(f"its kernel unpacks blocks of {', '.join(map(str, BLOCK_SIZES))}", scheme.resized(size))
    return Lowering(f"MatMulNBits: blocks unpacked inside the GEMM{how}", "MatMulNBits")
