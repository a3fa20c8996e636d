"""The shapes for which a plan is built."""

from __future__ import annotations

import re
from collections.abc import Mapping

from dq_export.core.documents import printable, shown
from dq_export.core.network import BATCH, Axis
from dq_export.passes.sizes import Dims

from ..backend import BackendError

Shape = tuple[int, ...]
MAX_BATCH = BATCH.limit
"""The greatest batch of an exported graph."""
BATCHES = (1, 2, 16)
"""Least, best and greatest batch if the recipe names no shapes."""


def profiles(inputs: Mapping[str, Dims], flags: tuple[str, str, str]) -> dict[str, tuple[Shape, Shape, Shape]]:
    """Input name -> (least, best, greatest) shape, for the inputs with a dimension that may change.

    If no shape is named, all sizes other than the batch are those of the pictures: a plan for one size is the fastest.

    Args:
        inputs: the inputs of the graph.
        flags: least, best and greatest in trtexec's syntax, `name:2x4x32x32,other:2`; empty for BATCHES.

    Raises:
        BackendError: another syntax, an unknown input, a shape that does not fit its input or the other shapes, or no shape
            for an input with an unknown size.
    """
    bounds = [
        _parse(text, flag, inputs) for text, flag in zip(flags, ("--min-shapes", "--opt-shapes", "--max-shapes"), strict=True)
    ]
    shapes_of: dict[str, tuple[Shape, Shape, Shape]] = {}
    for name, dims in inputs.items():
        if all(isinstance(size, int) for size in dims):
            continue
        batches = list(BATCHES)
        trio = [shapes.get(name) for shapes in bounds]
        if trio[0] is None and trio[1] is not None:
            batches[0] = min(1, trio[1][0])
        if trio[2] is None and trio[1] is not None:
            batches[2] = max(BATCHES[2], trio[1][0])
        if trio[1] is None:
            lowest, greatest = (shape[0] if shape else batch for shape, batch in ((trio[0], BATCHES[0]), (trio[2], BATCHES[2])))
            batches[1] = min(max(BATCHES[1], lowest), greatest)
        low, best, high = (shape or _unnamed(name, dims, trio[1], batch) for shape, batch in zip(trio, batches, strict=True))
        if not all(a <= b <= c for a, b, c in zip(low, best, high, strict=True)):
            raise BackendError(f"'{name}': the shapes must grow from least to best to greatest, found {low}, {best}, {high}")
        shapes_of[name] = (low, best, high)
    _require_alike(inputs, shapes_of)
    return shapes_of


def _require_alike(inputs: Mapping[str, Dims], profiles_of: Mapping[str, tuple[Shape, Shape, Shape]]) -> None:
    """Check that inputs that share an axis have the same sizes of it."""
    first: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, shapes in profiles_of.items():
        for place, axis in enumerate(inputs[name]):
            if not isinstance(axis, Axis):
                continue
            sizes = tuple(shape[place] * axis.divisor for shape in shapes)
            other, expected = first.setdefault(axis.name, (name, sizes))
            if sizes != expected:
                raise BackendError(
                    f"'{name}': its {axis.name} goes {_range(sizes)}, and that of '{other}' {_range(expected)}; give both the "
                    "same sizes"
                )


def _range(sizes: tuple[int, ...]) -> str:
    return "from {} over {} to {}".format(*sizes)


def _unnamed(name: str, dims: Dims, best: Shape | None, batch: int) -> Shape:
    """A shape that the recipe does not name: the best shape, or the graph's with the pictures' sizes, with another batch."""
    sizes: tuple[int | None, ...] = best or tuple(size.length if isinstance(size, Axis) else size for size in dims)
    rest = tuple(size for size in sizes[1:] if size is not None)
    if len(rest) < len(sizes) - 1:
        raise BackendError(f"'{name}' is {_text(dims)}: name its shape with --opt-shapes {name}:AxBxC, where ? may change")
    return (batch if dims[0] is None else sizes[0] or batch, *rest)


def _text(dims: Dims) -> str:
    """`Bx4x?x?`: B is the batch, ? another size that may change."""
    return "x".join(str(size) if isinstance(size, int) else "?" if i else "B" for i, size in enumerate(dims))


def _parse(text: str, flag: str, inputs: Mapping[str, Dims]) -> dict[str, Shape]:
    sizes = {}
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"'?([^':]+)'?:([0-9]{1,9}(?:x[0-9]{1,9})*)", part.strip())
        if match is None:
            raise BackendError(f"{flag} {shown(part)}: expected name:AxBxC, for example {_example(inputs)}")
        name, shape = match[1], tuple(int(number) for number in match[2].split("x"))
        if name not in inputs:
            raise BackendError(f"{flag}: the graph has no input {shown(name)}; it has {', '.join(inputs)}")
        dims = inputs[name]
        if len(shape) != len(dims) or any(
            isinstance(dim, int) and dim != number for dim, number in zip(dims, shape, strict=True)
        ):
            raise BackendError(f"{flag}: '{name}' is {_text(dims)}, found {printable(match[2], 60)}")
        for axis, number in zip(dims, shape, strict=True):
            if isinstance(axis, Axis) and not axis.takes(number):
                raise BackendError(f"{flag}: '{name}' has a {axis.name} of {number}; the graph takes a {axis}")
        if dims[0] is None and not 1 <= shape[0] <= MAX_BATCH:
            raise BackendError(f"{flag}: '{name}' has a batch of {shape[0]}; expected 1 to {MAX_BATCH}, as the graph takes")
        sizes[name] = shape
    return sizes


def _example(inputs: Mapping[str, Dims]) -> str:
    """An example of the flag's value: a batch of 2, for the inputs that may change."""
    changing = {name: dims for name, dims in inputs.items() if not all(isinstance(size, int) for size in dims)}
    sizes = {
        name: [size.length if isinstance(size, Axis) else 2 if size is None else size for size in dims]
        for name, dims in changing.items()
    }
    return ",".join(f"{name}:{'x'.join(map(str, numbers))}" for name, numbers in sizes.items())
