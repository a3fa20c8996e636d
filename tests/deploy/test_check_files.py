"""`dq-export check` on files that people bring: links, missing data, damage, and what onnxruntime's own quantizers write."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import command_line
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from forms import FORMS, Sketch
from forms.sketch import F32, INT8, K, N
from onnx import TensorProto, helper, numpy_helper

from dq_export.deploy.check import ModelFileError, check, read_model

DATA = "model.onnx.data"


def saved(folder: Path, name: str = "model.onnx", location: str = DATA) -> Path:
    """A good INT8 model whose codes lie in another file."""
    sketch = Sketch(F32, ("batch", 16, K), 21)
    path = folder / name
    ir.save(sketch.model(sketch.plain()), path, external_data=location, size_threshold_bytes=1024)
    return path


def call(*words: Any, target: str = "ort", **options: Any) -> subprocess.CompletedProcess[str]:
    return command_line.call("check", *words, "--target", target, timeout=120, **options)


def pointed(folder: Path, change: Callable[[Any], None]) -> Path:
    """The model with the external data of its codes changed."""
    path = saved(folder)
    model = onnx.load(path, load_external_data=False)
    (tensor,) = [item for item in model.graph.initializer if item.data_location == TensorProto.EXTERNAL]
    change(tensor)
    path.write_bytes(model.SerializeToString())
    return path


def entry(key: str, value: str) -> Callable[[Any], None]:
    def change(tensor: Any) -> None:
        entries = [(item.key, item.value) for item in tensor.external_data if item.key != key]
        del tensor.external_data[:]
        for name, text in (*entries, (key, value)):
            tensor.external_data.add(key=name, value=text)

    return change


def test_external_data_beside_the_model(tmp_path: Path) -> None:
    assert [item.verdict for item in check(read_model(saved(tmp_path)), "ort")] == ["low precision"]


def test_links_of_the_hubs_cache_lead_into_its_blobs(tmp_path: Path) -> None:
    cache = tmp_path / "models--owner--name"
    snapshot, blobs = cache / "snapshots" / "0123abcd" / "onnx", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    saved(tmp_path)
    for name, blob in (("model.onnx", "aa11"), (DATA, "bb22")):
        (tmp_path / name).rename(blobs / blob)
        (snapshot / name).symlink_to(Path("../../../blobs") / blob)
    model = read_model(snapshot / "model.onnx")
    assert [item.verdict for item in check(model, "ort")] == ["low precision"]
    codes = next(value.const_value for value in model.graph.initializers.values() if tuple(value.shape or ()) == (K, N))
    assert codes is not None
    assert codes.numpy().any(), "the linked data is read"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (entry("location", "/etc/passwd"), "the data file '/etc/passwd' of tensor 'c"),
        (entry("location", "../outside.data"), "'../outside.data' of tensor 'c"),
        (entry("location", ""), "is not named by a path inside the model's folder"),
        (entry("location", "gone.data"), "'gone.data' of tensor 'c3' cannot be read (No such file or directory)"),
        (entry("location", "x" * 5000), "cannot be read (File name too long)"),
        (entry("location", "folder"), "is not a regular file"),
        (entry("location", "pipe"), "is not a regular file"),
        (entry("location", "device"), "is a link that leads out of the model's folder"),
        (entry("location", "out"), "is a link that leads out of the model's folder"),
        (entry("location", "circle"), "cannot be read"),
        (entry("offset", "5"), f"is cut short: {K * N} bytes of at least {K * N + 5}"),
        (entry("offset", "-1"), "offset '-1' is not a whole number of bytes"),
        (entry("offset", "²"), "offset '²' is not a whole number of bytes"),
        (entry("length", "9" * 40), "is not a whole number of bytes"),
        (entry("length", "7"), f"gives it 7 bytes, its shape [{K}, {N}] needs {K * N}"),
    ],
)
def test_external_data_that_leads_elsewhere_or_lacks_bytes(change: Any, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "outside.data").write_bytes(b"x" * K * N)
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "device").symlink_to("/dev/zero")
    (folder / "out").symlink_to(tmp_path / "outside.data")
    (folder / "circle").symlink_to("circle")
    path = pointed(folder, change)
    with pytest.raises(ModelFileError) as error:
        read_model(path)
    assert str(error.value).startswith(f"{path}: the data file ")
    assert message in str(error.value)
    assert len(str(error.value)) < 700


def test_a_data_file_that_was_cut_short(tmp_path: Path) -> None:
    path = saved(tmp_path)
    os.truncate(tmp_path / DATA, 100)
    result = call(path)
    assert result.returncode == 2
    assert f"the data file '{DATA}'" in result.stderr
    assert "is cut short: 100 bytes" in result.stderr
    assert result.stderr.count("\n") == 1


def damaged(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content) and None


def graph_of(*nodes: Any, inputs: Any = (), initializers: Any = (), functions: Any = (), opsets: Any = (("", 21),)) -> bytes:
    """A serialized model of these nodes, from x[2, 4] to y."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 4])
    graph = helper.make_graph(list(nodes), "g", [x, *inputs], [y], list(initializers))
    imports = [helper.make_opsetid(*item) for item in opsets]
    return bytes(helper.make_model(graph, opset_imports=imports, functions=list(functions), ir_version=10).SerializeToString())


