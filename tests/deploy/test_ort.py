"""The engine on ONNX Runtime: what it really executes, any batch, and refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from conftest import calibrate_tiny, feed_of, load_graph, recipe_of, run_onnx, sqnr

from dq_export.deploy.audit import Audit, audit_ort
from dq_export.deploy.backend import BackendError, Engine
from dq_export.deploy.check.ort_unpacking import BYTES_SINCE
from dq_export.deploy.onnxruntime.cpu import ATTENTION_SINCE, OPTIMIZED, ORT, open_graph, version
from dq_export.finished import audit_again
from dq_export.passes.base import run_passes
from dq_export.passes.pipeline import canonical_passes

TOKENS, WIDTH, BLOCKS = 16, 32, 2
INT8 = 35.0
"""dB. Rounding x of range 8 sigma (amax = 4 sigma) to 254 steps costs 20 log10(sqrt(12) 254 / 8) = 41 dB per operand, 38 for
both; averaging over 12 GEMMs and the float residual path gain, so 35 leaves 3 dB for heavier tails. A wrong scale is near 0."""
SAME = 60.0
"""dB. Another batch size rounds float32 otherwise (120 dB); of some 10^4 codes one may then flip, which costs about 1/255 of a
value in 10^4: 20 log10(255) + 10 log10(10^4) = 88 dB before the network amplifies it. A sample that read its neighbour's
data or scale is below 30 dB."""


def quantized(path: Path, calibrated: Any, folder: Path, *legalise: Any) -> Path:
    graph = load_graph(path)
    run_passes(graph, (*canonical_passes(*calibrated), *legalise))
    ir.save(graph, folder / "model.onnx")
    return folder / "model.onnx"


def audited(model: Path, calibrated: Any) -> Audit:
    ORT.build(model, model.parent / "engine")
    return audit_ort(model, model.parent / "engine" / OPTIMIZED, calibrated[1])


def executed(model: Path, feed: dict[str, Any], folder: Path) -> dict[str, str]:
    """Node name -> operator of every kernel that one call ran, as ONNX Runtime's profiler saw it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    session.run(None, feed)
    events = json.loads(Path(session.end_profiling()).read_text())
    return {
        event["name"].removesuffix("_kernel_time").split("/")[0]: event["args"]["op_name"]
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
    }


@pytest.mark.parametrize("form", ["shared", "per-sample", "int8", "per-sample-direct"])
def test_the_audit_says_what_the_profiler_sees(
    form: str, tiny: Any, tiny_onnx: Path, tiny_onnx_per_sample: Path, tiny_calibrated: Any, tmp_path: Path
) -> None:
    """The audit reads the optimised graph; the profiler is a witness that shares nothing with it."""
    shared = not form.startswith("per-sample")
    legalise = ORT.legalise(shared=shared, result=tiny_calibrated[0]) if form in ("shared", "per-sample") else ()
    model = quantized(tiny_onnx if shared else tiny_onnx_per_sample, tiny_calibrated, tmp_path, *legalise)
    audit = audited(model, tiny_calibrated)
    kernels = executed(model, feed_of(tiny, 500 if shared else [500, 20, 900]), tmp_path)
    (embedder,) = (name for name, kernel in kernels.items() if kernel == "Conv")  # bears another name on channels in blocks
    kernels["pos_embed.proj"] = kernels.pop(embedder)
    for gemm in audit.gemms:
        assert kernels[gemm.name] == gemm.kernel
    fused = {name for name, kernel in kernels.items() if kernel == "MatMulIntegerToFloat"}
    assert {gemm.name for gemm in audit.gemms if gemm.integer} == fused
    # int8 codes lose q, k and v, 3 of the 6 GEMMs of a block; a scale along an axis loses all.
    assert len(fused) == {"shared": 12, "per-sample": 12, "int8": 6, "per-sample-direct": 0}[form]


def fixed(model: Path, batch: int) -> Path:
    """The same graph for one batch size, every shape constant."""
    graph = ir.load(model)
    for value in graph.graph.inputs:
        assert value.shape is not None
        value.shape = ir.Shape([size if isinstance(size, int) else batch for size in value.shape])
    ir.save(graph, model.with_name("fixed.onnx"))
    return model.with_name("fixed.onnx")


