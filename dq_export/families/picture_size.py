"""Pictures of another size than a network's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dq_export.core.network import Axis, Input, axes_of, resized

from .family import Family
from .reference import ModelError


def inputs_at(family: Family, inputs: Sequence[Input], height: int, width: int) -> tuple[Input, ...]:
    """The inputs of a network for pictures of the given size in pixels.

    Raises:
        ModelError: the network does not draw that size.
    """
    axes, unit = {axis.name: axis for axis in axes_of(inputs)}, family.unit
    if not unit:
        raise ModelError(f"size {height}x{width}: family {family.name} draws pictures of one size; leave it out")
    sizes = family.sizes(height // unit, width // unit)
    if height % unit or width % unit or not all(axes[name].takes(size) for name, size in sizes.items()):
        limits = ", ".join(str(axes[name]) for name in sizes)
        raise ModelError(
            f"size {height}x{width}: expected HEIGHTxWIDTH in steps of {unit} pixels, which the network takes as {limits}"
            f"{_nearest(axes, height, width, unit)}"
        )
    return resized(inputs, sizes)


def _nearest(axes: Mapping[str, Axis], height: int, width: int, unit: int) -> str:
    """A phrase with the nearest size of a network that has a height and a width; empty for one whose sizes are tokens."""
    if not axes.keys() >= {"height", "width"}:
        return ""
    sizes = []
    for name, pixels in (("height", height), ("width", width)):
        step = unit * axes[name].multiple
        sizes.append(min(max(round(pixels / step), 1) * step, unit * axes[name].limit))
    return f"; the nearest is {sizes[0]}x{sizes[1]}"