def recursive() -> bytes:
    body = [helper.make_node("f", ["a"], ["b"], domain="local")]
    function = helper.make_function(
        "local", "f", ["a"], ["b"], body, [helper.make_opsetid("", 21), helper.make_opsetid("local", 1)]
    )
    call_it = helper.make_node("f", ["x"], ["y"], domain="local")
    return graph_of(call_it, functions=[function], opsets=(("", 21), ("local", 1)))


def exploding() -> bytes:
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("local", 1)]
    functions = [helper.make_function("local", "f0", ["a"], ["b"], [helper.make_node("Neg", ["a"], ["b"])], imports)]
    for level in range(1, 40):
        body = [helper.make_node(f"f{level - 1}", [one], [two], domain="local") for one, two in (("a", "m"), ("m", "b"))]
        functions.append(helper.make_function("local", f"f{level}", ["a"], ["b"], body, imports))
    return graph_of(helper.make_node("f39", ["x"], ["y"], domain="local"), functions=functions, opsets=(("", 21), ("local", 1)))


def reshaped() -> bytes:
    """A constant that is declared with another rank."""
    model = onnx.ModelProto.FromString(typed_tensor())
    model.graph.value_info.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 4, 7]))
    return bytes(model.SerializeToString())


def short_tensor() -> bytes:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 4], raw_data=b"\0" * 8)
    return graph_of(helper.make_node("MatMul", ["x", "w"], ["y"]), initializers=[tensor])


