"""The float network as an ONNX file that uses the checkpoint's own bytes as weights."""

from __future__ import annotations

import io
import logging
import os
import re
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from dq_export.core.documents import shown_path
from dq_export.passes.base import GraphError
from dq_export.passes.match import SCOPES

from ..collector import collector_paused
from .config_values import reason_of
from .idle_nodes import drop_idle
from .known_sizes import use_known_sizes
from .reference import ModelError
from .tensors import stored

FLOAT = ir.DataType.FLOAT
Dims = Mapping[int, Any]
SYMBOL = re.compile(r"\bs\d+\b")
"""The exporter's names of sizes."""
INLINE = 1024
"""The greatest size, in bytes, of a tensor that stays in the graph file."""
TESTED = "torch 2.13, diffusers 0.42"
"""What the tests run with, by constraints.txt for Python 3.11."""
DAMAGED = "not the float graph that an export writes; remove its folder and run the export again"


def trace(network: Any, example: tuple[Any, ...], inputs: list[str], outputs: list[str], dynamic: Sequence[Dims]) -> ir.Model:
    """Export a torch module with torch's own exporter (opset 21), weights untouched.

    torch.export gets the named dimensions first, and the exporter gets its result: by itself the exporter gives dimensions of
    one name several symbols, and fails if a network reshapes by one of them and adds a tensor with another.

    Weights that the exporter's optimiser transposed become the parameter and a Transpose again, so nothing is copied.

    Args:
        network: its parameters' names, after `network.state_dict()`, become the initializers' names. Its `forward` takes
            `*values`.
        example: the values.
        dynamic: for each value, the torch.export.Dim of every axis that may change.
    """
    import torch

    with _quiet():
        exported = torch.export.export(network, example, dynamic_shapes={"values": tuple(dynamic)}, strict=False)
        program = torch.onnx.export(
            exported, dynamo=True, opset_version=21, input_names=inputs, output_names=outputs, verbose=False
        )
    assert program is not None
    model: ir.Model = program.model
    program.rename_axes(_names_of_sizes(model, dynamic))
    _forget_sources(model)
    drop_idle(model)
    use_known_sizes(model)
    _name_parameters(model, network.state_dict())
    return model


def save(model: ir.Model, path: Path, weights: Sequence[Path], prefix: str, changed: Collection[str] = ()) -> None:
    """Write the graph; float32 weights of the checkpoint's files are read through links to these files.

    The link is a hard link, or a copy if the file system has none. All other weights go to `<path>.data`.

    Args:
        weights: the checkpoint's files.
        prefix: the prefix of the graph's names, which the checkpoint's names do not have.
        changed: names of weights that differ from those of the files.
    """
    places = {prefix + name: place for file in weights for name, place in stored(file).items() if name not in changed}
    written = []
    for initializer in model.graph.initializers.values():
        tensor = initializer.const_value
        if tensor is None or tensor.nbytes <= INLINE:
            continue
        name = str(initializer.name)
        place = places.get(name)
        if place and place.float32 and place.offset is not None and (tensor.dtype, tuple(tensor.shape)) == (FLOAT, place.shape):
            linked = path.parent / place.file.name
            if not linked.exists():
                link(place.file, linked)
            initializer.const_value = ir.ExternalTensor(
                linked.name, place.offset, tensor.nbytes, FLOAT, shape=ir.Shape(place.shape), name=name, base_dir=path.parent
            )
        else:
            written.append(initializer)
    tensors = [value.const_value for value in written if value.const_value is not None]
    external = ir.external_data.convert_tensors_to_external(tensors, path.parent, f"{path.name}.data")
    for initializer, tensor in zip(written, external, strict=True):
        initializer.const_value = tensor
    ir.save(model, path)


def load(path: Path) -> ir.Model:
    """Read a graph that `save` wrote; weights are memory-mapped.

    onnx and onnx_ir refuse external data with several hard links, to protect against foreign files in a model; here the
    export itself made the links.

    Raises:
        GraphError: the file or its weights are damaged.
    """
    from google.protobuf.message import DecodeError

    try:
        model = ir.load(path)
        _map_weights(model, path.parent)
    except (DecodeError, ir.serde.SerdeError, OSError, TypeError, ValueError) as error:
        raise GraphError(f"{shown_path(path)}: {DAMAGED}") from error
    return model


def _map_weights(model: ir.Model, folder: Path) -> None:
    files: dict[str, np.memmap[Any, np.dtype[np.uint8]]] = {}
    for initializer in model.graph.initializers.values():
        tensor = initializer.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        name = Path(tensor.location).name
        if name not in files:
            files[name] = np.memmap(folder / name, dtype=np.uint8, mode="r")
        start = tensor.offset or 0
        content = files[name][start : start + tensor.nbytes].view(tensor.dtype.numpy()).reshape(tensor.shape.numpy())
        initializer.const_value = ir.tensor(content, name=tensor.name)


