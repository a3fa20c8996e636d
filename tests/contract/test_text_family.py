"""A family that draws prompts: they are encoded once, kept, repeated from the recipe, or refused before any work."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import save_tiny
from toy import PROMPTS, WIDTH, ToyPipeline, save_toy

from dq_export.cli.export import recipe_of
from dq_export.core.condition_file import CONDITIONS, load_conditions
from dq_export.core.progress import Silent
from dq_export.core.recipe import Recipe, RecipeError
from dq_export.core.scheme import scheme_of
from dq_export.core.tensor_file import load_tensors, save_tensors
from dq_export.deploy.backend import BackendError
from dq_export.families import torch_network
from dq_export.families.source import pin
from dq_export.output_folder import OutputError
from dq_export.pipeline import run
from dq_export.preparation import Options
from dq_export.search.explore import explore
from dq_export.search.request import SearchRequest

pytestmark = pytest.mark.usefixtures("toy_known")
QUICK: dict[str, Any] = {"steps": 3, "calib_size": 2, "parity_size": 1, "scaling": "none", "min_sqnr": -200}


class Recorder(Silent):
    """Remembers which stages an earlier run did."""

    def __init__(self) -> None:
        self.stages: dict[str, bool] = {}
        self.stage = ""

    def begin(self, stage: str, text: str) -> None:
        self.stage = stage

    def end(self, seconds: float, result: str, *, kept: bool) -> None:
        self.stages[self.stage] = kept


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def exported(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibrated, and drawn by PyTorch, on the prompts beside the checkpoint."""
    out = tmp_path_factory.mktemp("exported") / "out"
    run(recipe(toy), out, until="verify")
    return out


@pytest.fixture
def model(toy: Path, tmp_path: Path) -> Path:
    """A copy, to be changed."""
    return Path(shutil.copytree(toy, tmp_path / "model"))


def recipe(model: Path, **values: Any) -> Recipe:
    return Recipe.parse({"model": str(model), **QUICK, **values}, "test")


def file_of_conditions(path: Path, **changes: Any) -> Path:
    """A file that others may write: three conditions of other lengths than prompts have."""
    rows = np.random.default_rng(0).normal(size=(3, 4, WIDTH)).astype(np.float32)
    strength = np.ones((3, 1), np.float32)
    null = {"null.context": np.zeros_like(rows[:1]), "null.strength": strength[:1]}
    tensors = {"context": rows, "strength": strength, **null, **changes}
    save_tensors(path, {name: value for name, value in tensors.items() if value is not None})
    return path


def test_stored_conditions_are_those_of_the_pipelines_own_encoder(exported: Path, toy: Path) -> None:
    from transformers import T5EncoderModel, T5Tokenizer

    tokenizer = T5Tokenizer.from_pretrained(toy / "tokenizer")
    pipeline = ToyPipeline(None, None, tokenizer, T5EncoderModel.from_pretrained(toy / "text_encoder").eval())
    actual = load_conditions(exported / CONDITIONS)
    assert actual.names == PROMPTS
    exact, null = pipeline.encode_prompt(list(PROMPTS)).numpy(), pipeline.encode_prompt([""]).numpy()
    np.testing.assert_allclose(actual.arrays["context"], exact, rtol=0, atol=1e-6 * np.abs(exact).max())
    np.testing.assert_allclose(actual.null["context"], null, rtol=0, atol=1e-6 * np.abs(exact).max())
    assert exact.std(axis=0).max() > 0.1, "prompts that are encoded alike would prove nothing"


def test_the_pictures_are_of_the_prompts(exported: Path) -> None:
    """PyTorch's own calls hold them: the null prompt first."""
    from dq_export.deploy.replay import load_replay

    feeds, _ = load_replay(exported / "parity")
    conditions = load_conditions(exported / CONDITIONS)
    np.testing.assert_array_equal(
        feeds[0]["context"], np.concatenate([conditions.null["context"], conditions.arrays["context"][:1]])
    )


