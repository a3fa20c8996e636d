"""Read an untrusted ONNX file safely: within bounds, and without following references to other places."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir

from dq_export.core.documents import DocumentError, printable, read_bytes, shown, shown_path

LIMIT = 2 << 30
"""The greatest size, in bytes, of an ONNX file without its data; protobuf cannot write a larger one."""
SMALL = 1 << 10
"""The greatest size, in bytes, of an initializer whose content shape inference may need."""
NODES = 1 << 20
"""The greatest number of nodes of a graph after inlining its functions; the largest known network has 30,000."""
EXTERNAL = 1
INVALID = (RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError)
"""The errors of onnx and onnx_ir on a damaged graph, besides onnx's ValidationError and InferenceError; they have no common
class."""


class ModelFileError(Exception):
    """Not an ONNX model, a model that no runtime can load, or one with wrong data; the message has one line."""


def read_model(path: Path) -> ir.Model:
    """An ONNX file with the shapes and types of all values, as far as they can be inferred.

    External data must lie in the file's own folder, or behind a link from there into the blobs of a hub cache. It is
    mapped, and read when a tensor is used.

    Raises:
        ModelFileError: see the class.
    """
    from google.protobuf.message import DecodeError
    from onnx import ModelProto
    from onnx.checker import ValidationError
    from onnx.shape_inference import InferenceError

    name = shown_path(path)
    try:
        content = read_bytes(path, LIMIT)
        proto = ModelProto.FromString(content)
    except DocumentError as error:
        raise ModelFileError(f"{printable(str(error))}; expected an ONNX file") from error
    except (DecodeError, RecursionError) as error:
        raise ModelFileError(f"{name}: not an ONNX model (not readable as protobuf)") from error
    if not proto.HasField("graph") or not proto.graph.node:
        raise ModelFileError(f"{name}: not an ONNX model: it has no graph with nodes")
    try:
        _require_bounded_functions(proto)
        for tensor in _tensors(proto):
            _require_whole(tensor, path.parent)
        model: ir.Model = ir.from_proto(_inferred(proto))
        return model
    except ModelFileError as error:
        raise ModelFileError(f"{name}: {error}") from error
    except (*INVALID, ValidationError, InferenceError) as error:
        raise ModelFileError(f"{name}: not a valid ONNX model: {printable(_first_line(error))}") from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _tensors(proto: Any) -> Iterator[Any]:
    """Every TensorProto of a model, including those in attributes of nodes and in functions, always in the same order."""
    from onnx import TensorProto

    queue = [proto]
    while queue:
        message = queue.pop()
        if isinstance(message, TensorProto):
            yield message
            continue
        for field, value in message.ListFields():
            if field.type == field.TYPE_MESSAGE:
                queue.extend(value if field.is_repeated else (value,))


def _require_bounded_functions(proto: Any) -> None:
    """Refuse functions that call each other in a circle, or whose calls, written out, make too many nodes."""
    sizes: dict[tuple[str, str], int] = {}
    functions = {(item.domain, item.name): item for item in proto.functions}

    def size(key: tuple[str, str], trail: tuple[tuple[str, str], ...]) -> int:
        if key in trail:
            raise ModelFileError(f"function {shown(key[1])} calls itself")
        if len(trail) > 100:
            raise ModelFileError("more than 100 functions inside one another")
        if key not in sizes:
            sizes[key] = _written_out(functions[key], lambda other: size(other, (*trail, key)) if other in functions else 1)
        return sizes[key]

    total = _written_out(proto.graph, lambda key: size(key, ()) if key in functions else 1)
    if total > NODES:
        raise ModelFileError(f"{total} nodes, functions written out; a graph may have {NODES}")


def _written_out(graph: Any, size: Callable[[tuple[str, str]], int]) -> int:
    total, queue = 0, [graph]
    while queue:
        for node in queue.pop().node:
            total += size((node.domain, node.op_type))
            for attribute in node.attribute:
                queue.extend((attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs)
    return total


def _require_whole(tensor: Any, folder: Path) -> None:
    """Refuse a tensor without the bytes that its shape and type need; replace the path of external data by its real path."""
    subject = f"tensor {shown(tensor.name)}"
    try:
        dtype = ir.DataType(tensor.data_type)
    except ValueError as error:
        raise ModelFileError(f"{subject}: unknown element type {tensor.data_type}") from error
    if any(dim < 0 for dim in tensor.dims):
        raise ModelFileError(f"{subject}: shape {shown(list(tensor.dims))} with a negative size")
    if dtype in (ir.DataType.STRING, ir.DataType.UNDEFINED):
        if tensor.data_location == EXTERNAL:
            raise ModelFileError(f"{subject}: external data of type {dtype.name}")
        return
    expected = math.ceil(math.prod(tensor.dims) * dtype.bitwidth / 8)
    if tensor.data_location == EXTERNAL:
        _locate(tensor, subject, folder, expected)
    elif tensor.HasField("raw_data") and len(tensor.raw_data) != expected:
        raise ModelFileError(
            f"{subject}: {len(tensor.raw_data)} bytes of data, its shape {shown(list(tensor.dims))} needs {expected}"
        )


def _locate(tensor: Any, subject: str, folder: Path, expected: int) -> None:
    """Check the file of a tensor's external data, and write its real path into the tensor."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    file = f"the data file {shown(location)} of {subject}"
    offset, length = _number(entries, "offset", 0, file), _number(entries, "length", expected, file)
    if not location or "\0" in location or os.path.isabs(location) or ".." in Path(location).parts:
        raise ModelFileError(f"{file} is not named by a path inside the model's folder")
    path = folder / location
    real = Path(os.path.realpath(path))
    if not real.is_relative_to(os.path.realpath(folder)) and not _is_blob(folder, real):
        raise ModelFileError(f"{file} is a link that leads out of the model's folder")
    try:
        status = real.stat()
    except OSError as error:
        raise ModelFileError(f"{file} cannot be read ({error.strerror}); it belongs beside the model") from error
    if not stat.S_ISREG(status.st_mode):
        raise ModelFileError(f"{file} is not a regular file")
    if length != expected:
        raise ModelFileError(f"{file} gives it {length} bytes, its shape {shown(list(tensor.dims))} needs {expected}")
    if offset + length > status.st_size:
        raise ModelFileError(f"{file} is cut short: {status.st_size} bytes of at least {offset + length}; download it again")
    del tensor.external_data[:]
    for key, value in (("location", str(real)), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)


