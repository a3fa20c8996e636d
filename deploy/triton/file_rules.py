"""What the files of a repository show: programs, graphs, external data, links and pickles."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .model_folder import Fault, Model, type_of

PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt", ".joblib")
ONNX_TYPES = {
    1: "TYPE_FP32", 2: "TYPE_UINT8", 3: "TYPE_INT8", 4: "TYPE_UINT16", 5: "TYPE_INT16", 6: "TYPE_INT32", 7: "TYPE_INT64",
    8: "TYPE_STRING", 9: "TYPE_BOOL", 10: "TYPE_FP16", 11: "TYPE_FP64", 12: "TYPE_UINT32", 13: "TYPE_UINT64", 16: "TYPE_BF16",
}  # fmt: skip
"""By ONNX's number of an element type. Source: onnx.proto, TensorProto.DataType."""


def stray(folder: Path) -> Iterator[Fault]:
    """Files that leave the repository, or that run code when they are loaded."""
    root = folder.resolve()
    for path in sorted(folder.rglob("*")):
        name, inside = path.relative_to(folder).parts[0], path.relative_to(folder)
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            fix = "copy the file: a link is not there on another machine"
            yield Fault(model=name, severity="error", what=f"{inside} is a link out of the repository", fix=fix)
        if path.suffix in PICKLES:
            what = f"{inside}: a pickle can run code when it is loaded"
            yield Fault(model=name, severity="warning", what=what, fix="convert it to safetensors or .npy, or remove it")


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
    if "/" in name or name in (".", ".."):
        yield model.fault(f"default_model_filename: '{name}' is a path", "a plain file name inside the version's folder")
        return
    for path in model.versions if name else ():
        file = path / name
        if not file.exists() or (file.is_file() and not file.stat().st_size):
            yield model.fault(f"{path.name}/{name} is missing or empty", "copy it there")
        elif model.backend == "python":
            yield from _program(model, file)


def _program(model: Model, file: Path) -> Iterator[Fault]:
    """Read model.py, never run it."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError) as error:
        yield model.fault(f"{file.parent.name}/{file.name}: {error}", "mend it")
        return
    if not any(isinstance(node, ast.ClassDef) and node.name == "TritonPythonModel" for node in tree.body):
        yield model.fault(f"{file.parent.name}/{file.name}: no class TritonPythonModel", "define it")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("InferenceRequest"):
            named = [k.value.value for k in node.keywords if k.arg == "model_name" and isinstance(k.value, ast.Constant)]
            for target in named:
                if isinstance(target, str) and target not in model.names:
                    yield model.fault(f"{file.name} calls model '{target}', which is not here", "add it, or correct the name")


def onnx_graph(model: Model) -> Iterator[Fault]:
    """Names, types and shapes of the graph, and its external data."""
    if model.backend != "onnxruntime":
        return
    import onnx
    from google.protobuf.message import DecodeError

    for version in model.versions:
        path = version / model.file
        path = path / model.file if path.is_dir() else path
        if not path.is_file():
            continue
        try:
            graph = onnx.load(str(path), load_external_data=False).graph
        except DecodeError as error:
            yield model.fault(f"{version.name}/{model.file} is not ONNX ({error})", "copy it again")
            continue
        stored = {item.name for item in graph.initializer}
        for kind, values in (("input", [v for v in graph.input if v.name not in stored]), ("output", list(graph.output))):
            yield from _signature(model, kind, {value.name: value.type.tensor_type for value in values})
        yield from _external(model, path.parent, graph.initializer)


def _signature(model: Model, kind: str, values: Mapping[str, Any]) -> Iterator[Fault]:
    entries = list(getattr(model.config, kind))
    named = [item.name for item in entries]
    for name in sorted({name for name in named if named.count(name) > 1}):
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
        yield model.fault(f"{kind} '{item.name}' has dims {dims}, in the graph {shape}", fix)


def _external(model: Model, folder: Path, initializers: Any) -> Iterator[Fault]:
    needed: dict[str, int] = {}
    for item in initializers:
        entry = {pair.key: pair.value for pair in item.external_data}
        if "location" in entry:
            end = int(entry.get("offset", 0)) + int(entry.get("length", 0))
            needed[entry["location"]] = max(end, needed.get(entry["location"], 0))
    for location, end in needed.items():
        path = folder / location
        if not path.resolve().is_relative_to(folder.resolve()):
            yield model.fault(f"external data '{location}' lies outside of the model's folder", "save the model anew")
        elif not path.is_file():
            yield model.fault(f"external data '{location}' is missing", "copy it beside the graph")
        elif path.stat().st_size < end:
            yield model.fault(f"external data '{location}' is cut short: {path.stat().st_size} of {end} bytes", "copy it again")