def test_a_run_repeats_from_its_recipe_when_the_prompts_are_gone(exported: Path, toy: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(toy, tmp_path / "model"))
    (model / "prompts.txt").unlink()
    recipe = Recipe.load(exported / "recipe.yaml").model_copy(update={"model": str(model)})
    assert recipe.prompts == PROMPTS
    run(recipe, tmp_path / "out", until="calibrate")
    for name in (CONDITIONS, "calibration.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (exported / name).read_bytes()


def test_a_run_that_continues_encodes_nothing_and_draws_what_is_kept(
    exported: Path, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(exported, tmp_path / "out"))
    monkeypatch.setattr(torch_network, "encode_prompts", None)
    watch = Recorder()
    run(recipe(toy, parity_size=2), out, Options(overwrite=True), until="verify", progress=watch)
    done = {stage: watch.stages[stage] for stage in ("conditions", "calibrate", "reference")}
    assert done == {"conditions": True, "calibrate": True, "reference": False}


def test_other_prompts_do_again_what_depends_on_them(exported: Path, toy: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(exported, tmp_path / "out"))
    other = recipe(toy, prompts=["a blue circle", "a green square"])
    with pytest.raises(OutputError, match=r"holds another run \(.*a red square"):
        run(other, out, until="verify")
    watch = Recorder()
    run(other, out, Options(overwrite=True), until="verify", progress=watch)
    done = {stage: watch.stages[stage] for stage in ("conditions", "float", "calibrate", "reference")}
    assert done == {"conditions": False, "float": True, "calibrate": False, "reference": False}
    assert load_conditions(out / CONDITIONS).names == ("a blue circle", "a green square")


def test_conditions_of_another_length_write_the_graph_again(toy: Path, tmp_path: Path) -> None:
    """The graph holds the lengths that audits and plans count with."""
    path, done = tmp_path / "encoded.safetensors", []
    for length, value in ((4, 1), (4, 2), (6, 2)):
        file_of_conditions(path, **{
            name: np.full((count, length, WIDTH), value, np.float32) for name, count in (("context", 3), ("null.context", 1))
        })  # fmt: skip
        watch = Recorder()
        run(recipe(toy, conditions=str(path)), tmp_path / "out", Options(overwrite=True), until="float", progress=watch)
        done.append((watch.stages["conditions"], watch.stages["float"]))
    assert done == [(False, False), (False, True), (False, False)]


def test_the_packages_prompts_are_drawn_where_there_are_no_others(model: Path) -> None:
    (model / "prompts.txt").unlink()
    assert len(pin(recipe(model))[0].prompts or ()) == 32


def test_a_file_of_conditions_needs_no_encoder(model: Path, tmp_path: Path) -> None:
    for name in ("tokenizer", "text_encoder"):
        shutil.rmtree(model / name)
    path = file_of_conditions(tmp_path / "encoded.safetensors")
    run(recipe(model, conditions=str(path)), tmp_path / "out", until="calibrate")
    conditions = load_conditions(tmp_path / "out" / CONDITIONS)
    np.testing.assert_array_equal(conditions.arrays["context"], load_tensors(path)[0]["context"])
    assert conditions.names == ("1", "2", "3")
    resolved = Recipe.load(tmp_path / "out" / "recipe.yaml")
    assert (resolved.conditions, resolved.prompts) == (str(path), None)
    run(resolved, tmp_path / "again", until="calibrate")
    for name in (CONDITIONS, "calibration.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    file_of_conditions(path, context=np.ones((3, 4, WIDTH), np.float32))
    with pytest.raises(RecipeError, match=rf"its sha256 is [0-9a-f]{{64}}, and the recipe has {resolved.conditions_sha256}; put"):
        run(resolved, tmp_path / "changed", until="calibrate")
    assert not (tmp_path / "changed").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": np.zeros((3, 4, 9), np.float32)}, r"context has shape \[3, 4, 9\]; expected \[3, length up to 64, 8\]"),
        ({"context": np.full((3, 4, WIDTH), np.nan, np.float32)}, "context has NaN or Inf in row 0"),
        (
            {"null.context": None, "null.strength": None},
            r"no null\.context \[1, \.\.\.\], null\.strength .*, which guidance above 1",
        ),
        ({"mask": np.ones((3, 4), np.float32)}, "holds 'context', 'mask', 'strength'; expected 'context', 'strength', the"),
        ({"strength": np.ones((3, 1))}, "strength is float64; expected float32"),
    ],
)
def test_conditions_that_the_network_does_not_take_are_refused(
    changes: dict[str, Any], message: str, toy: Path, tmp_path: Path
) -> None:
    path = file_of_conditions(tmp_path / "encoded.safetensors", **changes)
    with pytest.raises(RecipeError, match=message):
        run(recipe(toy, conditions=str(path)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_guidance_no_null_is_needed(toy: Path, tmp_path: Path) -> None:
    path = file_of_conditions(tmp_path / "encoded.safetensors", **{"null.context": None, "null.strength": None})
    run(recipe(toy, conditions=str(path), guidance_scale=1), tmp_path / "out", until="calibrate")
    conditions = load_conditions(tmp_path / "out" / CONDITIONS)
    assert (conditions.names, dict(conditions.null)) == (load_conditions(path).names, {})


def test_prompts_and_conditions_exclude_each_other_and_labels_need_neither(toy: Path, tmp_path: Path) -> None:
    path = file_of_conditions(tmp_path / "encoded.safetensors")
    with pytest.raises(RecipeError, match="prompts and conditions: give one of them"):
        run(recipe(toy, conditions=str(path), prompts=["a"]), tmp_path / "out")
    with pytest.raises(RecipeError, match="conditions_sha256: it is of a file, and conditions names none"):
        run(recipe(toy, conditions_sha256="0" * 64), tmp_path / "out")
    tiny = save_tiny(tmp_path / "tiny")
    for changes in ({"prompts": ["a"]}, {"conditions": str(path)}):
        with pytest.raises(RecipeError, match=rf"^{next(iter(changes))}: family dit draws no text; leave it out$"):
            run(recipe(tiny, **changes), tmp_path / "out")
    with pytest.raises(RecipeError, match=r"conditions .*none\.safetensors: no such file"):
        run(recipe(toy, conditions=str(tmp_path / "none.safetensors")), tmp_path / "out")


def test_missing_packages_are_named_with_the_way_to_get_them(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("transformers", "tokenizers") else find(name))
    message = r"^transformers and tokenizers are not installed; pip install 'dq-export\[text\]', needed for the stage conditions"
    with pytest.raises(BackendError, match=message):
        run(recipe(toy), tmp_path / "out")
    path = file_of_conditions(tmp_path / "encoded.safetensors")
    run(recipe(toy, conditions=str(path)), tmp_path / "out", until="conditions")


PLUGINS = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1] / "plugin")])
FLAGS = [word for key, value in QUICK.items() for word in (f"--{key.replace('_', '-')}", str(value))]