def _forget_sources(model: ir.Model) -> None:
    """Keep only the module names of the exporter's notes: stack traces contain this machine's paths, and bytes would differ."""
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        scopes = node.metadata_props.get(SCOPES)
        node.metadata_props.clear()
        if scopes is not None:
            node.metadata_props[SCOPES] = scopes


def _names_of_sizes(model: ir.Model, dynamic: Sequence[Dims]) -> dict[str, str]:
    """The names of the dimensions by the exporter's symbols; a multiple of a dimension also gives the dimension's name."""
    names: dict[str, str] = {}
    for value, dims in zip(model.graph.inputs, dynamic, strict=True):
        for axis, dim in dims.items():
            size = value.shape[axis] if value.shape is not None else None
            text = size.value if isinstance(size, ir.SymbolicDim) else None
            if text is not None:
                root = dim.root if hasattr(dim, "root") else dim  # of a multiple
                names |= dict.fromkeys(SYMBOL.findall(text), root.__name__) | {text: dim.__name__}
    return names


def _name_parameters(model: ir.Model, state: Mapping[str, Any]) -> None:
    """Give the parameter's name to constants that view the parameter's memory in another layout."""
    _name_transposed(model, state)
    _name_lengthened(model, state)


def _name_lengthened(model: ir.Model, state: Mapping[str, Any]) -> None:
    """A constant that is a parameter with axes of 1 before it takes the parameter's name, and keeps its shape."""
    graph = model.graph
    at = {value.data_ptr(): name for name, value in state.items() if name not in graph.initializers}
    for initializer in list(graph.initializers.values()):
        content = initializer.const_value.numpy() if initializer.const_value is not None else None
        name = at.get(content.ctypes.data) if content is not None and initializer.name not in state else None
        if content is None or name is None or name in graph.initializers:
            continue
        shape_of_parameter = tuple(state[name].shape)
        added = content.ndim - len(shape_of_parameter)
        if added > 0 and content.shape == (1,) * added + shape_of_parameter and content.flags.c_contiguous:
            del graph.initializers[str(initializer.name)]
            initializer.name = name
            graph.register_initializer(initializer)


def _name_transposed(model: ir.Model, state: Mapping[str, Any]) -> None:
    """MatMul(x, constant), where the constant is a transposed view of a parameter -> MatMul(x, Transpose(parameter))."""
    graph = model.graph
    at = {value.data_ptr(): name for name, value in state.items() if value.ndim == 2}
    for initializer in list(graph.initializers.values()):
        tensor = initializer.const_value
        if tensor is None or tensor.nbytes <= INLINE or len(tensor.shape) != 2 or initializer.name in state:
            continue
        name = at.get(tensor.numpy().ctypes.data)
        if name is None or tuple(tensor.shape) != tuple(reversed(state[name].shape)):
            continue
        parameter = graph.initializers.get(name)
        if parameter is None:
            content = ir.tensor(state[name].numpy(), name=name)
            shape = ir.Shape(state[name].shape)
            parameter = ir.Value(name=name, const_value=content, shape=shape, type=ir.TensorType(content.dtype))
            graph.register_initializer(parameter)
        users = list(initializer.uses())
        node = ir.node("Transpose", [parameter], attributes={"perm": [1, 0]}, name=f"{name}.transposed")
        node.outputs[0].shape, node.outputs[0].dtype = initializer.shape, tensor.dtype
        graph.insert_before(users[0][0], node)
        for user, index in users:
            user.replace_input_with(index, node.outputs[0])
        del graph.initializers[str(initializer.name)]


def link(file: Path, target: Path) -> None:
    """Hard-link a file, behind whatever links lead to it, or copy it where the file system cannot."""
    try:
        os.link(file.resolve(), target)
    except OSError:
        shutil.copyfile(file, target)


@contextmanager
def exporting(kind: str) -> Iterator[None]:
    """While active, errors of the exporter on a network of this class become a ModelError."""
    try:
        yield
    except (ImportError, MemoryError, OSError):  # the machine's, not the network's
        raise
    except Exception as error:  # of the exporter, which runs the network's code and has exceptions of many bases
        raise ModelError(
            f"PyTorch's exporter makes no graph of {kind} ({reason_of(error)}); try another version of PyTorch or "
            f"diffusers, best those of the tests: {TESTED}"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter, and stop the garbage collector, which takes a third of the time for walking its graphs."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)  # it warns of every optional package that is not installed
    quiet = redirect_stderr(io.StringIO())  # of a network that it cannot trace it prints a listing
    try:
        with collector_paused(), warnings.catch_warnings(), quiet:
            warnings.simplefilter("ignore")  # the exporter's own deprecations
            yield
    finally:
        logging.disable(disabled)
