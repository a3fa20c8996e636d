"""--max-memory: what an export of a model of gigabytes does within a limit, computed from the checkpoint's headers alone."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import STAGES

import dq_export
from dq_export.core.progress import Silent
from dq_export.core.recipe import Recipe, RecipeError
from dq_export.families.weights import Weights, find_weights
from dq_export.memory import GIB, MemoryPlan, plan_memory


def header_alone(folder: Path, shapes: Mapping[str, tuple[int, int]]) -> Weights:
    """A checkpoint of float32 tensors, of which only the header is there."""
    entries, end = {}, 0
    for name, (rows, width) in shapes.items():
        start, end = end, end + 4 * rows * width
        entries[name] = {"dtype": "F32", "shape": [rows, width], "data_offsets": [start, end]}
    header = json.dumps({"__metadata__": {}, **entries}).encode()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"_class_name": "DiTTransformer2DModel"}))
    path = folder / "diffusion_pytorch_model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + end)  # a hole in the place of the tensors
    return find_weights(folder)


@pytest.fixture
def large(tmp_path: Path) -> Weights:
    """A checkpoint with the linears of DiT-XL/2 (2.5 GiB)."""
    shapes = [(1152, 1152)] * 4 + [(4608, 1152), (1152, 4608), (6912, 1152)]
    return header_alone(
        tmp_path / "large", {f"blocks.{block}.{index}": shape for block in range(28) for index, shape in enumerate(shapes)}
    )


def recipe(**values: Any) -> Recipe:
    return Recipe.parse({"model": "m", **values}, "test")


def test_without_a_limit_everything_runs(large: Weights) -> None:
    plan = plan_memory(large, recipe(rounding="gptq"), None, STAGES)
    assert plan.stages == STAGES
    assert plan.space == GIB


def test_bench_alone_is_left_out_where_it_alone_does_not_fit(large: Weights) -> None:
    assert plan_memory(large, recipe(), 4.5, STAGES).stages == STAGES[:-1]
    assert plan_memory(large, recipe(), 4.7, STAGES).stages == STAGES


def test_stages_that_do_not_fit_are_all_named_with_the_way_out(large: Weights) -> None:
    with pytest.raises(RecipeError, match=r"--max-memory 1\.8: calibrate 2\.0 GiB, verify 2\.1 GiB will not fit; .* larger"):
        plan_memory(large, recipe(), 1.8, STAGES)
    with pytest.raises(RecipeError, match=r"verify 2\.1 GiB will not fit; `dq-export build` does without verify"):
        plan_memory(large, recipe(), 2, STAGES)
    until = STAGES[: STAGES.index("build") + 1]
    assert plan_memory(large, recipe(), 2, until).stages == until


def test_a_controlnet_stays_mapped_beside_the_network(large: Weights) -> None:
    assert plan_memory(large, recipe(), 5.6, STAGES, beside=2 * GIB).stages == STAGES
    with pytest.raises(RecipeError, match=r"--max-memory 2\.1: calibrate 2\.9 GiB, verify 3\.0 GiB will not fit"):
        plan_memory(large, recipe(), 2.1, STAGES, beside=2 * GIB)


def test_gptq_gets_what_the_limit_leaves(large: Weights) -> None:
    with pytest.raises(RecipeError, match=r"--max-memory 3: calibrate 3\.\d GiB will not fit"):
        plan_memory(large, recipe(rounding="gptq"), 3, STAGES)
    tight, wide = (plan_memory(large, recipe(rounding="gptq"), limit, STAGES).space for limit in (3.5, 11.0))
    assert 20 * 4608**2 < tight < GIB
    assert wide - tight == pytest.approx(7.5 * GIB)
    assert plan_memory(large, recipe(), 12, STAGES).space == GIB  # which nothing but GPTQ uses


def test_progressive_calibration_holds_the_quantized_network_too(large: Weights) -> None:
    with pytest.raises(
        RecipeError,
        match=r"--max-memory 4\.5: calibrate 5\.1 GiB will not fit; --rounding mse and --calibration uniform need less",
    ):
        plan_memory(large, recipe(calibration="progressive"), 4.5, STAGES)


def test_text_encoders_are_held_beside_the_network(large: Weights) -> None:
    stages = ("conditions", *STAGES)
    assert plan_memory(large, recipe(), 4.6, stages, 2 * GIB).stages == stages
    with pytest.raises(RecipeError, match=r"conditions 4\.0 GiB will not fit; encode the prompts on a larger machine, and pass"):
        plan_memory(large, recipe(), 3.9, stages, 2 * GIB)


class Runs(Silent):
    """Counts runs over the pictures, of 5 network calls each."""

    def __init__(self) -> None:
        self.count = 0

    def advance(self, done: int, total: int, unit: str = "") -> None:
        self.count += done == total == 5


@pytest.mark.parametrize(("space", "runs"), [(GIB, 2), pytest.param(8 * 32 * 32, 9, marks=pytest.mark.slow)])
def test_what_the_limit_leaves_saves_runs_over_the_pictures(
    space: int, runs: int, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dq_export.preparation.plan_memory", lambda *arguments: MemoryPlan(stages=arguments[3], space=space))
    watch = Runs()
    dq_export.calibrate(
        model=str(tiny_folder), output_dir=tmp_path, rounding="gptq", steps=5, calib_size=1, max_memory=9, progress=watch
    )
    assert watch.count == runs  # one for the ranges; then all 8 inputs at once, or one in each


def test_nothing_is_written_by_an_export_that_will_not_fit(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"--max-memory 0\.5: calibrate 0\.9 GiB, verify 0\.9 GiB will not fit"):
        dq_export.export(model=str(tiny_folder), output_dir=tmp_path / "out", max_memory=0.5)
    assert not (tmp_path / "out").exists()


def test_training_takes_one_block_and_few_samples_of_a_batch(large: Weights) -> None:
    until = STAGES[: STAGES.index("quantize")]
    options = {"rounding": "distill", "distill_batch": 64}
    assert plan_memory(large, recipe(**options), 4.6, until).stages == until
    with pytest.raises(RecipeError, match=r"distill 4\.\d GiB will not fit; --rounding gptq, or no --finish, needs less"):
        plan_memory(large, recipe(**options), 4.0, ("distill",))
    with pytest.raises(RecipeError, match=r"distill \d+\.\d GiB will not fit"):
        plan_memory(large, recipe(**options, finish=10), 5.5, ("distill",))


def test_training_takes_one_module_of_a_unets_level(tmp_path: Path) -> None:
    of_a_level, of_a_list = (
        header_alone(
            tmp_path / kind, {f"down_blocks.{level}{part}.{index}.weight": (4096, 4096) for level in (0, 1) for index in range(8)}
        )
        for kind, part in (("level", ""), ("list", ".attentions"))
    )
    options = {"rounding": "distill", "distill_batch": 1}
    needs = []
    for weights in (of_a_level, of_a_list):
        with pytest.raises(RecipeError) as raised:
            plan_memory(weights, recipe(**options), 0.1, ("distill",))
        needs.append(float(str(raised.value).split("distill ")[1].split(" GiB")[0]))
    assert needs[0] - needs[1] > 7 * 7 * 4096**2 * 4 / GIB, "copies of seven eighths of a level"
