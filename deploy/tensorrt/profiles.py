"""The shapes that a plan is built for."""

from __future__ import annotations

import re
from collections.abc import Mapping

from dq_export.core.documents import printable, shown
from dq_export.core.network import BATCH

from ..backend import BackendError

Shape = tuple[int, ...]
MAX_BATCH = BATCH.limit
"""The greatest batch that the graph is exported for."""
BATCHES = (1, 2, 16)
"""Least, best and greatest batch where the recipe names no shapes."""


def profiles(inputs: Mapping[str, tuple[int | None, ...]], given: tuple[str, str, str]) -> dict[str, tuple[Shape, Shape, Shape]]:
    """Input name -> (least, best, greatest) shape, for the inputs with a dimension that may change.

    Args:
        inputs: the graph's; None is a dimension that may change: the batch where it comes first.
        given: least, best and greatest in trtexec's syntax, `name:2x4x32x32,other:2`; empty where BATCHES serve.

    Raises:
        BackendError: another syntax, an unknown input, a shape that does not fit its input or its neighbours, or none for an
            input with another size that may change than the batch.
    """
    wanted = [
        _parse(text, flag, inputs) for text, flag in zip(given, ("--min-shapes", "--opt-shapes", "--max-shapes"), strict=True)
    ]
    found: dict[str, tuple[Shape, Shape, Shape]] = {}
    for name, dims in inputs.items():
        if None not in dims:
            continue
        batches = list(BATCHES)
        named = [shapes.get(name) for shapes in wanted]
        if named[0] is None and named[1] is not None:
            batches[0] = min(1, named[1][0])
        if named[2] is None and named[1] is not None:
            batches[2] = max(BATCHES[2], named[1][0])
        if named[1] is None:
            least, greatest = (shape[0] if shape else batch for shape, batch in ((named[0], BATCHES[0]), (named[2], BATCHES[2])))
            batches[1] = min(max(BATCHES[1], least), greatest)
        low, best, high = (shape or _unnamed(name, dims, named[1], batch) for shape, batch in zip(named, batches, strict=True))
        if not all(a <= b <= c for a, b, c in zip(low, best, high, strict=True)):
            raise BackendError(f"'{name}': the shapes must grow from least to best to greatest, found {low}, {best}, {high}")
        found[name] = (low, best, high)
    return found


def _unnamed(name: str, dims: tuple[int | None, ...], best: Shape | None, batch: int) -> Shape:
    """A shape that the recipe does not name: the best one, or the graph's, with another batch."""
    sizes = best or dims
    rest = tuple(size for size in sizes[1:] if size is not None)
    if len(rest) < len(sizes) - 1:
        raise BackendError(f"'{name}' is {_text(dims)}: name its shape with --opt-shapes {name}:AxBxC, where ? may change")
    return (dims[0] or batch, *rest)


def _text(dims: tuple[int | None, ...]) -> str:
    """`Bx4x?x?`: B is the batch, ? another size that may change."""
    return "x".join(("?" if i else "B") if size is None else str(size) for i, size in enumerate(dims))


def _parse(text: str, flag: str, inputs: Mapping[str, tuple[int | None, ...]]) -> dict[str, Shape]:
    found = {}
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"'?([^':]+)'?:([0-9]{1,9}(?:x[0-9]{1,9})*)", part.strip())
        if match is None:
            raise BackendError(f"{flag} {shown(part)}: expected name:AxBxC, for example {_example(inputs)}")
        name, shape = match[1], tuple(int(number) for number in match[2].split("x"))
        if name not in inputs:
            raise BackendError(f"{flag}: the graph has no input {shown(name)}; it has {', '.join(inputs)}")
        dims = inputs[name]
        if len(shape) != len(dims) or any(dim not in (None, number) for dim, number in zip(dims, shape, strict=True)):
            raise BackendError(f"{flag}: '{name}' is {_text(dims)}, found {printable(match[2], 60)}")
        if not 1 <= shape[0] <= MAX_BATCH:
            raise BackendError(f"{flag}: '{name}' has a batch of {shape[0]}; expected 1 to {MAX_BATCH}, as the graph takes")
        found[name] = shape
    return found


def _example(inputs: Mapping[str, tuple[int | None, ...]]) -> str:
    """The flag's value for a batch of 2 of the inputs that may change."""
    changing = {name: dims for name, dims in inputs.items() if None in dims}
    return ",".join(f"{name}:{'x'.join(str(2 if size is None else size) for size in dims)}" for name, dims in changing.items())
