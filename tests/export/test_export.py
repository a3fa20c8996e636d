"""Whole exports of a small model, through the Python API."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from conftest import QUICK, UNSERVED, export_untimed, save_tiny
from hard_copy import harden_folder

import dq_export
from dq_export.core.recipe import Recipe, RecipeError
from dq_export.deploy.backend import BackendError
from dq_export.deploy.parity import ParityError
from dq_export.families.reference import ModelError
from dq_export.finished import audit_again
from dq_export.pipeline import run
from dq_export.report.explain import explain_linear
from dq_export.report.report import Report

BYTES = ("calibration.safetensors", "model.onnx", "model.onnx.data", "parity/inputs.json", "parity/outputs.json", "recipe.yaml")


class Watch:
    """Records which stages ran and which were reused."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.reused: list[str] = []
        self.stage = ""

    def begin(self, stage: str, text: str) -> None:
        self.stage = stage

    def advance(self, done: int, total: int, unit: str = "") -> None:
        assert 0 <= done <= total

    def end(self, seconds: float, result: str, *, kept: bool) -> None:
        (self.reused if kept else self.done).append(self.stage)


def test_the_folder_holds_everything(tiny_exported: Path) -> None:
    for name in (*BYTES, "float/model.onnx", "engine/optimized.onnx", "parity/command.txt", "report.json", "report.html"):
        assert (tiny_exported / name).is_file(), name
    report = Report.model_validate_json((tiny_exported / "report.json").read_text())
    assert report.audit is not None
    assert report.audit.coverage == 1
    assert report.parity is not None
    assert {call.stage for call in report.parity.calls} == {"float-onnx", "qdq-onnx", "engine"}
    assert report.mean_sqnr("float-onnx") > 100 > report.mean_sqnr("engine") > 30
    assert list(report.seconds) == UNSERVED
    assert all(linear.reason for linear in report.linears if linear.action != "w8a8")
    page = (tiny_exported / "report.html").read_text()
    assert "http://" not in page
    assert "https://" not in page
    assert "100.0 %" in page


def test_the_shipped_schema_is_the_reports() -> None:
    shipped = json.loads((Path(dq_export.__file__).parent / "report" / "report.schema.json").read_text())
    assert shipped == Report.model_json_schema()


def test_the_graph_is_standard_onnx_with_explicit_zero_points(tiny_exported: Path) -> None:
    graph = ir.load(tiny_exported / "model.onnx").graph
    assert {node.domain for node in graph} == {""}
    assert all(len(node.inputs) == 3 for node in graph if node.op_type in ("QuantizeLinear", "DequantizeLinear"))
    assert [value.name for value in graph.inputs] == ["hidden_states", "timestep", "class_labels"]
    assert [value.name for value in graph.outputs] == ["sample"]
    names = {node.name for node in graph}
    assert "transformer_blocks.1.attn1.to_k" in names


def test_the_graph_says_where_it_came_from(tiny_exported: Path) -> None:
    model = ir.load(tiny_exported / "model.onnx")
    assert (model.producer_name, model.producer_version) == ("dq-export", dq_export.__version__)
    report = Report.model_validate_json((tiny_exported / "report.json").read_text())
    decisions = hashlib.sha256((tiny_exported / "calibration.safetensors").read_bytes()).hexdigest()
    assert model.metadata_props == {"dq_export_checkpoint": report.digest, "dq_export_calibration": decisions}


@pytest.mark.slow
def test_a_second_run_keeps_every_stage_and_other_options_redo_what_differs(tiny_folder: Path, tmp_path: Path) -> None:
    options = {**QUICK, "model": str(tiny_folder), "output_dir": tmp_path / "out"}
    dq_export.quantize(**options)
    assert not (tmp_path / "out" / "engine").exists()
    watch = Watch()
    dq_export.export(**options, progress=watch)
    assert watch.reused == ["float", "calibrate", "quantize"]
    watch = Watch()
    dq_export.export(**options, progress=watch)
    assert watch.reused == UNSERVED
    watch = Watch()
    dq_export.export(**{**options, "scaling": "none"}, overwrite=True, progress=watch)
    assert watch.reused == ["float", "reference"]  # the timestep bins stayed as they were


def test_the_saved_recipe_repeats_the_run_byte_for_byte(tiny_exported: Path, tmp_path: Path) -> None:
    run(Recipe.load(tiny_exported / "recipe.yaml"), tmp_path / "again", until="verify")
    for name in BYTES:
        assert (tmp_path / "again" / name).read_bytes() == (tiny_exported / name).read_bytes(), name


