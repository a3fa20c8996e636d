"""A whole search, whose winner is exported."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import command_line
import pytest
from conftest import save_tiny

from dq_export.core.recipe import Recipe, RecipeError
from dq_export.core.scheme import PRESETS, scheme_of
from dq_export.deploy.onnxruntime.cpu import ORT
from dq_export.deploy.openvino.backend import OpenVino
from dq_export.deploy.tensorrt.backend import TensorRt
from dq_export.families.reference import ModelError
from dq_export.families.source import load_reference
from dq_export.output_folder import OutputError
from dq_export.pipeline import run
from dq_export.preparation import Options, resolve
from dq_export.search.explore import WINNER, explore
from dq_export.search.request import SearchError, SearchRequest
from dq_export.search.space import CHOICES, Q_DIT, space_of, weight_bytes
from dq_export.search.trajectories import EVALUATIONS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("search"))


def recipe_for(folder: Path) -> Recipe:
    return Recipe.parse({"model": str(folder), "steps": 4, "calib_size": 2, "parity_size": 1, "min_sqnr": -100}, "test")


def search_tiny(folder: Path, out: Path, **options: Any) -> Any:
    request = SearchRequest(**{"evaluations": 60, "pictures": 2, "steps": 4, **options})
    return explore(recipe_for(folder), out, request)


@pytest.fixture(scope="module")
def searched(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("found") / "out"
    return out, search_tiny(folder, out, max_size=0.085)


def test_the_winner_exports_at_the_size_that_the_search_predicted(folder: Path, searched: Any, tmp_path: Path) -> None:
    out, outcome = searched
    assert outcome.reached
    assert outcome.size <= 0.085
    report = run(Recipe.load(out / WINNER), tmp_path / "engine", Options(front=out / "search.svg"))
    assert report is not None
    assert report.audit is not None
    assert report.audit.coverage == 1
    stored = sum(value.nbytes for value in _weights(tmp_path / "engine" / "model.onnx")) / 1e6
    assert stored == pytest.approx(outcome.size, rel=0.02)
    page = (tmp_path / "engine" / "report.html").read_text()
    assert "The search that found this recipe" in page
    assert "data:image/svg+xml;base64," in page


def _weights(path: Path) -> list[Any]:
    import onnx_ir as ir

    graph = ir.load(path).graph
    constants = [v.const_value for v in graph.initializers.values() if v.const_value is not None]
    return [tensor for tensor in constants if ".weight" in str(tensor.name) and "shape" not in str(tensor.name)]


def test_a_search_tries_every_choice_alone_and_is_no_worse(searched: Any) -> None:
    out, outcome = searched
    tried = {
        tuple(entry["genome"]): entry["sqnr"]
        for line in (out / EVALUATIONS).read_text().splitlines()[1:]
        if (entry := json.loads(line))
    }
    uniform = [sqnr for genome, sqnr in tried.items() if len(set(genome)) == 1 and genome[0] > 0]
    assert uniform
    assert outcome.sqnr >= min(uniform)
    minimum = max((sqnr for _, size, _, sqnr in outcome.uniform if size <= 0.085), default=-99.0)
    assert outcome.held_back > minimum - 2  # on other noise and conditions


def test_a_killed_search_goes_on_from_its_evaluations(folder: Path, searched: Any, tmp_path: Path) -> None:
    import shutil

    out, actual = searched
    shutil.copytree(out, tmp_path / "again")
    journal = tmp_path / "again" / EVALUATIONS
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:20]) + lines[20][:15])  # killed while it wrote
    outcome = search_tiny(folder, tmp_path / "again", max_size=0.085)
    assert (outcome.recipe, outcome.sqnr, outcome.held_back, outcome.front) == (
        actual.recipe,
        actual.sqnr,
        actual.held_back,
        actual.front,
    )
    rows = journal.read_text().splitlines()
    assert rows[:20] == [line.rstrip() for line in lines[:20]]
    assert len(rows) == len(lines) + 1


def test_the_journal_of_another_search_is_refused(folder: Path, searched: Any) -> None:
    out, _ = searched
    with pytest.raises(OutputError, match="of another search"):
        search_tiny(folder, out, max_size=0.085, pictures=3)


@pytest.mark.parametrize("content", ["[]\n", "null\n", "no json\n", "[" * 5000 + "\n", "\ufeff{}\n"])
def test_a_file_that_is_not_a_journal_is_refused(content: str, folder: Path, searched: Any, tmp_path: Path) -> None:
    import shutil

    out, _ = searched
    shutil.copytree(out, tmp_path / "again")
    (tmp_path / "again" / EVALUATIONS).write_text(content)
    with pytest.raises(OutputError, match="delete"):
        search_tiny(folder, tmp_path / "again", max_size=0.085)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one goal: --target-sqnr DB, --max-size MB or --max-latency MS"),
        ({"max_size": 1, "target_sqnr": 3}, "give one goal"),
        ({"max_size": 0.001}, r"--max-size 0\.001: the cheapest of all mixes takes 0\.\d+ MB; raise the limit"),
        ({"max_size": 1, "strategy": "anneal"}, "--strategy 'anneal': expected descend or evolve"),
        *(
            ({goal: value}, f"--{goal.replace('_', '-')} {value:g}: expected a number above 0")
            for goal in ("max_size", "max_latency", "target_sqnr")
            for value in (float("nan"), float("inf"), float("-inf"), -1.0, 0.0)
        ),
        ({"target_sqnr": 201.0}, "--target-sqnr 201: expected a number above 0 up to 200"),
        *(({"max_size": 1, name: 0}, f"--{name} 0: expected 1 to") for name in ("evaluations", "pictures", "steps")),
        ({"max_size": 1, "pictures": 10**9}, "--pictures 1000000000: expected 1 to 1000"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_written(
    options: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        search_tiny(folder, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("named", ["trt", "trt-rtx", "onnx"])
def test_kernels_that_cannot_run_here_are_refused_before_the_model_is_loaded(named: str, tmp_path: Path) -> None:
    """No driver shows a GPU here; a model that does not exist stands for work that must not begin."""
    from dq_export.deploy.tensorrt.runner import compute_capability

    if compute_capability():
        pytest.skip("there is a GPU")
    recipe = Recipe.parse({"model": str(tmp_path / "missing"), "format": named}, "test")
    with pytest.raises(RecipeError, match="--max-latency times kernels, and") as error:
        explore(recipe, tmp_path / "out", SearchRequest(max_latency=1.0))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_target_that_nothing_reaches_is_an_error_without_a_winner(folder: Path, searched: Any, tmp_path: Path) -> None:
    import shutil

    out, _ = searched
    shutil.copytree(out, tmp_path / "again")
    with pytest.raises(
        SearchError,
        match=r"--target-sqnr 199: none of \d+ mixes that quantize anything meets it; the nearest keeps \d+\.\d dB at",
    ) as error:
        search_tiny(folder, tmp_path / "again", target_sqnr=199.0)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "again" / WINNER).exists()
    assert json.loads((tmp_path / "again" / "search.json").read_text())["reached"] is False


def test_a_search_by_latency_times_every_shape_and_choice(folder: Path, tmp_path: Path) -> None:
    outcome = search_tiny(folder, tmp_path / "out", max_latency=50.0, evaluations=40)
    assert outcome.reached
    assert 0 < outcome.milliseconds < 50
    assert json.loads((tmp_path / "out" / "search.json").read_text())["unit"] == "ms"


def test_the_space_leaves_out_what_does_not_divide_or_run(folder: Path) -> None:
    reference = load_reference(str(folder))
    recipe = resolve(recipe_for(folder), (), reference, None)
    space = space_of(reference, recipe, CHOICES, ORT)
    sizes = [scheme.words["group_size"] for scheme in space.choices]
    narrow = space.allowed[space.sites.index("transformer_blocks.0.attn1.to_q")]
    assert not narrow[sizes.index(64)]
    assert narrow[sizes.index(32)]
    on_trt = space_of(reference, recipe, (*CHOICES, *Q_DIT), TensorRt("fp16")).choices
    assert on_trt == CHOICES
    with pytest.raises(RecipeError, match="nothing to search"):
        space_of(reference, recipe, Q_DIT, OpenVino("fp32"))


def test_bytes_of_a_weight() -> None:
    assert weight_bytes(PRESETS["float"], 10, 64) == 4 * 640
    assert weight_bytes(PRESETS["w8a8"], 10, 64) == 640 + 10 * 5
    assert weight_bytes(scheme_of("w4a8", "token", 32), 10, 64) == 320 + 10 * (2 + 5)
    assert weight_bytes(scheme_of("w4a16", group_size=32), 10, 64) == 320 + 20 * 4.5


def test_the_command_says_what_to_export(folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "base.yaml"
    recipe.write_text(recipe_for(folder).dump())
    words = ["search", "--recipe", str(recipe), "--max-size", "0.1", "--evaluations", "12", "--pictures", "1", "--steps", "2"]
    result = command_line.call(*words, "-o", tmp_path / "s")
    assert result.returncode == 0, result.stderr
    assert f"dq-export --recipe {tmp_path / 's' / WINNER} -o out" in result.stdout.replace("\n", "")
    assert re.search(r"\d+ evaluations measure each", result.stderr)


@pytest.mark.parametrize(("calibration", "judging"), [(4, 12), (12, 4)])
def test_steps_that_the_sampler_cannot_take_are_refused_before_the_search(calibration: int, judging: int, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_train_timesteps": 10}))
    with pytest.raises(ModelError, match=r"cannot sample in 12 steps .*change --steps to 10 or less"):
        explore(Recipe(model=str(folder), steps=calibration), tmp_path / "found", SearchRequest(target_sqnr=20, steps=judging))
    assert not (tmp_path / "found").exists()
