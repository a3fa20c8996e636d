"""The quantized network simulated on the float one: it computes what the Q/DQ graph does, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import calibrate_tiny, calibration_of, feed_of, load_graph, recipe_of, run_onnx, save_tiny, sqnr

from dq_export.calibration.calibrate import calibrate
from dq_export.calibration.group import TorchGroup
from dq_export.calibration.simulation import Simulation
from dq_export.core.artifacts import CalibrationError
from dq_export.families.reference import Reference
from dq_export.families.source import load_reference
from dq_export.passes.base import run_passes
from dq_export.passes.pipeline import canonical_passes, factoring_passes


def calibrated(reference: Reference, bits: str, **options: Any) -> Any:
    return calibrate_tiny(reference, recipe_of(reference, bits=bits, **options))


@pytest.mark.parametrize(
    ("bits", "options"),
    [
        ("w8a8", {"scaling": "smooth", "shift": True, "bins": "per-step"}),
        ("w8a8", {"granularity": "token", "scaling": "auto", "bias_correction": True}),
        ("w6a6", {"scaling": "dilate"}),
        ("w4a8", {"scaling": "smooth", "shift": True, "rounding": "gptq", "granularity": "token"}),
        ("w4a4", {"scaling": "auto"}),
        ("w4a16", {"scaling": "smooth", "rounding": "mse"}),
    ],
)
def test_it_computes_what_the_quantized_graph_does(bits: str, options: Any, tiny: Reference, tiny_onnx: Path) -> None:
    result, assigned = calibrated(tiny, bits, **options)
    graph = load_graph(tiny_onnx)
    run_passes(graph, (*canonical_passes(result, assigned), *factoring_passes(result, shared=True)))
    simulation = Simulation.of(tiny, result, assigned)
    for timestep in (900, 300):
        feed = feed_of(tiny, timestep)
        exact = run_onnx(graph, feed)
        with simulation.on(tiny):
            actual = tiny.forward(feed)
        # The same codes but for values within float32 rounding of a tie, which move by one.
        assert sqnr(exact, actual) > sqnr(tiny.forward(feed), exact) + 12


def test_layers_without_a_bias_get_one_while_it_lasts(tmp_path: Path) -> None:
    reference = load_reference(str(save_tiny(tmp_path, attention_bias=False)))
    result, assigned = calibrated(reference, "w8a8", scaling="smooth", shift=True, bias_correction=True)
    reference.export_onnx(tmp_path / "float.onnx", shared=True)
    graph = load_graph(tmp_path / "float.onnx")
    run_passes(graph, canonical_passes(result, assigned))
    simulation, feed = Simulation.of(reference, result, assigned), feed_of(reference, 900)
    before = reference.forward(feed)
    assert np.any(simulation.biases["transformer_blocks.0.attn1.to_q"] != 0)
    with simulation.on(reference):
        assert sqnr(run_onnx(graph, feed), reference.forward(feed)) > sqnr(before, reference.forward(feed)) + 12
    np.testing.assert_array_equal(reference.forward(feed), before)


def test_nothing_is_left_behind(tiny: Reference) -> None:
    result, assigned = calibrated(tiny, "w4a4", scaling="smooth", shift=True)
    feed = feed_of(tiny)
    before = tiny.forward(feed)
    simulated = Simulation.of(tiny, result, assigned)
    with simulated.on(tiny):
        assert sqnr(before, tiny.forward(feed)) < 40
    np.testing.assert_array_equal(tiny.forward(feed), before)
    with pytest.raises(ZeroDivisionError), simulated.on(tiny):
        assert 1 / 0
    np.testing.assert_array_equal(tiny.forward(feed), before)


def test_progressive_tables_are_of_the_quantized_networks_own_inputs(tiny: Reference) -> None:
    options = {"bins": "per-step", "scaling": "smooth", "shift": True}
    uniform, assigned = calibrated(tiny, "w4a4", **options)
    progressive, _ = calibrated(tiny, "w4a4", calibration="progressive", **options)
    factors: dict[str, dict[float, float]] = {name: {} for name in uniform.sites}
    times: list[float] = []

    def watch(name: str, value: Any) -> None:
        plan = uniform.sites[name]
        amax = float(np.abs((value.numpy() - plan.in_shift) / plan.in_scale).max())
        factors[name][times[-1]] = max(factors[name].get(times[-1], 0.0), amax)

    with Simulation.of(tiny, uniform, assigned).on(tiny), tiny.observe(watch):
        tiny.trajectory(np.arange(4), steps=5, seed=0, guidance=2.0, before=lambda feed: times.append(float(feed["timestep"][0])))
    for name, plan in progressive.sites.items():
        np.testing.assert_array_equal(plan.in_scale, uniform.sites[name].in_scale)
        for timestep, amax in factors[name].items():
            assert plan.activation.at(timestep) * 7 == pytest.approx(amax, rel=1e-3)
    different = [name for name in uniform.sites if uniform.sites[name].activation != progressive.sites[name].activation]
    assert len(different) == len(uniform.sites)


def test_progressive_calibration_does_not_share_its_pictures(tiny: Reference, tmp_path: Path) -> None:
    recipe = recipe_of(tiny, calibration="progressive")
    with pytest.raises(CalibrationError, match="start it without torchrun, or use uniform"):
        calibrate(calibration_of(tiny, recipe, tmp_path, group=TorchGroup(0, 2)))
