"""Which axes of a value hold the channels, on both sides of a node that only rearranges elements.

Channels are held by one or more axes, slowest first: (2,) in [B, T, K], (1, 3) in [B, heads, T, K / heads].
"""

from __future__ import annotations

import math

import onnx_ir as ir

from ..base import constant

Axes = tuple[int, ...]
Dim = object
LAYOUT = ("Reshape", "Transpose", "Unsqueeze", "Squeeze", "Cast", "Identity")


def dims(value: ir.Value | None) -> tuple[Dim, ...] | None:
    """The value's sizes: numbers, names of symbolic sizes, and for unknown sizes objects that equal nothing else."""
    if value is None or value.shape is None:
        return None
    return tuple(dim if isinstance(dim, int) else dim.value or object() for dim in value.shape)


def size(value: ir.Value | None, axes: Axes) -> int:
    """The number of elements along some axes; 0 if an axis is unknown or missing."""
    shape = dims(value)
    if shape is None or not all(0 <= axis < len(shape) for axis in axes):
        return 0
    sizes = [shape[axis] for axis in axes]
    return math.prod(item for item in sizes if isinstance(item, int)) if all(isinstance(s, int) for s in sizes) else 0


def before(node: ir.Node, axes: Axes) -> Axes | None:
    """The axes of a LAYOUT node's input that hold the elements of `axes` of its result; None if there are no such axes."""
    return _across(node, axes, node.outputs[0], node.inputs[0], forward=False)


def after(node: ir.Node, axes: Axes) -> Axes | None:
    """The axes of a LAYOUT node's result that hold the elements of `axes` of its input; None if there are no such axes."""
    return _across(node, axes, node.inputs[0], node.outputs[0], forward=True)


def _across(node: ir.Node, axes: Axes, source: ir.Value | None, target: ir.Value | None, *, forward: bool) -> Axes | None:
    if node.op_type in ("Cast", "Identity"):
        return axes
    if node.op_type == "Transpose":
        perm = list(node.attributes.get_ints("perm", ()))
        if not perm:
            return None
        return tuple(perm.index(axis) for axis in axes) if forward else tuple(perm[axis] for axis in axes)
    near, far = dims(source), dims(target)
    if near is None or far is None:
        return None
    if node.op_type == "Reshape":
        return _reshaped(near, far, axes)
    return _squeezed(node, axes, len(near), len(far))


def _squeezed(node: ir.Node, axes: Axes, near: int, far: int) -> Axes | None:
    """Across Unsqueeze or Squeeze, from the side with `near` axes to that with `far`."""
    listed = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if listed is None:
        return None
    wide = max(near, far)
    single = {int(axis) % wide for axis in listed.reshape(-1)}
    remaining = [axis for axis in range(wide) if axis not in single]
    if near < far:
        return tuple(remaining[axis] for axis in axes)
    return None if single & set(axes) else tuple(remaining.index(axis) for axis in axes)


def _reshaped(near: tuple[Dim, ...], far: tuple[Dim, ...], axes: Axes) -> Axes | None:
    parts = _aligned(near, far)
    across: list[int] = []
    rest = list(axes)
    while rest:
        part = next(((a, b) for a, b in parts if rest[0] in a), None)
        if part is None or min(map(len, part)) > 1:
            return None
        inner = [axis for axis in part[0] if near[axis] != 1 or axis in rest]
        if rest[: len(inner)] != inner:
            return None  # only some of the joined axes hold channels
        across += part[1]
        rest = rest[len(inner) :]
    return tuple(axis for axis in across if far[axis] != 1) or tuple(across[:1])


def _aligned(near: tuple[Dim, ...], far: tuple[Dim, ...]) -> list[tuple[list[int], list[int]]]:
    """Groups of axes on both sides that hold the same elements, matched from the front and from the back as far as sizes are
    known."""
    front = _groups(near, far)
    back = [
        ([len(near) - 1 - i for i in reversed(a)], [len(far) - 1 - i for i in reversed(b)])
        for a, b in _groups(near[::-1], far[::-1])
    ]
    axes_of_front = {axis for a, _ in front for axis in a}
    return front + [part for part in back if not axes_of_front & set(part[0])]


def _groups(near: tuple[Dim, ...], far: tuple[Dim, ...]) -> list[tuple[list[int], list[int]]]:
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(near) and j < len(far):
        left, right = [i], [j]
        if near[i] != far[j]:
            while True:
                sizes = [near[k] for k in left], [far[k] for k in right]
                if not all(isinstance(s, int) for both in sizes for s in both):
                    return groups
                a, b = (math.prod(s for s in both if isinstance(s, int)) for both in sizes)
                if a == b:
                    break
                side, shape = (left, near) if a < b else (right, far)
                if side[-1] + 1 >= len(shape):
                    return groups
                side.append(side[-1] + 1)
        groups.append((left, right))
        i, j = left[-1] + 1, right[-1] + 1
    return groups