@pytest.mark.parametrize("form", ["shared", "per-sample"])
def test_an_engine_for_one_batch_size_runs_in_integers_too(
    form: str, tiny: Any, tiny_onnx: Path, tiny_onnx_per_sample: Path, tiny_calibrated: Any, tmp_path: Path
) -> None:
    """ONNX Runtime merges MatMul and Add where it knows all shapes, and then runs them in float: not with our biases."""
    shared = form == "shared"
    legalise = ORT.legalise(shared=shared, result=tiny_calibrated[0])
    model = quantized(tiny_onnx if shared else tiny_onnx_per_sample, tiny_calibrated, tmp_path, *legalise)
    feed = feed_of(tiny, 500 if shared else [500, 20, 900])
    kernels = executed(fixed(model, 3), feed, tmp_path)
    assert sum(kernel == "MatMulIntegerToFloat" for kernel in kernels.values()) == 12
    assert sum(kernel == "MatMulNBits" for kernel in kernels.values()) == (BLOCKS if version() >= BYTES_SINCE else 0)
    assert sqnr(open_graph(model)(feed), open_graph(tmp_path / "fixed.onnx")(feed)) > SAME


@pytest.mark.parametrize("form", ["int8", "per-sample-direct"])
def test_the_audit_gives_a_reason_for_every_gemm_that_fell_back_and_no_other(
    form: str, tiny_onnx: Path, tiny_onnx_per_sample: Path, tiny_calibrated: Any, tmp_path: Path
) -> None:
    model = quantized(tiny_onnx if form == "int8" else tiny_onnx_per_sample, tiny_calibrated, tmp_path)
    audit = audited(model, tiny_calibrated)
    names = {name for name, rule in tiny_calibrated[1].items() if rule.action == "w8a8"}
    floats = {name for name in names if name[-4:] in ("to_q", "to_k", "to_v")} if form == "int8" else names
    fallen = [gemm for gemm in audit.gemms if gemm.wanted == "w8a8" and not gemm.integer]
    assert {gemm.name for gemm in fallen} == floats
    assert all(gemm.reason for gemm in fallen)
    # q, k and v are 3 of 12 units of 2 x tokens x width^2: 3 + 1 + 4 + 4.
    assert audit.coverage == pytest.approx(9 / 12 if form == "int8" else 0)


def test_flops_of_every_gemm(tiny_onnx: Path, tiny_calibrated: Any, tmp_path: Path) -> None:
    audit = audited(
        quantized(tiny_onnx, tiny_calibrated, tmp_path, *ORT.legalise(shared=True, result=tiny_calibrated[0])), tiny_calibrated
    )
    square = 2 * TOKENS * WIDTH * WIDTH
    expected = {}
    for block in (f"transformer_blocks.{n}" for n in range(BLOCKS)):
        expected |= {f"{block}.attn1.{name}": square for name in ("to_q", "to_k", "to_v", "to_out.0")}
        expected |= {f"{block}.ff.net.{name}": 4 * square for name in ("0.proj", "2")}
        expected[f"{block}.norm1.linear"] = 2 * WIDTH * 6 * WIDTH  # one row a sample
    expected["proj_out_1"] = 2 * WIDTH * 2 * WIDTH
    expected["proj_out_2"] = 2 * TOKENS * WIDTH * (2 * 2 * 2)  # patch x patch x channels
    actual = {gemm.name: gemm.flops for gemm in audit.gemms if gemm.wanted != "none"}
    embedder = "transformer_blocks.0.norm1.emb.timestep_embedder"  # the second block's is the same, merged
    expected["pos_embed.proj"] = expected["proj_out_2"]  # a convolution over patches
    expected |= {f"{embedder}.linear_1": 2 * 256 * WIDTH, f"{embedder}.linear_2": 2 * WIDTH * WIDTH}  # 256 frequencies
    assert actual == expected
    attention = [gemm.flops for gemm in audit.gemms if gemm.wanted == "none"]
    product = 2 * TOKENS * TOKENS * WIDTH
    # Scores and values together in one operator, or one after the other.
    assert attention == ([2 * product] * BLOCKS if version() >= ATTENTION_SINCE else [product] * 2 * BLOCKS)
    total = sum(gemm.flops for gemm in audit.gemms)
    assert audit.integer_share == BLOCKS * 12 * square / total


