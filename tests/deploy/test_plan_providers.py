"""Plans in ONNX Runtime: its TensorRT provider and its TensorRT-RTX plug-in, on a machine without a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime as ort
import pytest
from command_line import call
from conftest import calibrate_tiny, load_graph, recipe_of

from dq_export.core.recipe import Recipe, RecipeError
from dq_export.deploy.audit import Audit
from dq_export.deploy.backend import BackendError
from dq_export.deploy.backends import backend_of
from dq_export.deploy.onnxruntime import plans, rtx_plugin
from dq_export.deploy.onnxruntime.cpu import version
from dq_export.deploy.onnxruntime.plans import OrtTensorRt, OrtTensorRtRtx
from dq_export.families.reference import Reference
from dq_export.finished_folder import engine_of
from dq_export.passes.base import run_passes
from dq_export.passes.pipeline import canonical_passes
from dq_export.pipeline import run
from dq_export.preparation import Options

PLUGIN = pytest.mark.skipif(
    importlib.util.find_spec(rtx_plugin.MODULE) is None or version() < (1, 24), reason="needs the TensorRT-RTX plug-in"
)
RTX = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt_rtx")
GPU_LIBRARIES = ("libcuda.so.1", "libnvidia-ml.so.1")


def backend(provider: str, **values: Any) -> Any:
    return backend_of(Recipe.parse({"model": "dit", "provider": provider, **values}, "test"))


@pytest.fixture(scope="module")
def exported(tiny: Reference, tiny_onnx_per_sample: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Audit]:
    """The folder of an engine, and its audit."""
    out = tmp_path_factory.mktemp("plan")
    result, assigned = calibrate_tiny(tiny, recipe_of(tiny, bits="w8a8", bins="per-step"))
    provider = backend("tensorrt-rtx", target="sm86,sm89")
    graph = load_graph(tiny_onnx_per_sample)
    graph.ir_version = 10
    run_passes(graph, (*canonical_passes(result, assigned), *provider.legalise(shared=False, result=result)))
    ir.save(graph, out / "model.onnx")
    return out, provider.audit(provider.build(out / "model.onnx", out / "engine"), assigned)


@pytest.fixture
def out(exported: tuple[Path, Audit]) -> Path:
    return exported[0]


@RTX
def test_the_engine_is_an_audited_plan_and_a_graph_that_names_it(exported: tuple[Path, Audit]) -> None:
    out, audit = exported
    assert audit.coverage == 1
    assert {gemm.kernel for gemm in audit.gemms if gemm.required} == {"gemm Int8xInt8"}
    graph, context = ir.load(out / "model.onnx").graph, ir.load(out / "engine" / "context.onnx").graph
    for actual, expected in ((context.inputs, graph.inputs), (context.outputs, graph.outputs)):
        assert [(v.name, v.type, v.shape) for v in actual] == [(v.name, v.type, v.shape) for v in expected]
    (node,) = context
    assert (node.domain, node.op_type) == ("com.microsoft", "EPContext")
    values = {name: attribute.value for name, attribute in node.attributes.items()}
    assert values["source"] == "NvTensorRTRTXExecutionProvider"
    assert (out / "engine" / values["ep_cache_context"]).read_bytes()[:4] == b"vtrt"
    assert values["embed_mode"] == 0


@RTX
def test_a_load_says_that_it_needs_a_gpu(out: Path) -> None:
    with pytest.raises(BackendError, match=r"^this machine shows no NVIDIA GPU; ONNX Runtime's TensorRT-RTX provider is needed"):
        backend("tensorrt-rtx").load(engine_of(out))


@RTX
@pytest.mark.slow
def test_an_export_and_its_bench_without_a_gpu(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("--steps", "4", "--calib-size", "2", "--min-sqnr", "10")
    result = call("--model", tiny_folder, "--provider", "tensorrt-rtx", "--target", "sm86", "-o", out, *words)
    assert result.returncode == 0, result.stderr
    report = json.loads((out / "report.json").read_text())
    assert report["engine"] == "ONNX Runtime's TensorRT-RTX provider"
    assert report["audit"]["coverage"] == 1
    result = call("bench", out)
    assert result.returncode == 2
    assert "an engine of ONNX Runtime's TensorRT-RTX provider runs on an NVIDIA GPU of --target sm86 only" in result.stderr


@RTX
@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("context.onnx", None, "no context.onnx; run `dq-export finish"),
        ("model.plan", None, "no model.plan; run `dq-export finish"),
        ("model.plan", b"", "was changed after the build; run `dq-export finish"),
    ],
)
def test_a_damaged_engine_is_refused(file: str, content: bytes | None, message: str, out: Path, tmp_path: Path) -> None:
    shutil.copytree(out / "engine", tmp_path / "engine")
    path = tmp_path / "engine" / file
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(BackendError, match=message):
        backend("tensorrt-rtx").load(engine_of(tmp_path))


@RTX
def test_a_provider_that_does_not_take_the_plan_is_no_engine(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As onnxruntime-gpu without TensorRT's libraries, which only warns and tries the CPU."""
    monkeypatch.setattr(plans, "TENSORRT", "CPUExecutionProvider")
    monkeypatch.setattr(plans, "PROVIDERS", [])
    monkeypatch.setattr(plans, "compute_capability", lambda: "sm89")
    with pytest.raises(BackendError, match=r"^ONNX Runtime .* refuses .*context\.onnx: .*EPContext"):
        backend("tensorrt").load(engine_of(out))