def _number(entries: dict[str, str], key: str, default: int, file: str) -> int:
    text = entries.get(key, "")
    if not text:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise ModelFileError(f"{file}: {key} {shown(text)} is not a whole number of bytes")
    return int(text)


def _is_blob(folder: Path, real: Path) -> bool:
    """Whether a file is in the hub cache that `folder` is a snapshot of: models--x/{snapshots/REVISION, blobs}."""
    whole = Path(os.path.abspath(folder))
    caches = [parent.parent for parent in (whole, *whole.parents) if parent.name == "snapshots"]
    return any(real.parent == Path(os.path.realpath(cache)) / "blobs" for cache in caches)


def _inferred(proto: Any) -> Any:
    """The model with inferred shapes, after a check by onnx's own checker without the weights.

    Weights are removed before and put back after: the checker looks for external data, and both functions copy the whole model.
    """
    import onnx

    inputs = {value.name for value in proto.graph.input}
    small = [item for item in proto.graph.initializer if item.data_location != EXTERNAL and item.ByteSize() <= SMALL]
    weights = [item for item in proto.graph.initializer if item.data_location == EXTERNAL or item.ByteSize() > SMALL]
    names = {item.name for item in weights}
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(small)
    proto.graph.input.extend(
        onnx.helper.make_tensor_value_info(item.name, item.data_type, item.dims) for item in weights if item.name not in inputs
    )
    inner = _taken_out(proto)
    shapeless = [value.type.tensor_type for value in (*proto.graph.input, *proto.graph.output) if _is_shapeless(value)]
    for kind in shapeless:  # the checker requires a shape here, and no runtime does
        kind.shape.SetInParent()
    onnx.checker.check_model(proto)
    for kind in shapeless:
        kind.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(proto)
    for index, tensor in enumerate(_tensors(inferred)):
        if index in inner:
            tensor.CopyFrom(inner[index])
    inputs_left = [value for value in inferred.graph.input if value.name in inputs or value.name not in names]
    del inferred.graph.input[:]
    inferred.graph.input.extend(inputs_left)
    inferred.graph.initializer.extend(weights)
    return inferred


def _taken_out(proto: Any) -> dict[int, Any]:
    """Make the external tensors of nodes and bodies empty, and return them by their place among all tensors."""
    from onnx import TensorProto

    contents = {}
    for index, tensor in enumerate(_tensors(proto)):
        if tensor.data_location == EXTERNAL:
            contents[index] = TensorProto()
            contents[index].CopyFrom(tensor)
            tensor.Clear()
            tensor.name, tensor.data_type, tensor.raw_data = contents[index].name, contents[index].data_type, b""
            tensor.dims.append(0)
    return contents


def _is_shapeless(value: Any) -> bool:
    return value.type.HasField("tensor_type") and not value.type.tensor_type.HasField("shape")
