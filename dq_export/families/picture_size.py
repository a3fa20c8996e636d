"""Pictures of another size than a network's own."""

from __future__ import annotations

from collections.abc import Sequence

from dq_export.core.network import Input, axes_of, resized

from .family import Family
from .reference import ModelError


def inputs_at(family: Family, inputs: Sequence[Input], height: int, width: int) -> tuple[Input, ...]:
    """The inputs of a network for pictures of so many pixels.

    Raises:
        ModelError: the network does not draw that size.
    """
    axes, unit = {axis.name: axis for axis in axes_of(inputs)}, family.unit
    if not unit:
        raise ModelError(f"size {height}x{width}: family {family.name} draws pictures of one size; leave it out")
    sizes = family.sizes(height // unit, width // unit)
    if height % unit or width % unit or not all(axes[name].takes(size) for name, size in sizes.items()):
        most = ", ".join(str(axes[name]) for name in sizes)
        raise ModelError(
            f"size {height}x{width}: expected HEIGHTxWIDTH in steps of {unit} pixels, which the network takes as {most}"
        )
    return resized(inputs, sizes)