def test_the_canonical_format_has_int8_codes_and_no_engine(tiny_folder: Path, tmp_path: Path) -> None:
    report = dq_export.export(model=str(tiny_folder), output_dir=tmp_path, format="onnx", **QUICK)
    zeros = {
        str(node.inputs[2].dtype)
        for node in ir.load(tmp_path / "model.onnx").graph
        if node.op_type == "QuantizeLinear" and node.inputs[2] is not None
    }
    assert zeros == {"INT8"}
    assert report.audit is None
    assert not (tmp_path / "engine").exists()
    assert report.mean_sqnr("qdq-onnx") > 30


def test_per_sample_timesteps(tiny_folder: Path, tmp_path: Path) -> None:
    report = export_untimed(tiny_folder, tmp_path, timesteps="per-sample", **QUICK)
    shape = ir.load(tmp_path / "model.onnx").graph.inputs[1].shape
    assert shape is not None
    assert not isinstance(shape[0], int)
    assert report.audit is not None
    assert report.audit.coverage == 1
    assert report.mean_sqnr("engine") > 30


def test_excluded_linears_stay_float_with_a_reason(tiny_folder: Path, tmp_path: Path) -> None:
    report = export_untimed(tiny_folder, tmp_path, exclude=(r"to_q$", r"blocks\.0\.ff"), **QUICK)
    excluded = {linear.name: linear for linear in report.linears if "excluded" in linear.reason}
    assert set(excluded) == {f"transformer_blocks.{n}" for n in ("0.attn1.to_q", "1.attn1.to_q", "0.ff.net.0.proj", "0.ff.net.2")}
    assert report.audit is not None
    assert report.audit.coverage == 1
    assert {gemm.kernel for gemm in report.audit.gemms if gemm.name in excluded} <= {"MatMul", "FusedMatMul"}
    assert explain_linear(report, excluded["transformer_blocks.0.attn1.to_q"])["action"] == "float"
    with pytest.raises(RecipeError, match="matches none"):
        dq_export.export(model=str(tiny_folder), output_dir=tmp_path / "x", exclude=("nothing",), **QUICK)
    assert not (tmp_path / "x").exists()


def replay(out: Path) -> int:
    import shlex

    words = shlex.split((out / "parity" / "command.txt").read_text())
    polygraphy = "import sys; from polygraphy.tools import main; sys.exit(main())"
    return subprocess.run([sys.executable, "-c", polygraphy, *words[1:]], cwd=out, capture_output=True, check=False).returncode


def spoil_scales(out: Path, target: Path) -> None:
    """A copy of an export whose activation scales are three times too small, so that most values saturate."""
    import shutil

    shutil.copytree(out, target)
    model = ir.load(out / "model.onnx")
    ir.external_data.load_to_model(model)
    for name, value in model.graph.initializers.items():
        if "activation_scale" in name and value.const_value is not None:
            value.const_value = ir.tensor(np.asarray(value.const_value.numpy() / 3, dtype=np.float32), name=name)
    ir.save(model, target / "model.onnx", external_data="model.onnx.data")


def test_polygraphy_replays_the_parity_files_and_fails_on_spoilt_scales(tiny_exported: Path, tmp_path: Path) -> None:
    assert replay(tiny_exported) == 0
    spoil_scales(tiny_exported, tmp_path / "spoilt")
    assert replay(tmp_path / "spoilt") != 0


def test_an_engine_that_is_too_far_from_pytorch_fails_after_the_report(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ParityError, match=r"engine: .* required 150.0 dB"):
        export_untimed(tiny_folder, tmp_path, **{**QUICK, "min_sqnr": 150})
    assert (tmp_path / "report.html").exists()