def test_onnxruntime_without_its_tensorrt_provider_says_what_to_install(out: Path) -> None:
    assert not OrtTensorRt("fp16").runs
    reason = (
        f"^onnxruntime {ort.__version__} without its TensorRT provider is installed here; pip install 'dq-export\\[gpu,trt\\]'"
    )
    with pytest.raises(BackendError, match=reason):
        backend("tensorrt").load(engine_of(out))


def test_schemes_and_targets_are_those_of_the_libraries() -> None:
    assert isinstance(backend("tensorrt", bits="fp8"), OrtTensorRt)
    assert isinstance(backend("tensorrt-rtx", bits="fp8", attention="fp8"), OrtTensorRtRtx)
    with pytest.raises(RecipeError, match="int8 blocks are unpacked by a separate kernel; the nearest is w4a16"):
        backend("tensorrt-rtx", bits="w8a16")
    with pytest.raises(
        RecipeError, match=r"^--target sm80: --provider tensorrt-rtx runs on sm86, sm89, sm120, sm121; --format trt-rtx"
    ):
        backend("tensorrt-rtx", target="sm80,sm86")


def test_triton_has_no_backend_for_them(tiny_folder: Path, tmp_path: Path) -> None:
    recipe = Recipe.parse({"model": str(tiny_folder), "provider": "tensorrt-rtx", "triton": True}, "test")
    with pytest.raises(
        RecipeError, match="--triton: no backend of Triton's serves --format ort --provider tensorrt-rtx; --format ort"
    ):
        run(recipe, tmp_path / "out", Options())


@PLUGIN
def test_the_plugin_without_a_driver_is_refused_in_its_own_words() -> None:
    if rtx_plugin.compute_capability():
        pytest.skip("there is a GPU")
    assert rtx_plugin.obstacle() == "this machine shows no NVIDIA GPU"
    with pytest.raises(BackendError, match=r"^the TensorRT-RTX plug-in of ONNX Runtime cannot be loaded: .*libcuda\.so\.1"):
        rtx_plugin.gpus()


@PLUGIN
@pytest.mark.skipif(not (shutil.which("gcc") and shutil.which("nm")), reason="needs a C compiler for a driver without a GPU")
def test_the_plugin_registers_beside_a_driver_that_shows_no_gpu(tmp_path: Path) -> None:
    spec = importlib.util.find_spec(rtx_plugin.MODULE)
    assert spec is not None
    assert spec.origin is not None
    library = next(Path(spec.origin).parent.glob("libonnxruntime_providers_*.so"))
    symbols = subprocess.run(["nm", "-D", "--undefined-only", library], check=True, capture_output=True, text=True).stdout
    names = [line.split()[-1] for line in symbols.splitlines()]
    for file, prefixes in zip(GPU_LIBRARIES, (("cu",), ("nvml",)), strict=True):
        functions = [name for name in names if name.startswith(prefixes) and "@" not in name]
        source = tmp_path / "driver.c"
        source.write_text("".join(f"int {name}(void) {{ return 100; }}\n" for name in functions))  # CUDA_ERROR_NO_DEVICE
        subprocess.run(["gcc", "-shared", "-fPIC", f"-Wl,-soname,{file}", "-o", tmp_path / file, source], check=True)
    program = "from dq_export.deploy.onnxruntime import rtx_plugin; print(rtx_plugin.gpus())"
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    child = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert (child.stdout, child.returncode) == ("[]\n", 0), child.stderr
