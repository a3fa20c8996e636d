"""What the files of a repository show: programs, graphs, external data, links and pickles."""

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

MOST_ENTRIES = 100_000
"""Files and folders of a repository."""
PROGRAM_LIMIT, GRAPH_LIMIT = 1 << 20, 2 << 30
"""Bytes of a model.py, and of a graph without its external data: protobuf takes no more."""
PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt", ".joblib")
ONNX_TYPES = {
    1: "TYPE_FP32", 2: "TYPE_UINT8", 3: "TYPE_INT8", 4: "TYPE_UINT16", 5: "TYPE_INT16", 6: "TYPE_INT32", 7: "TYPE_INT64",
    8: "TYPE_STRING", 9: "TYPE_BOOL", 10: "TYPE_FP16", 11: "TYPE_FP64", 12: "TYPE_UINT32", 13: "TYPE_UINT64", 16: "TYPE_BF16",
}  # fmt: skip
"""By ONNX's number of an element type. Source: onnx.proto, TensorProto.DataType."""


def stray(folder: Path) -> Iterator[Fault]:
    """Files that leave the repository, that are no files, or that run code when they are loaded."""
    root = os.path.realpath(folder)
    for count, path in enumerate(_entries(folder)):
        inside = path.relative_to(folder)
        name = inside.parts[0]
        if count == MOST_ENTRIES:
            what = f"more than {MOST_ENTRIES} files and folders"
            yield Fault(model="", severity="error", what=what, fix="pass a model repository alone")
            return
        if path.is_symlink():
            target = Path(os.path.realpath(path))
            if not target.is_relative_to(root):
                fix = "copy the file: a link is not there on another machine"
                yield Fault(model=name, severity="error", what=f"{inside} is a link out of the repository", fix=fix)
            elif not path.exists():
                yield Fault(model=name, severity="error", what=f"{inside} is a link to nothing, or to itself", fix="remove it")
        elif not path.is_file() and not path.is_dir():
            fix = "remove it: a repository holds files and folders"
            yield Fault(model=name, severity="error", what=f"{inside} is a pipe, a socket or a device", fix=fix)
        if path.suffix in PICKLES:
            what = f"{inside}: a pickle can run code when it is loaded"
            yield Fault(model=name, severity="warning", what=what, fix="convert it to safetensors or .npy, or remove it")


def _entries(folder: Path) -> Iterator[Path]:
    """Everything in a folder, links not followed, folders that may not be read left out."""
    for place, folders, files in os.walk(folder):
        folders.sort()
        yield from (Path(place) / name for name in sorted((*folders, *files)))


def versions(model: Model) -> Iterator[Fault]:
    """Every version holds what its backend loads."""
    if model.backend == "ensemble":
        if not model.versions:
            yield model.fault("no version folder", "make an empty folder 1")
        return
    if not model.versions:
        yield model.fault("no version folder", "put the model into a folder 1")
    there = {int(path.name) for path in model.versions}
    for version in model.config.version_policy.specific.versions:
        if int(version) not in there:
            yield model.fault(f"version_policy: there is no version {version}", "name versions that are there")
    name = model.file
    if "/" in name or "\0" in name or name in (".", "..") or len(os.fsencode(name)) > NAME_LIMIT:
        fix = "write a plain file name inside the version's folder"
        yield model.fault(f"default_model_filename: {shown(name)} is a path, or no name", fix)
        return
    for path in model.versions if name else ():
        file = path / name
        if model.backend == "onnxruntime" and file.is_dir():  # a graph with its external data may be a folder of that name
            file = file / name
        if not file.exists() or (file.is_file() and not file.stat().st_size):
            yield model.fault(f"{file.relative_to(model.folder)} is missing or empty", "copy it there")
        elif model.backend in FILES and not file.is_file():
            yield model.fault(f"{file.relative_to(model.folder)} is no file", "copy it there")
        elif model.backend == "python":
            yield from _program(model, file)


def _program(model: Model, file: Path) -> Iterator[Fault]:
    """Read model.py, never run it."""
    place = f"{file.parent.name}/{file.name}"
    try:
        source = model.read(file, PROGRAM_LIMIT)
        with warnings.catch_warnings():  # an odd escape in someone's text is no fault of a repository
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except DocumentError as error:
        yield model.fault(f"{place}: {error}", "write a model.py there")
        return
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # the last two: nested too deeply for the parser
        yield model.fault(f"{place}: {error or 'nested too deeply'}", "mend it")
        return
    if not any(isinstance(node, ast.ClassDef) and node.name == "TritonPythonModel" for node in tree.body):
        yield model.fault(f"{place}: no class TritonPythonModel", "define it")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and "InferenceRequest" in (getattr(node.func, "attr", ""), getattr(node.func, "id", "")):
            named = [k.value.value for k in node.keywords if k.arg == "model_name" and isinstance(k.value, ast.Constant)]
            for target in named:
                if isinstance(target, str) and target not in model.names:
                    yield model.fault(
                        f"{file.name} calls model {shown(target)}, which is not here", "add it, or correct the name"
                    )