def test_a_graph_that_runs_in_float_fails_the_audit(tiny_exported: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(tiny_exported, tmp_path / "out")
    model = ir.load(tmp_path / "out" / "model.onnx")
    for node in model.graph:  # signed codes again: what a naive export would write
        if node.op_type == "QuantizeLinear":
            zero = ir.Value(name=f"{node.name}.z", const_value=ir.tensor(np.asarray(0, dtype=np.int8), name=f"{node.name}.z"))
            model.graph.register_initializer(zero)
            node.outputs[0].dtype = ir.DataType.INT8
            for user in (node, *(user for user, _ in node.outputs[0].uses())):
                user.replace_input_with(2, zero)
    ir.save(model, tmp_path / "out" / "model.onnx")
    report, required = audit_again(tmp_path / "out")
    assert report.coverage < required
    reasons = {gemm.name: gemm.reason for gemm in report.gemms if not gemm.integer}
    assert "an int8 activation that several operators read" in reasons["transformer_blocks.0.attn1.to_q"]


def mean_sqnr(model: Path, out: Path, **options: Any) -> float:
    report = dq_export.export(model=str(model), output_dir=out, **{**QUICK, "min_sqnr": -200, **options})
    return report.mean_sqnr("engine")


@pytest.mark.slow
def test_the_hard_copy_collapses_without_scaling_and_recovers_with_auto(tmp_path: Path) -> None:
    from dq_export.families.source import PACKAGED

    easy, hard = PACKAGED / "dit-digits", tmp_path / "hard"
    harden_folder(easy, hard)
    options: dict[str, Any] = {"steps": 10, "calib_size": 4, "guidance_scale": 2.0}
    plain = mean_sqnr(easy, tmp_path / "easy-auto", **options)
    collapsed = mean_sqnr(hard, tmp_path / "hard-none", scaling="none", **options)
    recovered = mean_sqnr(hard, tmp_path / "hard-auto", **options)
    assert collapsed < plain - 15, "the hard copy is not hard"
    assert recovered > plain - 3


@pytest.mark.slow
def test_a_model_without_biases_and_with_learned_sigma_exports(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", attention_bias=False, out_channels=4)
    report = dq_export.export(model=str(folder), output_dir=tmp_path / "out", shift=True, scaling="smooth", **QUICK)
    assert report.audit is not None
    assert report.audit.coverage == 1
    assert report.mean_sqnr("engine") > 30


@pytest.mark.parametrize(
    "options",
    [
        {"bits": "w4a8", "granularity": "token", "rounding": "gptq", "bias_correction": True},
        pytest.param({"bits": "w4a8", "granularity": "token-group"}, marks=pytest.mark.slow),
        pytest.param({"bits": "w4a4", "calibration": "progressive"}, marks=pytest.mark.slow),
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_other_bits_and_granularities_export_and_are_audited_again(
    options: dict[str, Any], tiny_folder: Path, tmp_path: Path
) -> None:
    report = export_untimed(tiny_folder, tmp_path / "out", **{**QUICK, "min_sqnr": 0, **options})
    assert report.audit is not None
    assert report.audit.coverage == 1
    actual, _ = audit_again(tmp_path / "out")
    assert actual.coverage == 1
    second = export_untimed(tiny_folder, tmp_path / "again", **{**QUICK, "min_sqnr": 0, **options})
    assert second.parity == report.parity
    for name in ("calibration.safetensors", "model.onnx", "model.onnx.data"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name


@pytest.mark.slow
def test_one_block_of_a_width_without_blocks_is_exported_with_the_largest_seed(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", num_layers=1, attention_head_dim=18)
    report = dq_export.export(model=str(folder), output_dir=tmp_path / "out", **{**QUICK, "seed": 2**64 - 1})
    modulation = next(linear for linear in report.linears if linear.action == "weight-only")
    assert "divides its 36 inputs: one scale for each channel" in modulation.reason
    assert report.audit is not None
    assert report.audit.coverage == 1
    assert report.mean_sqnr("float-onnx") > 120
    assert report.mean_sqnr("engine") > 30


LATE = {
    "variance": ({"_class_name": "DDPMScheduler", "variance_type": "learned_range"}, {}, "set variance_type to fixed_small"),
    "fraction": ({"_class_name": "EulerDiscreteScheduler"}, {"steps": 5}, "set timestep_spacing to trailing"),
    "steps": ({"_class_name": "DDIMScheduler", "num_train_timesteps": 2}, {}, "change --steps to 2 or less"),
    "served": ({"_class_name": "DDPMScheduler", "beta_schedule": "sigmoid"}, {"triton": True}, "no sampler of this checkpoint"),
}  # fmt: skip


@pytest.mark.parametrize(("scheduler", "options", "message"), LATE.values(), ids=LATE)
def test_options_that_the_sampler_does_not_take_are_refused_before_anything_is_written(
    scheduler: dict[str, Any], options: dict[str, Any], message: str, tiny_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_folder, tmp_path / "model")
    (tmp_path / "model" / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    with pytest.raises(ModelError, match=message):
        dq_export.export(model=str(tmp_path / "model"), output_dir=tmp_path / "out", **{**QUICK, **options})
    assert not (tmp_path / "out").exists()


def test_shapes_are_read_before_anything_is_written(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"--max-shapes: 'class_labels' has a batch of 5000"):
        dq_export.export(
            model=str(tiny_folder), output_dir=tmp_path / "out", format="trt", max_shapes="class_labels:5000", **QUICK
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("limit", [-1.0, 0.0, float("inf"), float("nan")])
def test_an_impossible_memory_limit_is_refused(limit: float, tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"--max-memory .*: expected a number of GiB above 0"):
        dq_export.export(model=str(tiny_folder), output_dir=tmp_path / "out", max_memory=limit, **QUICK)
    assert not (tmp_path / "out").exists()
