"""Rules for the files of a repository: programs, graphs, external data, links and pickles."""

from __future__ import annotations

import ast
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dq_export.core.documents import DocumentError, shown

from .model_folder import FILES, NAME_LIMIT, Fault, Model, type_of

MAX_ENTRIES = 100_000
"""The greatest number of files and folders of a repository."""
PROGRAM_LIMIT, GRAPH_LIMIT = 1 << 20, 2 << 30
"""Greatest sizes in bytes of a model.py, and of a graph without its external data (the limit of protobuf)."""
PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt", ".joblib")
ONNX_TYPES = {
    1: "TYPE_FP32", 2: "TYPE_UINT8", 3: "TYPE_INT8", 4: "TYPE_UINT16", 5: "TYPE_INT16", 6: "TYPE_INT32", 7: "TYPE_INT64",
    8: "TYPE_STRING", 9: "TYPE_BOOL", 10: "TYPE_FP16", 11: "TYPE_FP64", 12: "TYPE_UINT32", 13: "TYPE_UINT64", 16: "TYPE_BF16",
}  # fmt: skip
"""Triton's name of each ONNX element type. Source: onnx.proto, TensorProto.DataType."""


def stray(folder: Path) -> Iterator[Fault]:
    """Report links out of the repository, devices and pipes, and files that can run code when they are loaded."""
    root = os.path.realpath(folder)
    for count, path in enumerate(_entries(folder)):
        inside = path.relative_to(folder)
        name = inside.parts[0]
        if count == MAX_ENTRIES:
            problem = f"more than {MAX_ENTRIES} files and folders"
            yield Fault(model="", severity="error", problem=problem, fix="pass a model repository alone")
            return
        if path.is_symlink():
            target = Path(os.path.realpath(path))
            if not target.is_relative_to(root):
                fix = "copy the file: a link is not there on another machine"
                yield Fault(model=name, severity="error", problem=f"{inside} is a link out of the repository", fix=fix)
            elif not path.exists():
                yield Fault(model=name, severity="error", problem=f"{inside} is a link to nothing, or to itself", fix="remove it")
        elif not path.is_file() and not path.is_dir():
            fix = "remove it: a repository holds files and folders"
            yield Fault(model=name, severity="error", problem=f"{inside} is a pipe, a socket or a device", fix=fix)
        if path.suffix in PICKLES:
            problem = f"{inside}: a pickle can run code when it is loaded"
            yield Fault(model=name, severity="warning", problem=problem, fix="convert it to safetensors or .npy, or remove it")


def _entries(folder: Path) -> Iterator[Path]:
    """Yield every file and folder below a folder. Links are not followed; unreadable folders are left out."""
    for place, folders, files in os.walk(folder):
        folders.sort()
        yield from (Path(place) / name for name in sorted((*folders, *files)))


def versions(model: Model) -> Iterator[Fault]:
    """Check that every version folder holds the file that the backend loads."""
    if model.backend == "ensemble":
        if not model.versions:
            yield model.fault("no version folder", "make an empty folder 1")
        return
    if not model.versions:
        yield model.fault("no version folder", "put the model into a folder 1")
    numbers = {int(path.name) for path in model.versions}
    for version in model.config.version_policy.specific.versions:
        if int(version) not in numbers:
            yield model.fault(f"version_policy: there is no version {version}", "name versions that are there")
    name = model.file
    if "/" in name or "\0" in name or name in (".", "..") or len(os.fsencode(name)) > NAME_LIMIT:
        fix = "write a plain file name inside the version's folder"
        yield model.fault(f"default_model_filename: {shown(name)} is a path, or no name", fix)
        return
    for path in model.versions if name else ():
        file = path / name
        if model.backend == "onnxruntime" and file.is_dir():  # with graph and data inside
            file = file / name
        if not file.exists() or (file.is_file() and not file.stat().st_size):
            yield model.fault(f"{file.relative_to(model.folder)} is missing or empty", "copy it there")
        elif model.backend in FILES and not file.is_file():
            yield model.fault(f"{file.relative_to(model.folder)} is not a file", "copy it there")
        elif model.backend == "python":
            yield from _program(model, file)


def _program(model: Model, file: Path) -> Iterator[Fault]:
    """Check model.py by its syntax tree. It is never run."""
    place = f"{file.parent.name}/{file.name}"
    try:
        source = model.read(file, PROGRAM_LIMIT)
        with warnings.catch_warnings():  # an odd escape in a text is not a fault
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except DocumentError as error:
        yield model.fault(f"{place}: {error}", "write a model.py there")
        return
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # the last two: nested too deeply for the parser
        yield model.fault(f"{place}: {error or 'nested too deeply'}", "correct it")
        return
    if not any(isinstance(node, ast.ClassDef) and node.name == "TritonPythonModel" for node in tree.body):
        yield model.fault(f"{place}: no class TritonPythonModel", "define it")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and "InferenceRequest" in (getattr(node.func, "attr", ""), getattr(node.func, "id", "")):
            targets = [k.value.value for k in node.keywords if k.arg == "model_name" and isinstance(k.value, ast.Constant)]
            for target in targets:
                if isinstance(target, str) and target not in model.names:
                    yield model.fault(
                        f"{file.name} calls model {shown(target)}, which is not in the repository", "add it, or correct the name"
                    )


