"""The sizes of a graph's inputs that may change in addition to the batch; the export writes them into the file."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from operator import add, floordiv, mul, sub
from typing import Any

import onnx_ir as ir

from dq_export.core.documents import DocumentError, parse_json
from dq_export.core.network import BATCH, Axis

from .base import GraphError

Dims = tuple["int | Axis | None", ...]
"""An input's dimensions: a number, an axis, or None, which is the batch at the first place and an unknown size elsewhere."""
MEASURES = frozenset({"Shape", "Size"})
"""Operators whose result depends only on their input's sizes."""
KEY = "dq_export.sizes"
"""Metadata property of a model: for each axis, its size in the pictures, its greatest size, and the step between sizes."""
DAMAGED = f"the property {KEY} of the graph is damaged; export again"
LARGEST = 1 << 20
"""The greatest size that is accepted from a file."""
LONGEST = 200
"""The greatest number of characters of a dimension's text."""
OPERATORS: dict[type[ast.operator], Any] = {ast.Add: add, ast.Sub: sub, ast.Mult: mul, ast.FloorDiv: floordiv}


def name_sizes(model: ir.Model, axes: Iterable[Axis]) -> None:
    """Name sizes after their axes: the exporter writes a size that is a multiple as a product, `2*height_by_2`."""
    products = {f"{axis.multiple}*{axis.unit}": axis.name for axis in axes}
    for value in _values(model):
        if value.shape is not None and any(str(dim) in products for dim in _texts(value)):
            value.shape = ir.Shape([products.get(dim, dim) if isinstance(dim, str) else dim for dim in _texts(value)])


def write_sizes(model: ir.Model, axes: Iterable[Axis]) -> None:
    """Write into the model the possible sizes of its inputs other than the batch; nothing if none may change."""
    sizes = {axis.name: [axis.size, axis.limit, axis.multiple] for axis in axes}
    if sizes:
        model.metadata_props[KEY] = json.dumps(sizes)


def read_sizes(model: ir.Model) -> dict[str, Axis]:
    """The axes that `write_sizes` wrote, by name; empty if it wrote nothing.

    Raises:
        GraphError: the property is damaged.
    """
    text = model.metadata_props.get(KEY)
    if text is None:
        return {}
    try:
        sizes = parse_json(text, KEY)
    except DocumentError as error:
        raise GraphError(DAMAGED) from error
    if not isinstance(sizes, dict) or not all(map(_valid, sizes.values())):
        raise GraphError(DAMAGED)
    return {name: Axis(name, *numbers) for name, numbers in sizes.items()}


def input_sizes(model: ir.Model) -> dict[str, Dims]:
    """The dimensions of every input of a graph.

    Raises:
        GraphError: see `read_sizes`.
    """
    axes = read_sizes(model)
    return {
        str(value.name): tuple(dim if isinstance(dim, int) else _axis_of(str(dim), axes) for dim in _texts(value))
        for value in model.graph.inputs
    }


def unbatched_inputs(model: ir.Model) -> set[str]:
    """The inputs without a row for each sample, such as positions, whose first dimension is not the batch.

    Raises:
        GraphError: see `read_sizes`.
    """
    return {name for name, sizes in input_sizes(model).items() if isinstance(sizes[0], Axis)}


def size_of(text: str, sizes: Mapping[str, int]) -> int:
    """The number that a dimension's text (`2*height`, `batch`) stands for; 1 if it has an unknown name or operator."""
    if len(text) > LONGEST:
        return 1
    try:
        number = _number(ast.parse(text, mode="eval").body, sizes)
    except (SyntaxError, ValueError, RecursionError, ZeroDivisionError):
        return 1
    return number if number > 0 else 1


def sizes_of(axes: Mapping[str, Axis]) -> dict[str, int]:
    """The value of each size name of the graph in a call of one sample with the sizes of the pictures."""
    units = {axis.unit: axis.size // axis.multiple for axis in axes.values()}
    return {BATCH.name: 1, **units, **{axis.name: axis.size for axis in axes.values()}}


def _axis_of(text: str, axes: Mapping[str, Axis]) -> Axis | None:
    """The axis of a dimension: `height`, or a part of it in steps, `4*height_by_8`, half of the height."""
    match = re.fullmatch(r"(?:([1-9][0-9]{0,6})\*)?(.+)", text)
    if text in axes or match is None:
        return axes.get(text)
    steps, axis = int(match[1] or 1), next((axis for axis in axes.values() if axis.unit == match[2]), None)
    return None if axis is None or axis.multiple % steps else replace(axis, divisor=axis.multiple // steps)


def _number(node: ast.expr, sizes: Mapping[str, int]) -> int:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.Name) and node.id in sizes:
        return sizes[node.id]
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return int(OPERATORS[type(node.op)](_number(node.left, sizes), _number(node.right, sizes)))
    raise ValueError(ast.dump(node))


def _valid(numbers: object) -> bool:
    if not isinstance(numbers, list) or [type(number) for number in numbers] != [int, int, int]:
        return False
    size, limit, multiple = numbers
    return bool(1 <= multiple <= size <= limit <= LARGEST and size % multiple == 0)


def _values(model: ir.Model) -> Iterable[ir.Value]:
    yield from model.graph.inputs
    for node in model.graph.all_nodes():
        yield from node.outputs


def _texts(value: ir.Value) -> tuple[int | str | None, ...]:
    return tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape) if value.shape is not None else ()
