"""Whole exports with imported tables."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from command_line import call
from conftest import QUICK, calibrate_tiny, feed_of, recipe_of, run_onnx, sqnr
from own_tables import save_own, tables_of

import dq_export
from dq_export.cli.export import recipe_of as recipe_with
from dq_export.core.artifacts import CalibrationResult
from dq_export.core.progress import Silent
from dq_export.core.recipe import Recipe, RecipeError
from dq_export.core.table_file import save_table_file
from dq_export.families.reference import Reference
from dq_export.families.source import load_reference


class Watch(Silent):
    """Records the result of each stage."""

    def __init__(self) -> None:
        self.name, self.ended = "", {}

    def begin(self, stage: str, text: str) -> None:
        self.name = stage

    def end(self, seconds: float, summary: str, *, kept: bool) -> None:
        self.ended[self.name] = (summary, kept)


def codes_of(folder: Path) -> dict[str, Any]:
    graph = ir.load(folder / "model.onnx").graph
    return {name: value.const_value.numpy() for name, value in graph.initializers.items() if name.endswith("weight_codes")}


def test_dit_digits_takes_the_tables_of_its_own_calibration(exported: Path, tmp_path: Path) -> None:
    """Another export, which would scale and round otherwise, has the codes of the first, and runs in integers."""
    reference = load_reference("dit-digits")
    recipe, result = Recipe.load(exported / "recipe.yaml"), CalibrationResult.load(exported / "calibration.safetensors")
    assigned = recipe.assign(reference.linears)
    path = save_own(tmp_path / "tables", result, reference, assigned, list(result.timesteps))
    options: dict[str, Any] = {"calib_size": 2, "steps": recipe.steps, "parity_size": 2, "scaling": "none", "rounding": "mse"}
    watch = Watch()
    dq_export.build(model="dit-digits", output_dir=tmp_path / "out", tables=str(path), progress=watch, **options)
    before, after = codes_of(exported), codes_of(tmp_path / "out")
    names = [f"{name}.weight_codes" for plan in result.sites.values() for name in plan.site.linears]
    assert len(names) == 36
    for name in names:
        np.testing.assert_array_equal(after[name], before[name])
    assert "; 36 linears as our own gives them, calibrated: " in watch.ended["calibrate"][0]
    feed = feed_of(reference, timestep=500, samples=2)
    assert sqnr(reference.forward(feed), run_onnx(tmp_path / "out" / "model.onnx", feed)) > 25


@pytest.fixture(scope="module")
def trained(tiny_folder: Path) -> Reference:
    """The tiny DiT with weights and biases that have moved, as after training."""
    import torch

    reference: Any = load_reference(str(tiny_folder))
    torch.manual_seed(1)
    for name in reference.linears:
        if ".attn1." in name or ".ff." in name:
            module = reference.model.get_submodule(name)
            module.weight.data = module.weight + 0.3 * module.weight.std() * torch.randn_like(module.weight)
            module.bias.data = module.bias + torch.randn_like(module.bias)  # much, so that a wrong fold of it shows
    actual: Reference = reference
    return actual


@pytest.fixture(scope="module")
def moved(trained: Reference, tiny: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its tables, scaled and shifted, with its biases."""
    result, assigned = calibrate_tiny(trained, recipe_of(trained, scaling="smooth", shift=True, bins="per-step", steps=4))
    header, tensors = tables_of(result, trained, assigned, trained.timesteps(4))
    tensors |= {f"{name}.bias": trained.bias(name) for name in header.linears}
    path = tmp_path_factory.mktemp("moved") / "tables.safetensors"
    save_table_file(path, header, tensors)
    return path


def test_the_graph_computes_what_was_trained(
    trained: Reference, tiny: Reference, moved: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    """Weights, biases and the change by the shift are the file's, through every fold of the graph."""
    dq_export.quantize(model=str(tiny_folder), output_dir=tmp_path, tables=str(moved), **QUICK)
    for timestep in (0, 500):
        feed = feed_of(tiny, timestep=timestep)
        actual = run_onnx(tmp_path / "model.onnx", feed)
        near, far = sqnr(trained.forward(feed), actual), sqnr(tiny.forward(feed), actual)
        assert near > 30
        assert near > far + 12


def test_a_run_repeats_from_its_recipe_and_notices_another_file(moved: Path, tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    path.write_bytes(moved.read_bytes())
    dq_export.calibrate(model=str(tiny_folder), output_dir=tmp_path / "out", tables=str(path), **QUICK)
    recipe = Recipe.load(tmp_path / "out" / "recipe.yaml")
    assert recipe.tables == str(path)
    values = {key: value for key, value in recipe.model_dump(mode="json").items() if value is not None}
    watch = Watch()
    dq_export.calibrate(output_dir=tmp_path / "out", progress=watch, **values)
    assert watch.ended["calibrate"][1]
    with path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    with pytest.raises(
        RecipeError, match=r"tables .*: its sha256 is .*, and the recipe has .*; put the recipe's file back, or pass"
    ):
        dq_export.calibrate(output_dir=tmp_path / "out", **values)
    with pytest.raises(RecipeError, match="tables_sha256: it is of a file, and tables names none"):
        dq_export.calibrate(model=str(tiny_folder), output_dir=tmp_path / "other", tables_sha256="0" * 64, **QUICK)


def test_a_search_has_no_use_for_tables(moved: Path, tiny_folder: Path, tmp_path: Path) -> None:
    from dq_export.search.explore import explore
    from dq_export.search.request import SearchRequest

    with pytest.raises(RecipeError, match="tables: they are for the bits that they were trained with"):
        explore(Recipe(model=str(tiny_folder), tables=str(moved)), tmp_path / "out", SearchRequest(max_size=1.0))


def test_a_flag_takes_the_place_of_a_recipes_file_and_digest(moved: Path, tmp_path: Path) -> None:
    old = {"tables": "a", "tables_sha256": "0" * 64, "lora": ["b:1.0"], "lora_sha256": ["1" * 64]}
    (tmp_path / "recipe.yaml").write_text("\n".join(f"{key}: {value!r}" for key, value in {"model": "m", **old}.items()))
    recipe = recipe_with(tmp_path / "recipe.yaml", {"tables": str(moved)})
    assert (recipe.tables, recipe.tables_sha256, recipe.lora_sha256) == (str(moved), None, ("1" * 64,))
    recipe = recipe_with(tmp_path / "recipe.yaml", {"lora": ["c", "d:0.5"]})
    assert (recipe.lora, recipe.lora_sha256, recipe.tables_sha256) == (("c", "d:0.5"), None, "0" * 64)


@pytest.mark.parametrize("words", [("--tables", "absent"), ("--lora", "absent:0.5"), ("--lora", "absent", "--lora", "other")])
def test_a_missing_file_is_a_line_and_a_status(words: tuple[str, ...], tmp_path: Path) -> None:
    result = call("--model", "dit-digits", "-o", tmp_path / "out", *words)
    assert result.returncode == 2
    assert re.fullmatch(r"error: (tables|lora) \S+/absent: no such file\n", result.stderr[result.stderr.index("error") :])