def onnx_graph(model: Model) -> Iterator[Fault]:
    """Check names, types and shapes against the graph, and the graph's external data."""
    if model.backend != "onnxruntime":
        return
    import onnx
    from google.protobuf.message import DecodeError

    for version in model.versions:
        path = version / model.file
        path = path / model.file if path.is_dir() else path
        if not path.exists():
            continue
        try:
            graph = onnx.load_model_from_string(model.read(path, GRAPH_LIMIT)).graph
        except (DecodeError, DocumentError) as error:
            yield model.fault(f"{version.name}/{model.file} is not ONNX ({error})", "copy it again")
            continue
        initializers = {item.name for item in graph.initializer}
        inputs = [value for value in graph.input if value.name not in initializers]
        for kind, values in (("input", inputs), ("output", list(graph.output))):
            yield from _signature(model, kind, {value.name: value.type.tensor_type for value in values})
        yield from _external(model, path.parent, _tensors(graph))


def _tensors(graph: Any) -> Iterator[Any]:
    """Yield every stored tensor of a graph and of its subgraphs."""
    graphs = [graph]
    while graphs:
        current = graphs.pop()
        yield from current.initializer
        for sparse in current.sparse_initializer:
            yield from (sparse.values, sparse.indices)
        for attribute in (item for node in current.node for item in node.attribute):
            yield from (attribute.t, *attribute.tensors)
            graphs += [attribute.g, *attribute.graphs] if attribute.HasField("g") or attribute.graphs else []


def _signature(model: Model, kind: str, values: Mapping[str, Any]) -> Iterator[Fault]:
    entries = list(getattr(model.config, kind))
    counts = Counter(item.name for item in entries)
    for name in sorted(name for name, count in counts.items() if count > 1):
        yield model.fault(f"{kind} '{name}' is listed twice", "remove one")
    if kind == "input":
        for name in sorted(values.keys() - set(counts)):
            yield model.fault(f"the graph's {kind} '{name}' is not listed", "add it")
    for item in entries:
        if item.name not in values:
            yield model.fault(f"{kind} '{item.name}' is not in the graph", f"expected {', '.join(values)}")
            continue
        value = values[item.name]
        expected = ONNX_TYPES.get(value.elem_type, "a type that Triton lacks")
        actual = type_of(item)
        if actual != expected:
            yield model.fault(f"{kind} '{item.name}' is {actual}, in the graph {expected}", f"write {expected}")
        yield from _shape(model, kind, item, [dim.dim_value or -1 for dim in value.shape.dim])


def _shape(model: Model, kind: str, item: Any, shape: list[int]) -> Iterator[Fault]:
    dims = list(item.reshape.shape) if item.HasField("reshape") else list(item.dims)
    if model.config.max_batch_size:
        if not shape or shape[0] != -1:
            problem = f"{kind} '{item.name}': the graph's first dimension is {shape[0] if shape else 'missing'}, not a free batch"
            yield model.fault(problem, "export with a dynamic batch, or write max_batch_size: 0")
            return
        shape = shape[1:]
    if len(dims) != len(shape) or any(a != b and -1 not in (a, b) for a, b in zip(dims, shape, strict=True)):
        fix = "write the graph's dims without the batch; for a scalar input dims: [ 1 ] reshape { shape: [ ] }"
        yield model.fault(f"{kind} '{item.name}' has dims {shown(dims)}, in the graph {shown(shape)}", fix)


def _external(model: Model, folder: Path, tensors: Iterable[Any]) -> Iterator[Fault]:
    ends: dict[str, int] = {}
    for item in tensors:
        entry = {pair.key: pair.value for pair in item.external_data}
        if "location" in entry:
            offset, length = (entry.get(key, "0") for key in ("offset", "length"))
            if not all(text.isascii() and text.isdigit() and len(text) < 20 for text in (offset, length)):
                problem = f"external data of {shown(item.name)}: offset {shown(offset)}, length {shown(length)}"
                yield model.fault(f"{problem} are not sizes", "save the model again")
                continue
            ends[entry["location"]] = max(int(offset) + int(length), ends.get(entry["location"], 0))
    for location, end in ends.items():
        if not location or "\0" in location or any(len(os.fsencode(part)) > NAME_LIMIT for part in location.split("/")):
            yield model.fault(f"external data {shown(location)} names no file", "save the model again")
            continue
        path = folder / location
        if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
            yield model.fault(f"external data '{location}' lies outside the model's folder", "save the model again")
        elif not path.is_file():
            yield model.fault(f"external data '{location}' is missing", "copy it beside the graph")
        elif path.stat().st_size < end:
            yield model.fault(f"external data '{location}' is cut short: {path.stat().st_size} of {end} bytes", "copy it again")