def onnx_graph(model: Model) -> Iterator[Fault]:
    """Names, types and shapes of the graph, and its external data."""
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
        stored = {item.name for item in graph.initializer}
        for kind, values in (("input", [v for v in graph.input if v.name not in stored]), ("output", list(graph.output))):
            yield from _signature(model, kind, {value.name: value.type.tensor_type for value in values})
        yield from _external(model, path.parent, _tensors(graph))


def _tensors(graph: Any) -> Iterator[Any]:
    """Every stored tensor of a graph and of the graphs inside it."""
    waiting = [graph]
    while waiting:
        current = waiting.pop()
        yield from current.initializer
        for sparse in current.sparse_initializer:
            yield from (sparse.values, sparse.indices)
        for attribute in (item for node in current.node for item in node.attribute):
            yield from (attribute.t, *attribute.tensors)
            waiting += [attribute.g, *attribute.graphs] if attribute.HasField("g") or attribute.graphs else []


def _signature(model: Model, kind: str, values: Mapping[str, Any]) -> Iterator[Fault]:
    entries = list(getattr(model.config, kind))
    named = Counter(item.name for item in entries)
    for name in sorted(name for name, count in named.items() if count > 1):
        yield model.fault(f"{kind} '{name}' is listed twice", "remove one")
    if kind == "input":
        for name in sorted(values.keys() - set(named)):
            yield model.fault(f"the graph's {kind} '{name}' is not listed", "add it")
    for item in entries:
        if item.name not in values:
            yield model.fault(f"{kind} '{item.name}' is not in the graph", f"expected {', '.join(values)}")
            continue
        value = values[item.name]
        wanted = ONNX_TYPES.get(value.elem_type, "none that Triton has")
        found = type_of(item)
        if found != wanted:
            yield model.fault(f"{kind} '{item.name}' is {found}, in the graph {wanted}", f"write {wanted}")
        yield from _shape(model, kind, item, [dim.dim_value or -1 for dim in value.shape.dim])


def _shape(model: Model, kind: str, item: Any, shape: list[int]) -> Iterator[Fault]:
    dims = list(item.reshape.shape) if item.HasField("reshape") else list(item.dims)
    if model.config.max_batch_size:
        if not shape or shape[0] != -1:
            told = f"{kind} '{item.name}': the graph's first dimension is {shape[0] if shape else 'missing'}, not a free batch"
            yield model.fault(told, "export with a dynamic batch, or write max_batch_size: 0")
            return
        shape = shape[1:]
    if len(dims) != len(shape) or any(a != b and -1 not in (a, b) for a, b in zip(dims, shape, strict=True)):
        fix = "write the graph's dims without the batch; for one number a sample dims: [ 1 ] reshape { shape: [ ] }"
        yield model.fault(f"{kind} '{item.name}' has dims {shown(dims)}, in the graph {shown(shape)}", fix)


def _external(model: Model, folder: Path, tensors: Iterable[Any]) -> Iterator[Fault]:
    needed: dict[str, int] = {}
    for item in tensors:
        entry = {pair.key: pair.value for pair in item.external_data}
        if "location" in entry:
            offset, length = (entry.get(key, "0") for key in ("offset", "length"))
            if not all(text.isascii() and text.isdigit() and len(text) < 20 for text in (offset, length)):
                what = f"external data of {shown(item.name)}: offset {shown(offset)}, length {shown(length)}"
                yield model.fault(f"{what} are no sizes", "save the model anew")
                continue
            needed[entry["location"]] = max(int(offset) + int(length), needed.get(entry["location"], 0))
    for location, end in needed.items():
        if not location or "\0" in location or any(len(os.fsencode(part)) > NAME_LIMIT for part in location.split("/")):
            yield model.fault(f"external data {shown(location)} names no file", "save the model anew")
            continue
        path = folder / location
        if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
            yield model.fault(f"external data '{location}' lies outside of the model's folder", "save the model anew")
        elif not path.is_file():
            yield model.fault(f"external data '{location}' is missing", "copy it beside the graph")
        elif path.stat().st_size < end:
            yield model.fault(f"external data '{location}' is cut short: {path.stat().st_size} of {end} bytes", "copy it again")
