"""Properties of the whole rewrite on a real, small DiT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from conftest import calibrate_tiny, feed_of, load_graph, recipe_of, run_onnx, save_tiny, sqnr
from reference import bin_of, onnx_codes, weight_codes

from dq_export.families.source import load_reference
from dq_export.passes.base import run_passes
from dq_export.passes.canonical.fold_scaling import FoldScaling
from dq_export.passes.canonical.fold_transpose import FoldTranspose
from dq_export.passes.canonical.merge_duplicates import MergeDuplicates
from dq_export.passes.legalise.unsign_codes import UnsignCodes
from dq_export.passes.match import linears
from dq_export.passes.names import SITE
from dq_export.passes.pipeline import canonical_passes, factoring_passes

FOLD_BOUND = 1e-5
"""Folding is exact in real arithmetic; float32 has 6e-8 a rounding and a DiT of two blocks some dozens in a row."""


def relative(exact: np.ndarray[Any, Any], actual: np.ndarray[Any, Any]) -> float:
    return float(np.abs(exact - actual).max() / np.abs(exact).max())


@pytest.mark.parametrize(
    ("options", "model"),
    [
        ({"scaling": "smooth", "shift": True}, {}),
        ({"scaling": "dilate", "rho": 2.0, "shift": False}, {}),
        ({"scaling": "auto"}, {}),
        ({"scaling": "smooth", "shift": True}, {"attention_bias": False}),
        ({"scaling": "smooth", "shift": True}, {"out_channels": 4}),
    ],
    ids=["smooth", "dilate", "auto", "no-bias", "learned-sigma"],
)
def test_folding_leaves_the_float_output_unchanged(options: dict[str, Any], model: dict[str, Any], tmp_path: Path) -> None:
    reference = load_reference(str(save_tiny(tmp_path / "model", **model)))
    result, _ = calibrate_tiny(reference, recipe_of(reference, method="minmax", **options))
    assert all(plan.scaled for plan in result.sites.values()) or options["scaling"] == "auto"
    reference.export_onnx(tmp_path / "float.onnx", shared=True)
    graph = load_graph(tmp_path / "float.onnx")
    feed = feed_of(reference)
    exact = run_onnx(graph, feed)
    run_passes(graph, [FoldTranspose(), MergeDuplicates(), FoldScaling(result=result)])
    folded = run_onnx(graph, feed)
    assert relative(exact, folded) < FOLD_BOUND
    assert not np.array_equal(exact, folded), "nothing was folded"


def quantized(path: Path, calibrated: Any, *legalise: Any) -> ir.Model:
    graph = load_graph(path)
    run_passes(graph, (*canonical_passes(*calibrated), *legalise))
    return graph


def test_uint8_codes_change_nothing(tiny: Any, tiny_onnx: Path, tiny_calibrated: Any) -> None:
    feed = feed_of(tiny)
    direct = run_onnx(quantized(tiny_onnx, tiny_calibrated), feed)
    unsigned = run_onnx(quantized(tiny_onnx, tiny_calibrated, UnsignCodes()), feed)
    np.testing.assert_array_equal(direct, unsigned)


@pytest.mark.parametrize("timestep", [0, 1, 333, 500, 999])
def test_direct_and_factored_form_agree(tiny: Any, tiny_onnx: Path, tiny_calibrated: Any, timestep: int) -> None:
    feed = feed_of(tiny, timestep)
    direct = run_onnx(quantized(tiny_onnx, tiny_calibrated), feed)
    factored = run_onnx(quantized(tiny_onnx, tiny_calibrated, *factoring_passes(tiny_calibrated[0])), feed)
    # Few values lie within rounding distance of a code's boundary; each of them moves one product by one code. Against
    # PyTorch the quantized graph has about 50 dB, so 70 dB between the forms is a hundredth of the quantization noise.
    assert sqnr(direct, factored) > 70
    assert sqnr(tiny.forward(feed), direct) > 30


@pytest.mark.parametrize("timestep", [0, 1, 201, 202, 640, 801, 999])
def test_the_runtimes_codes_are_the_oracles(tiny: Any, tiny_onnx: Path, tiny_calibrated: Any, timestep: int) -> None:
    result, _ = tiny_calibrated
    graph = quantized(tiny_onnx, tiny_calibrated, UnsignCodes())
    nodes = [node for node in graph.graph if node.op_type == "QuantizeLinear"]
    exposed: list[tuple[str, ir.Value, ir.Value]] = []
    for node in nodes:
        source = node.inputs[0]
        assert source is not None
        exposed.append((SITE.read(node), source, node.outputs[0]))
    already = set(graph.graph.outputs)
    graph.graph.outputs.extend(v for _, s, c in exposed for v in (s, c) if v not in already)
    names = [str(value.name) for value in graph.graph.outputs]
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        ir.serde.serialize_model(graph).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    actual = dict(zip(names, session.run(None, feed_of(tiny, timestep)), strict=True))
    assert len(exposed) == len(result.sites) == 8
    for site, source, codes in exposed:
        table = result.sites[site].activation
        scale = float(table.scale[bin_of(timestep, list(table.bins.edges))])
        np.testing.assert_array_equal(actual[str(codes.name)].astype(np.int64) - 128, onnx_codes(actual[str(source.name)], scale))


def test_stored_weight_codes_are_the_oracles(tiny_onnx: Path, tiny_calibrated: Any) -> None:
    result, assigned = tiny_calibrated
    floats = load_graph(tiny_onnx)
    passes = canonical_passes(result, assigned)
    run_passes(floats, passes[: 1 + [item.name for item in passes].index("fold_scaling")])
    codes = quantized(tiny_onnx, tiny_calibrated).graph.initializers
    checked = 0
    for name, linear in linears(floats).items():
        if assigned[name].action == "w8a8":
            stored = codes[f"{name}.weight_codes"].const_value
            assert stored is not None
            np.testing.assert_array_equal(stored.numpy(), weight_codes(linear.weight().T, result.weight_scale[name]))
            checked += 1
    assert checked == 12


def test_a_batch_of_mixed_timesteps_equals_single_runs(tiny: Any, tiny_onnx_per_sample: Path, tiny_calibrated: Any) -> None:
    timesteps = [999, 500, 1, 250]
    graph = quantized(tiny_onnx_per_sample, tiny_calibrated, *factoring_passes(tiny_calibrated[0]), UnsignCodes())
    feed = feed_of(tiny, timesteps, samples=4)
    together = run_onnx(graph, feed)
    for i in range(4):
        alone = run_onnx(graph, {name: value[i : i + 1] for name, value in feed.items()})
        # The same operations on the same numbers; only the batch's blocking of float sums may differ, and flip a code.
        assert sqnr(alone, together[i : i + 1]) > 60
        wrong = run_onnx(graph, {**{n: v[i : i + 1] for n, v in feed.items()}, "timestep": np.asarray([timesteps[i - 1]])})
        assert sqnr(alone, wrong) < 40, "the timestep has no effect, so the comparison above shows nothing"


def test_per_sample_equals_shared_where_all_timesteps_are_equal(
    tiny: Any, tiny_onnx: Path, tiny_onnx_per_sample: Path, tiny_calibrated: Any
) -> None:
    shared = run_onnx(quantized(tiny_onnx, tiny_calibrated, *factoring_passes(tiny_calibrated[0])), feed_of(tiny, 500))
    separate = run_onnx(
        quantized(tiny_onnx_per_sample, tiny_calibrated, *factoring_passes(tiny_calibrated[0])), feed_of(tiny, [500] * 3)
    )
    direct = run_onnx(quantized(tiny_onnx_per_sample, tiny_calibrated), feed_of(tiny, [500] * 3))
    assert sqnr(shared, separate) > 70  # as above: rare flips of one code
    assert sqnr(shared, direct) > 70


def test_repeated_embedders_are_merged(tiny_onnx: Path) -> None:
    graph = load_graph(tiny_onnx)
    run_passes(graph, [MergeDuplicates()])
    embedders = [name for name in linears(graph) if ".emb.timestep_embedder.linear_1" in name]
    assert len(embedders) == 1
    assert all(linear.gemm.name == name for name, linear in linears(graph).items())
