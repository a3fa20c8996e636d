"""ONNX Runtime's CUDA provider without a GPU; and its build, load and audit with the CPU's provider in its place."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort
import pytest
from conftest import QUICK, calibrate_tiny, feed_of, load_graph, recipe_of, run_onnx, sqnr

from dq_export.core.recipe import Recipe, RecipeError
from dq_export.deploy.backend import BackendError, NotHereError
from dq_export.deploy.backends import backend_of
from dq_export.deploy.check import check
from dq_export.deploy.onnxruntime import cuda
from dq_export.deploy.onnxruntime.cuda import OrtCuda
from dq_export.families.reference import Reference
from dq_export.passes.base import run_passes
from dq_export.passes.pipeline import canonical_passes
from dq_export.pipeline import run
from dq_export.preparation import Options
from dq_export.report.verdict import require

LISTS = pytest.mark.skipif(
    not hasattr(ort.InferenceSession, "get_provider_graph_assignment_info"), reason="needs ONNX Runtime 1.24, which lists nodes"
)


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    cuda.obstacle.cache_clear()
    yield
    cuda.obstacle.cache_clear()


def test_without_a_gpu_an_export_does_all_but_the_engine(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    values = {**QUICK, "model": str(tiny_folder), "provider": "cuda", "bits": "w4a16", "scaling": "none", "parity_size": 1}
    report = run(Recipe.parse(values, "test"), out, Options(), until="verify")
    assert report is not None
    assert report.verdict is not None
    assert report.verdict.outcome == "unfinished"
    with pytest.raises(NotHereError) as error:
        require(report.verdict)
    first, command = str(error.value).splitlines()
    assert first == (
        f"onnxruntime {ort.__version__} without its CUDA provider is installed here; {out} is finished up to the graph. Copy the "
        "folder to the GPU machine and run there:"
    )
    assert command == f"  pip install 'dq-export[gpu]' && dq-export finish {out}"
    assert report.stages() == ["float-onnx", "qdq-onnx"]
    findings = check(ir.load(out / "model.onnx"), "ort-cuda")
    assert findings
    assert {item.verdict for item in findings} == {"low precision"}


@LISTS
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_a_build_records_the_nodes_that_the_provider_takes(
    dtype: str, tiny: Reference, tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "PROVIDER", "CPUExecutionProvider")
    monkeypatch.setattr(cuda, "PROVIDERS", [])
    result, assigned = calibrate_tiny(tiny, recipe_of(tiny, bits="w4a16"))
    backend = OrtCuda(dtype)
    graph = load_graph(tiny_onnx)
    run_passes(graph, (*canonical_passes(result, assigned), *backend.legalise(shared=True, result=result)))
    ir.save(graph, tmp_path / "model.onnx", external_data="model.onnx.data", size_threshold_bytes=1024)
    assert backend.runs
    built = backend.build(tmp_path / "model.onnx", tmp_path / "engine")
    audit = backend.audit(built, assigned)
    assert audit.coverage == 1
    assert {gemm.kernel for gemm in audit.gemms if gemm.required} == {"MatMulNBits"}
    feed = feed_of(tiny)
    assert sqnr(run_onnx(built.model, feed), backend.load(built)(feed)) > 30  # the CPU's kernel rounds its inputs
    first, *rest = [gemm for gemm in audit.gemms if gemm.required]
    nodes = json.loads((built.folder / "nodes.json").read_text())
    (built.folder / "nodes.json").write_text(json.dumps([name for name in nodes if name != first.name]))
    by_name = {gemm.name: gemm for gemm in backend.audit(built, assigned).gemms}
    assert by_name[first.name] == replace(first, integer=False, reason="the provider did not take it, and the CPU runs it")
    assert all(by_name[gemm.name] == gemm for gemm in rest)
    for content, message in (("{}", "expected a list of names"), ("[", "not readable as JSON")):
        (built.folder / "nodes.json").write_text(content)
        with pytest.raises(BackendError, match=message):
            backend.audit(built, assigned)


@LISTS
def test_a_session_that_falls_back_to_the_cpu_is_no_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As onnxruntime-gpu does on a machine without CUDA, with a warning."""

    class Falling(ort.InferenceSession):  # type: ignore[misc]
        def __init__(self, graph: bytes, options: object, providers: list[str]) -> None:
            super().__init__(graph, options, providers=providers[1:])

    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", Falling)
    backend = OrtCuda("fp16")
    assert not backend.runs
    with pytest.raises(NotHereError, match="cannot load its CUDA provider here: no GPU, or not its versions of CUDA and cuDNN; "):
        backend.build(tmp_path / "model.onnx", tmp_path / "engine")


def test_integer_gemms_are_refused_with_the_nearest_form() -> None:
    for bits, nearest in (("w8a8", "w8a16"), ("w4a8", "w4a16"), ("fp8", "w8a16")):
        with pytest.raises(RecipeError, match=rf"no integer or float8 GEMM for Q/DQ; .*; the nearest is {nearest}$"):
            backend_of(Recipe.parse({"model": "dit", "provider": "cuda", "bits": bits}, "test"))
    backend = backend_of(Recipe.parse({"model": "dit", "provider": "cuda", "bits": "w4a16"}, "test"))
    assert backend == OrtCuda("fp16")
