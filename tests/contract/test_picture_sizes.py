"""`--sizes`: pictures of several sizes in calibration, in the comparison and in a plan's shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import sqnr
from flux import save_flux
from sd3 import save_sd3
from toy import PROMPTS

import dq_export
from dq_export.calibration.collect.calls import Calls
from dq_export.calibration.collect.sampling import Sampling
from dq_export.core.recipe import Recipe, RecipeError
from dq_export.deploy.replay import load_replay
from dq_export.families.reference import ModelError
from dq_export.families.source import load_reference
from dq_export.finished_folder import FinishedFolder
from dq_export.pipeline import run
from dq_export.sizes import plan_shapes, require_sizes

STEPS = 4
SD3_SIZES, FLUX_SIZES = "64x64,96x80", "64x96,160x160"


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sd3(tmp_path_factory.mktemp("sd3"), t5=False)


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_flux(tmp_path_factory.mktemp("flux"))


def drawing(model: Path, sizes: str, **options: Any) -> tuple[Any, Recipe]:
    """A reference at the first of the sizes, and the recipe."""
    reference: Any = load_reference(str(model))
    recipe = Recipe.parse({"model": str(model), "sizes": sizes, "steps": STEPS, **options}, "test")
    require_sizes(recipe, reference)
    return reference, recipe


def test_calibration_draws_each_size_in_turn_at_the_timesteps_of_the_first(flux: Path) -> None:
    """FLUX's shift follows the number of tokens, and a table has one entry for a step."""
    reference, recipe = drawing(flux, FLUX_SIZES)
    reference.conditions = reference.encode(PROMPTS, "cpu")
    feeds: list[Any] = []
    sampling = Sampling(calib_size=3, steps=STEPS, seed=0, guidance=3.0, conditions=4, batch=1, sizes=recipe.pixels)
    calls = Calls(denoiser=reference, sampling=sampling, record=lambda batch, place, feed: feeds.append(feed))
    timesteps = calls.watch(lambda call, name, value: None)
    assert [feed["hidden_states"].shape[1] for feed in feeds] == [24] * STEPS + [100] * STEPS + [24] * STEPS
    assert [float(feed["timestep"][0]) for feed in feeds] == timesteps * 3
    assert timesteps == reference.timesteps(STEPS)
    with reference.at(recipe.pixels[1]):
        assert reference.timesteps(STEPS) != timesteps, "FLUX's own at that size"
    assert reference.feed_shape == (24, 8)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sizes": "64x64,72x64"}, ModelError, "^size 72x64: expected HEIGHTxWIDTH in steps of 8 .*; the nearest is 64x64"),
        ({"sizes": "64x64,160x64"}, ModelError, "^size 160x64: expected .*height up to 18 in steps of 2"),
        ({"sizes": "64x64,96x80", "rounding": "distill"}, RecipeError, "^sizes 64x64,96x80: rounding distill trains"),
        ({"sizes": "64x64,96x80", "calib_size": 1}, RecipeError, "^sizes 64x64,96x80: more sizes than pictures, calib_size 1"),
    ],
)
def test_sizes_are_refused_before_any_work(
    options: dict[str, Any], error: type[Exception], message: str, sd3: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        run(Recipe.parse({"model": str(sd3), **options}, "test"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("sizes", ["64", "64x64,", "64x64, 96x80", "0x64"])
def test_a_text_that_is_not_a_list_of_sizes_is_refused(sizes: str) -> None:
    with pytest.raises(RecipeError, match="sizes"):
        Recipe.parse({"model": "m", "sizes": sizes}, "test")


def test_a_plan_goes_from_the_least_to_the_greatest_size(sd3: Path, flux: Path) -> None:
    reference, recipe = drawing(sd3, "80x64,64x96", format="trt")
    assert plan_shapes(recipe, reference) == {
        "min_shapes": "hidden_states:1x4x8x8",
        "opt_shapes": "hidden_states:2x4x10x8",
        "max_shapes": "hidden_states:16x4x10x12",
    }
    reference, recipe = drawing(flux, FLUX_SIZES, format="trt-rtx")
    assert plan_shapes(recipe, reference) == {
        "min_shapes": "hidden_states:1x24x8,img_ids:24x3",
        "opt_shapes": "hidden_states:2x24x8,img_ids:24x3",
        "max_shapes": "hidden_states:16x100x8,img_ids:100x3",
    }
    assert plan_shapes(recipe.model_copy(update={"max_shapes": "hidden_states:4x200x8,img_ids:200x3"}), reference) == {}
    assert plan_shapes(recipe.model_copy(update={"format": "ort"}), reference) == {}


def test_a_served_plan_takes_each_height_with_each_width(flux: Path) -> None:
    """Both sizes have 32 tokens. A server also offers 64x64, which has 16, and 128x128."""
    reference, recipe = drawing(flux, "64x128,128x64", format="trt")
    assert plan_shapes(recipe, reference) == {"min_shapes": "", "opt_shapes": "", "max_shapes": ""}
    assert plan_shapes(recipe.model_copy(update={"triton": True}), reference) == {
        "min_shapes": "hidden_states:1x16x8,img_ids:16x3",
        "opt_shapes": "hidden_states:2x32x8,img_ids:32x3",
        "max_shapes": "hidden_states:16x64x8,img_ids:64x3",
    }


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_an_engine_keeps_its_scales_at_sizes_in_between(family: str, sd3: Path, flux: Path, tmp_path: Path) -> None:
    model, sizes, between = {"sd3": (sd3, SD3_SIZES, (80, 64)), "flux": (flux, FLUX_SIZES, (112, 128))}[family]
    values = {"steps": STEPS, "parity_size": 1, "guidance_scale": 2.0, "calib_size": 4, "min_sqnr": 10}
    run(Recipe.parse({"model": str(model), "sizes": sizes, **values}, "test"), tmp_path / "out", until="verify")
    feeds, _ = load_replay(tmp_path / "out" / "parity")
    assert len({feed["hidden_states"].shape for feed in feeds}) == 2
    parity = FinishedFolder.open(tmp_path / "out").report().parity
    assert parity is not None
    measured = [call.sqnr for call in parity.calls if call.stage == "engine"]
    assert len(measured) == len(feeds)
    reference, _ = drawing(model, sizes)
    reference.conditions = reference.encode(PROMPTS, "cpu")
    engine, differences = dq_export.load(tmp_path / "out"), []

    def both(feed: Any) -> Any:
        exact = reference.forward(feed)
        differences.append(sqnr(exact, engine.network(feed)))
        return exact

    with reference.at(between):
        reference.draw(both, reference.noise(1, 5), np.asarray([0]), steps=STEPS, guidance=2.0)
    assert min(differences) > min(measured) - 3
