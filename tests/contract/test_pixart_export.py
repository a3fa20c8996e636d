"""Whole exports of tiny PixArt networks from a file of conditions, without text encoders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pixart import ALPHA, save_pixart
from toy import WIDTH

from dq_export.core.condition_file import CONDITIONS, load_conditions, save_conditions
from dq_export.core.network import Conditions
from dq_export.core.recipe import Recipe
from dq_export.deploy.replay import load_replay
from dq_export.pipeline import run
from dq_export.report.report import Report

TOKENS = 12
QUICK: dict[str, Any] = {"steps": 4, "calib_size": 2, "parity_size": 1}
FLOPS = 2 * 16 * 48
"""Of one output channel of a linear that works on the picture's 16 tokens of width 48."""


@pytest.fixture(scope="module")
def sigma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return without_encoders(save_pixart(tmp_path_factory.mktemp("sigma")))


@pytest.fixture(scope="module")
def alpha(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_pixart(tmp_path_factory.mktemp("alpha"), pipeline="PixArtAlphaPipeline", **ALPHA)
    sizes = {"resolution": np.full((5, 2), 1024.0), "aspect_ratio": np.ones((5, 1))}
    return without_encoders(folder, **sizes)


def without_encoders(folder: Path, **more: Any) -> Path:
    """The pipeline folder with a file of 4 conditions of 12 tokens at most, and nothing that encodes prompts."""
    rng = np.random.default_rng(0)
    mask = np.arange(TOKENS) < np.asarray([[1], [3], [7], [12], [5]])
    rows = {"encoder_hidden_states": rng.normal(size=(5, TOKENS, WIDTH)), "encoder_attention_mask": mask, **more}
    arrays, null = ({name: row[part].astype(np.float32) for name, row in rows.items()} for part in (slice(1, 5), slice(1)))
    save_conditions(folder / CONDITIONS, Conditions(names=tuple("abcd"), arrays=arrays, null=null))
    for name in ("tokenizer", "text_encoder"):
        shutil.rmtree(folder / name)
    (folder / "prompts.txt").unlink()
    return folder


def exported(model: Path, out: Path, until: str = "verify", **options: Any) -> Report:
    values = {"model": str(model), "conditions": str(model / CONDITIONS), **QUICK, **options}
    report = run(Recipe.parse(values, "test"), out, until=until)
    assert report is not None
    assert report.audit is not None
    assert report.audit.coverage == 1, "every linear of the blocks"
    quantized = [gemm.name for gemm in report.audit.gemms if gemm.required]
    assert len(quantized) == 10 * (len(report.audit.gemms) // 13), "ten a block"
    return report


@pytest.mark.slow
def test_scales_by_timestep_on_onnx_runtime(sigma: Path, tmp_path: Path) -> None:
    report = exported(sigma, tmp_path / "out")
    assert report.audit is not None
    assert report.worst_call("float-onnx").sqnr > 120
    flops = {gemm.name: gemm.flops for gemm in report.audit.gemms}
    assert flops["transformer_blocks.2.ff.net.0.proj"] == FLOPS * 192
    assert flops["transformer_blocks.2.attn2.to_k"] == 2 * TOKENS * 48 * 48, "of the tokens that the conditions have"
    feeds, _ = load_replay(tmp_path / "out" / "parity")
    conditions = load_conditions(sigma / CONDITIONS)
    for name, null in conditions.null.items():
        states = feeds[0][name]
        np.testing.assert_array_equal(states[:1], null)
        assert any(np.array_equal(states[1], row) for row in conditions.arrays[name]), "the null first"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "kernel"),
    [
        ({"bins": 1}, "MatMulIntegerToFloat"),
        ({"granularity": "token"}, "MatMulIntegerToFloat"),
        ({"bits": "w4a8", "granularity": "token", "rounding": "gptq"}, "MatMulIntegerToFloat"),
        ({"provider": "openvino"}, "FullyConnected i8"),
    ],
)
def test_other_schemes_and_openvino(options: dict[str, Any], kernel: str, sigma: Path, tmp_path: Path) -> None:
    report = exported(sigma, tmp_path / "out", **options)
    assert report.audit is not None
    assert {gemm.kernel for gemm in report.audit.gemms if gemm.required} == {kernel}


@pytest.mark.slow
def test_alpha_is_exported_with_the_pictures_size(alpha: Path, tmp_path: Path) -> None:
    report = exported(alpha, tmp_path / "out")
    assert report.worst_call("float-onnx").sqnr > 120
    feeds, _ = load_replay(tmp_path / "out" / "parity")
    assert feeds[0]["resolution"].tolist() == [[1024, 1024]] * 2


@pytest.mark.slow
def test_a_plan_is_built_ahead_of_time_for_the_pictures_and_their_texts(sigma: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    report = exported(sigma, tmp_path / "out", until="audit", format="trt-rtx", target="sm89", dtype="fp16")
    assert report.audit is not None
    assert {gemm.kernel for gemm in report.audit.gemms if gemm.required} == {"gemm Int8xInt8"}
    shapes = json.loads((tmp_path / "out" / "engine" / "plan.json").read_text())["profiles"]
    assert shapes["hidden_states"] == [[batch, 4, 8, 8] for batch in (1, 2, 16)]
    assert shapes["encoder_attention_mask"] == [[batch, TOKENS] for batch in (1, 2, 16)]