def typed_tensor(**fields: Any) -> bytes:
    tensor = TensorProto(name="w", **{"data_type": TensorProto.FLOAT, "dims": [4, 4], "raw_data": b"\0" * 64, **fields})
    return graph_of(helper.make_node("MatMul", ["x", "w"], ["y"]), initializers=[tensor])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (damaged(b""), "not an ONNX model: it has no graph with nodes"),
        (damaged(b"\xff" * 99), "not an ONNX model (not readable as protobuf)"),
        (damaged(b"not an onnx file at all"), "not an ONNX model"),
        (damaged(graph_of()), "not an ONNX model: it has no graph with nodes"),
        (damaged(graph_of(helper.make_node("Identity", ["y"], ["y"]))), "not a valid ONNX model"),
        (damaged(graph_of(*(helper.make_node("Identity", [a], [b]) for a, b in (("p", "q"), ("q", "p"), ("x", "y"))))), "sorted"),
        (damaged(graph_of(helper.make_node("DequantizeLinear", ["x"], ["y"]))), "not a valid ONNX model"),
        (damaged(graph_of(helper.make_node("NoSuchThing", ["x"], ["y"]))), "No Op registered for NoSuchThing"),
        (damaged(graph_of(helper.make_node("Neg", ["x"], ["y"]), opsets=())), "not a valid ONNX model"),
        (damaged(reshaped()), "differ in rank"),
        (damaged(recursive()), "function 'f' calls itself"),
        (damaged(exploding()), "nodes, functions written out; a graph may have"),
        (damaged(short_tensor()), "tensor 'w': 8 bytes of data, its shape [4, 4] needs 64"),
        (damaged(typed_tensor(dims=[2**40, 2**40])), "tensor 'w': 64 bytes of data"),
        (damaged(typed_tensor(dims=[-4, -4])), "tensor 'w': shape [-4, -4] with a negative size"),
        (damaged(typed_tensor(data_type=77)), "tensor 'w': unknown element type 77"),
        (lambda path: os.mkfifo(path), "not a regular file; expected an ONNX file"),
        (lambda path: path.mkdir(), "expected an ONNX file"),
        (lambda path: path.symlink_to("/dev/zero"), "not a regular file; expected an ONNX file"),
    ],
)
def test_a_file_that_is_not_an_onnx_model_is_refused_in_one_line(write: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    write(path)
    start = time.monotonic()
    with pytest.raises(ModelFileError) as error:
        read_model(path)
    assert time.monotonic() - start < 20
    assert message in str(error.value)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 700


def test_stale_shapes_inside_are_no_obstacle(tmp_path: Path) -> None:
    path = saved(tmp_path)
    model = onnx.load(path, load_external_data=False)
    del model.graph.value_info[:]
    model.graph.value_info.append(helper.make_tensor_value_info(model.graph.node[0].output[0], TensorProto.INT8, [1, 2, 3, 4, 5]))
    path.write_bytes(model.SerializeToString())
    assert [item.verdict for item in check(read_model(path), "ort")] == ["low precision"]


def test_constants_that_square_themselves_end(tmp_path: Path) -> None:
    one = numpy_helper.from_array(np.ones((2, 4), np.float32), "v0")
    chain = [helper.make_node("Mul", [f"v{i}", f"v{i}"], [f"v{i + 1}"]) for i in range(60)]
    path = tmp_path / "model.onnx"
    path.write_bytes(graph_of(*chain, helper.make_node("Add", ["x", "v60"], ["y"]), initializers=[one]))
    assert check(read_model(path), "ort") == []


def test_names_from_the_file_are_text_alone(tmp_path: Path) -> None:
    names = ["[/]", "[red]x[/red]", "\x1b]0;title\x07\x1b[2J", "a\nb\rc", "x" * 100_000, "\u202eevil", ":smile:"]
    sketch = Sketch(F32, ("batch", 16, K), 21)
    value = sketch.x
    for name in names:
        left = sketch.activation(value, INT8, points="", output_dtype=3)
        value = sketch.matmul(left, sketch.weight(axis=1), name)
        value.name = f"value{len(sketch.nodes)}"
    ir.save(sketch.model(value), tmp_path / "model.onnx")
    result = call(tmp_path / "model.onnx", env={**os.environ, "COLUMNS": "200", "FORCE_COLOR": "1"})
    assert result.returncode == 3, result.stderr
    assert result.stderr == ""
    assert f"0 low precision, {len(names)} float, 0 rejected" in result.stdout
    for markup in ("[/]", "[red]x[/red]", ":smile:"):
        assert markup in result.stdout
    for steering in ("\x1b]", "\x1b[2J", "\u202e", "\r"):
        assert steering not in result.stdout
    assert len(result.stdout) < 20_000
    findings = json.loads(call(tmp_path / "model.onnx", "--json").stdout)
    assert [item["node"] for item in findings] == names


def test_the_counts_and_the_status(tmp_path: Path) -> None:
    path = saved(tmp_path)
    result = call(path)
    assert (result.returncode, result.stdout) == (0, "1 low precision, 0 float, 0 rejected\n")
    float_model = tmp_path / "float.onnx"
    float_model.write_bytes(graph_of(helper.make_node("Neg", ["x"], ["y"])))
    result = call(float_model)
    assert (result.returncode, result.stdout) == (
        0,
        "0 low precision, 0 float, 0 rejected\nthe file holds no quantized operator\n",
    )
    result = call(path, target="ort-cuda")
    assert result.returncode == 3
    assert "0 low precision, 1 float, 0 rejected" in result.stdout


def float_linears(folder: Path) -> Path:
    """Two linears with biases and a Relu, as a float ONNX file."""
    rng = np.random.default_rng(0)
    arrays = {"w1": (K, N), "b1": (N,), "w2": (N, K), "b2": (K,)}
    tensors = [numpy_helper.from_array(rng.normal(0, 0.1, shape).astype(np.float32), name) for name, shape in arrays.items()]
    nodes = [
        helper.make_node("Gemm", ["x", "w1", "b1"], ["h"], name="first"),
        helper.make_node("Relu", ["h"], ["r"], name="relu"),
        helper.make_node("Gemm", ["r", "w2", "b2"], ["y"], name="second"),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", K]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], tensors)
    path = folder / "float.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


class Reader:
    """Three batches of calibration data."""

    def __init__(self) -> None:
        rng = np.random.default_rng(1)
        self.batches = iter([{"x": rng.normal(0, 1, (4, K)).astype(np.float32)} for _ in range(3)])

    def get_next(self) -> Any:
        return next(self.batches, None)

    def set_range(self, *_: Any) -> None:
        """Part of onnxruntime's interface."""


def quantized(folder: Path, kind: str) -> Path:
    from onnxruntime.quantization import QuantFormat, QuantType, matmul_nbits_quantizer, quantize_dynamic, quantize_static

    source, path = float_linears(folder), folder / f"{kind}.onnx"
    types = {"activation_type": QuantType.QInt8, "weight_type": QuantType.QInt8}
    if kind == "dynamic":
        quantize_dynamic(source, path)
    elif kind == "nbits":
        model = matmul_nbits_quantizer.MatMulNBitsQuantizer(onnx.load(source), block_size=64, is_symmetric=True)
        model.process()
        model.model.save_model_to_file(str(path))
    else:
        form = QuantFormat.QOperator if kind == "qoperator" else QuantFormat.QDQ
        options = {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": kind != "no-bias"}
        quantize_static(source, path, Reader(), quant_format=form, extra_options=options, per_channel=kind == "no-bias", **types)
    return path


@pytest.mark.parametrize(
    ("kind", "ort", "trt", "words"),
    [
        ("qdq", {"low precision": 2}, {"rejected": 2}, "QuantizeBias"),
        ("no-bias", {"low precision": 2}, {"low precision": 2}, ""),
        ("qoperator", {"low precision": 2}, {"rejected": 2}, "is not imported"),
        ("dynamic", {"low precision": 2}, {"rejected": 2}, "MatMulInteger is not imported"),
    ],
)
def test_what_onnxruntimes_quantizers_write(kind: str, ort: Any, trt: Any, words: str, tmp_path: Path) -> None:
    path = quantized(tmp_path, kind)
    for target, expected in (("ort", ort), ("trt", trt)):
        findings = [item for item in check(read_model(path), target) if item.gemm]  # type: ignore[arg-type]
        counted = {verdict: sum(item.verdict == verdict for item in findings) for verdict in {item.verdict for item in findings}}
        assert counted == expected, findings
    refused = [f"{item.rule} {item.fix}" for item in check(read_model(path), "trt") if item.failed]
    assert bool(refused) == bool(words)
    assert not words or any(words in text for text in refused)


def test_every_form_is_one_that_the_reader_takes(tmp_path: Path) -> None:
    for item in FORMS[::10]:
        ir.save(item.model("ort"), tmp_path / "form.onnx")
        assert check(read_model(tmp_path / "form.onnx"), "ort"), item.name