@pytest.fixture(scope="module")
def shared_engine(tiny_onnx: Path, tiny_calibrated: Any, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return open_graph(
        quantized(
            tiny_onnx, tiny_calibrated, tmp_path_factory.mktemp("shared"), *ORT.legalise(shared=True, result=tiny_calibrated[0])
        )
    )


@pytest.fixture(scope="module")
def per_sample_engine(tiny_onnx_per_sample: Path, tiny_calibrated: Any, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("per-sample")
    return open_graph(
        quantized(tiny_onnx_per_sample, tiny_calibrated, folder, *ORT.legalise(shared=False, result=tiny_calibrated[0]))
    )


@pytest.mark.parametrize("samples", [1, 3, 8])
def test_a_sample_does_not_depend_on_its_batch(samples: int, tiny: Any, shared_engine: Engine) -> None:
    feed = feed_of(tiny, 500, samples=samples)
    whole = shared_engine(feed)
    assert sqnr(tiny.forward(feed), whole) > INT8
    for i in range(samples):
        one = {"hidden_states": feed["hidden_states"][i : i + 1], "timestep": feed["timestep"]}
        assert sqnr(shared_engine({**one, "class_labels": feed["class_labels"][i : i + 1]})[0], whole[i]) > SAME


def test_a_batch_may_mix_timesteps_of_all_bins(tiny: Any, per_sample_engine: Engine, shared_engine: Engine) -> None:
    timesteps = [800, 600, 400, 200, 0]  # the five calibrated steps, a bin each
    feed = feed_of(tiny, timesteps, samples=5)
    mixed = per_sample_engine(feed)
    assert sqnr(tiny.forward(feed), mixed) > INT8
    for i, timestep in enumerate(timesteps):
        one = {name: value[i : i + 1] for name, value in feed.items()}
        assert sqnr(per_sample_engine(one)[0], mixed[i]) > SAME
        # The factored form rounds x (c / s[t]) / c, the direct form x / s[t]: only codes at a tie may differ, by one.
        assert sqnr(shared_engine({**one, "timestep": np.asarray([timestep])})[0], mixed[i]) > SAME


def test_a_bound_call_gives_the_same_numbers_and_refuses_other_inputs(tiny: Any, shared_engine: Engine) -> None:
    feed = feed_of(tiny)
    call = shared_engine.bound(feed)
    assert np.array_equal(call(), shared_engine(feed))
    assert np.array_equal(call(), shared_engine(feed))
    with pytest.raises(BackendError, match="cannot run the graph on these inputs"):
        shared_engine.bound({**feed, "hidden_states": feed["hidden_states"][:, :1]})()
    with pytest.raises(BackendError, match="cannot run the graph on these inputs"):
        shared_engine.bound({"x": feed["hidden_states"]})


def test_a_missing_runtime_names_itself_and_its_pip_line() -> None:
    code = (
        "import sys; sys.modules['onnxruntime'] = None\n"
        "from pathlib import Path\nfrom dq_export.deploy.backend import BackendError\n"
        "from dq_export.deploy.onnxruntime.cpu import open_graph\n"
        "try: open_graph(Path('model.onnx'))\nexcept BackendError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "onnxruntime is not installed; pip install 'dq-export[cpu]'" in result.stdout, result.stderr


def test_int4_weights_are_unpacked_inside_the_gemm(tiny: Any, tiny_onnx: Path, tmp_path: Path) -> None:
    calibrated = calibrate_tiny(tiny, recipe_of(tiny, bits="w4a16", scaling="none"))
    assert calibrated[0].sites == {}  # nothing is sampled: only weights are quantized
    model = quantized(tiny_onnx, calibrated, tmp_path, *ORT.legalise(shared=True, result=calibrated[0]))
    audit = audited(model, calibrated)
    assert audit.coverage == 1
    assert {gemm.kernel for gemm in audit.gemms if gemm.wanted == "w4a16"} == {"MatMulNBits"}
    # 8-bit blocks of modulation linears have the same kernel, and were not asked to be counted.
    assert not any(gemm.integer for gemm in audit.gemms if gemm.wanted == "weight-only")
    feed = feed_of(tiny)
    exact, actual = run_onnx(model, feed), open_graph(model)(feed)
    assert sqnr(exact, actual) > 60  # the same weights; float sums of 32 terms in another order, and of blocks
    # Weights of 15 codes a block of 16: some 20 dB each, and a residual around every GEMM.
    assert 15 < sqnr(tiny.forward(feed), actual) < 45


@pytest.mark.slow
def test_before_1_24_the_graph_has_opset_21_and_the_same_integer_kernels(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    import dq_export

    monkeypatch.setattr(onnxruntime, "__version__", "1.23.2")
    report = dq_export.build(model=str(tiny_folder), output_dir=tmp_path / "out", steps=4, calib_size=2)
    model = ir.load(tmp_path / "out" / "model.onnx")
    assert model.opset_imports[""] == 21
    assert not any(node.op_type == "Attention" for node in model.graph)
    assert report.passes  # `build` does not audit
    audited, _ = audit_again(tmp_path / "out")
    assert audited.coverage == 1
