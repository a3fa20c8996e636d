"""OpenVINO as the provider: real builds, audited by its own list of kernels."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from conftest import feed_of, load_graph, run_onnx, sqnr

from dq_export.core.recipe import Recipe, RecipeError
from dq_export.core.scheme import PRESETS
from dq_export.deploy.backend import BackendError, Built
from dq_export.deploy.backends import backend_of
from dq_export.deploy.lowerings import Lowering
from dq_export.deploy.openvino.backend import ALONE, OpenVino
from dq_export.deploy.openvino.engine import OpenVinoEngine, load_engine
from dq_export.passes.base import run_passes
from dq_export.passes.pipeline import canonical_passes

OPENVINO = pytest.mark.skipif(importlib.util.find_spec("onnxruntime_ep_openvino") is None, reason="needs OpenVINO")
BACKEND = OpenVino("fp32")
INTEL = "GenuineIntel" in Path("/proc/cpuinfo").read_text()


def saved(path: Path, calibrated: Any, target: Path, *legalise: Any) -> Path:
    graph = load_graph(path)
    run_passes(graph, (*canonical_passes(*calibrated), *legalise))
    ir.save(graph, target)
    return target


@pytest.fixture(scope="module")
def built(tiny_onnx: Path, tiny_calibrated: Any, tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("openvino")
    model = saved(tiny_onnx, tiny_calibrated, folder / "model.onnx", *BACKEND.legalise(shared=True, result=tiny_calibrated[0]))
    return BACKEND.build(model, folder / "engine")


@OPENVINO
def test_every_quantized_gemm_runs_in_integers(built: Built, tiny_calibrated: Any) -> None:
    audit = BACKEND.audit(built, tiny_calibrated[1])
    assert audit.coverage == 1
    kernels = {gemm.kernel for gemm in audit.gemms if gemm.wanted == "w8a8"}
    assert kernels <= {"FullyConnected i8", "FullyConnected u8"}
    lowering = BACKEND.supports(PRESETS["w8a8"])
    assert isinstance(lowering, Lowering)
    assert all(lowering.kernel in kernel for kernel in kernels)
    assert not any(gemm.integer for gemm in audit.gemms if gemm.wanted != "w8a8")


@OPENVINO
def test_a_scale_that_is_looked_up_at_run_time_runs_in_float_and_the_audit_says_so(
    tiny_onnx: Path, tiny_calibrated: Any, tmp_path: Path
) -> None:
    model = saved(tiny_onnx, tiny_calibrated, tmp_path / "model.onnx")  # direct form
    audit = BACKEND.audit(BACKEND.build(model, tmp_path / "engine"), tiny_calibrated[1])
    assert audit.coverage == 0
    assert all("it needs constant scales" in gemm.reason for gemm in audit.gemms if gemm.wanted == "w8a8")


@OPENVINO
def test_it_computes_what_the_graph_says(tiny: Any, built: Built) -> None:
    for timestep in (1, 400, 999):
        feed = feed_of(tiny, timestep)
        exact = run_onnx(built.model, feed)
        # Other float kernels move few activations over a rounding boundary, each by one code of 127.
        assert sqnr(exact, BACKEND.load(built)(feed)) > 35
        np.testing.assert_allclose(BACKEND.load(built, batch=3)(feed), BACKEND.load(built)(feed), atol=1e-2)


@OPENVINO
def test_the_session_is_described(built: Built) -> None:
    described = json.loads((built.folder / "session.json").read_text())
    assert described["providers"][:1] == (["OpenVINOExecutionProvider"] if INTEL else [])
    assert described["dtype"] == "fp32"
    assert described["openvino"].startswith("20")


@OPENVINO
def test_its_profile_names_integer_kernels(tiny: Any, built: Built) -> None:
    spent = BACKEND.profile(built, feed_of(tiny, samples=2))
    assert any("FullyConnected" in name and "i8" in name for name in spent)
    assert all(time > 0 for time in spent.values())


@OPENVINO
@pytest.mark.parametrize("library", ["onnxruntime_ep_openvino", "openvino"])
def test_a_missing_library_is_an_error(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(
        BackendError, match=rf"{library.replace('_', '-')} is not installed; pip install 'dq-export\[cpu,openvino\]'"
    ):
        BACKEND.require()


@OPENVINO
def test_without_the_plugin_it_runs_on_its_own_runtime_and_says_so(
    tiny: Any, built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert BACKEND.build(built.model, tmp_path / "here").note == ("" if INTEL else ALONE)
    monkeypatch.setattr("dq_export.deploy.openvino.backend._devices", lambda ort: [])  # as on a processor of another maker
    assert BACKEND.build(built.model, tmp_path / "elsewhere").note == ALONE
    feed = feed_of(tiny)
    engine = BACKEND.load(built)
    assert isinstance(engine, OpenVinoEngine)
    assert sqnr(run_onnx(built.model, feed), engine(feed)) > 35
    with engine.runner("engine") as runner:
        assert list(runner.get_input_metadata(use_numpy_dtypes=False)) == ["hidden_states", "timestep", "class_labels"]
        np.testing.assert_array_equal(runner.infer(dict(feed))["sample"], engine(feed))
    fixed = BACKEND.load(built, batch=2)
    with pytest.raises(BackendError, match=r"^OpenVINO cannot run the graph on these inputs: .* got \[3\] expecting \[2\]\.$"):
        fixed(feed)


@OPENVINO
def test_a_graph_that_openvino_refuses_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(BackendError, match=r"OpenVINO refuses .*model\.onnx"):
        load_engine(tmp_path / "model.onnx", {}, None)


def test_options_that_no_backend_runs_together_are_an_error() -> None:
    recipe = Recipe.parse({"model": "m", "dtype": "bf16"}, "test")
    with pytest.raises(
        RecipeError, match=r"--provider cpu --dtype bf16; it runs --provider cpu --dtype fp32; --provider openvino"
    ):
        backend_of(recipe)
    backend = backend_of(Recipe.parse({"model": "m", "dtype": "bf16", "provider": "openvino"}, "test"))
    assert backend == OpenVino("bf16")
    assert backend_of(Recipe.parse({"model": "m", "format": "onnx"}, "test")) is None


@OPENVINO
def test_bfloat16_costs_accuracy_but_not_the_integers(tiny: Any, built: Built, tiny_calibrated: Any, tmp_path: Path) -> None:
    other = OpenVino("bf16")
    compiled = other.build(built.model, tmp_path / "engine")
    assert other.audit(compiled, tiny_calibrated[1]).coverage == 1
    assert "factor_scale" in [item.name for item in other.legalise(shared=True, result=tiny_calibrated[0])]
    feed = feed_of(tiny)
    assert sqnr(run_onnx(built.model, feed), other.load(compiled)(feed)) > 20