def command(*words: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """A command line in which the toy family is a plug-in."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", "0", "--standalone"]
    start = [sys.executable, *(torchrun if processes > 1 else []), "-m", "dq_export"]
    path = os.pathsep.join([PLUGINS, *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {**os.environ, "PYTHONPATH": path}
    return subprocess.run([*start, *words], env=variables, capture_output=True, text=True, check=False)


def test_flags_name_the_files_and_win_over_a_recipe(toy: Path, exported: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a blue circle\n")
    path = file_of_conditions(tmp_path / "encoded.safetensors")
    base = Recipe.load(exported / "recipe.yaml").model_copy(update={"conditions": None, "prompts": ("a",)})
    (tmp_path / "prompts.yaml").write_text(base.dump())
    digest = {"conditions": str(path), "conditions_sha256": "0" * 64, "prompts": None}
    (tmp_path / "conditions.yaml").write_text(base.model_copy(update=digest).dump())
    for name in ("prompts.yaml", "conditions.yaml"):
        for flags, expected in (
            ({"prompts": str(prompts)}, (("a blue circle",), None)),
            ({"conditions": str(path)}, (None, str(path))),
        ):
            recipe = recipe_of(tmp_path / name, flags)
            assert (recipe.prompts, recipe.conditions, recipe.conditions_sha256) == (*expected, None)
    with pytest.raises(RecipeError, match=r"^prompts .*none\.txt: no such file$"):
        recipe_of(None, {"model": str(toy), "prompts": str(tmp_path / "none.txt")})


@pytest.mark.slow
def test_two_processes_draw_the_prompts_of_one(toy: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS[1:3]) + "\n")
    for count in (1, 2):
        words = (
            "calibrate",
            "-m",
            str(toy),
            "--prompts",
            str(prompts),
            *FLAGS,
            "--calib-size",
            "10",
            "-o",
            str(tmp_path / f"{count}"),
        )
        result = command(*words, processes=count)
        assert result.returncode == 0, result.stderr
    for name in (CONDITIONS, "calibration.safetensors"):
        assert (tmp_path / "2" / name).read_bytes() == (tmp_path / "1" / name).read_bytes()


def test_a_search_encodes_once_and_its_winner_draws_the_same_prompts(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = SearchRequest(max_size=1.0, evaluations=3, pictures=1, steps=2)
    choices = [scheme_of("w8a8"), scheme_of("float")]
    explore(recipe(toy), tmp_path / "found", request, choices=choices)
    assert load_conditions(tmp_path / "found" / CONDITIONS).names == PROMPTS
    assert Recipe.load(tmp_path / "found" / "winner.yaml").prompts == PROMPTS
    monkeypatch.setattr(torch_network, "encode_prompts", None)
    explore(recipe(toy), tmp_path / "found", request, choices=choices)
