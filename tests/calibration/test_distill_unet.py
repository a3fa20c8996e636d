"""Block-wise distillation of real, small UNets, whose last blocks read what the first put out."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import calibration_of, recipe_of, sqnr

sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))
from ddpm import save_ddpm
from toy import PROMPTS
from unet import save_unet

from dq_export.calibration.calibrate import calibrate
from dq_export.calibration.simulation import Simulation
from dq_export.calibration.training.distill import distill
from dq_export.calibration.training.network import QuantizedNetwork
from dq_export.core.artifacts import CalibrationResult
from dq_export.core.network import Feed
from dq_export.core.recipe import Recipe
from dq_export.families.reference import Reference
from dq_export.families.source import load_reference

QUICK: dict[str, Any] = {"rounding": "distill", "bits": "w4a8", "calib_size": 16, "distill_pictures": 16, "steps": 4}


def ddpm(folder: Path) -> Any:
    return load_reference(str(save_ddpm(folder)))


def stable_diffusion(folder: Path) -> Any:
    reference: Any = load_reference(str(save_unet(folder)))
    reference.conditions = reference.encode(PROMPTS, "cpu")
    return reference


def calls_of(reference: Reference, seed: int) -> list[Feed]:
    feeds: list[Feed] = []
    chosen = np.arange(2) % len(reference.conditions)
    reference.trajectory(chosen, steps=4, seed=seed, guidance=2.0, before=lambda feed: feeds.append(dict(feed)))
    return feeds


Training = tuple[Reference, Recipe, CalibrationResult, Any, list[str]]


def training(reference: Reference, folder: Path, iterations: int) -> Training:
    """A network's calibration with 4-bit weights before and after its training, and the files that the training leaves."""
    recipe = recipe_of(reference, **QUICK, distill_iterations=iterations, distill_batch=8)
    start = calibrate(calibration_of(reference, recipe, folder / "start"))
    assert start is not None
    place = folder / "training"
    result = distill(calibration_of(reference, recipe, place), start, lambda outcome: None)
    return reference, recipe, start, result, sorted(path.name for path in place.iterdir())


@pytest.fixture(scope="module")
def trained_ddpm(tmp_path_factory: pytest.TempPathFactory) -> Training:
    folder = tmp_path_factory.mktemp("ddpm")
    return training(ddpm(folder / "model"), folder, 60)


@pytest.fixture(scope="module")
def trained_stable_diffusion(tmp_path_factory: pytest.TempPathFactory) -> Training:
    folder = tmp_path_factory.mktemp("stable_diffusion")
    return training(stable_diffusion(folder / "model"), folder, 30)


def test_a_block_reads_the_blocks_whose_outputs_skip_to_it(tmp_path: Path) -> None:
    reference = ddpm(tmp_path)
    chain = reference.chain(calls_of(reference, 1)[0])
    names = reference.blocks
    read = {names[index]: [names[source] for source in sources] for index, sources in enumerate(chain.sources)}
    assert read["down_blocks.0.resnets.0"] == []
    assert read["mid_block.resnets.0"] == ["down_blocks.1.attentions.0"]
    assert read["up_blocks.0.resnets.0"] == ["down_blocks.1.attentions.0", "mid_block.resnets.1"]
    assert read["up_blocks.0.resnets.1"] == ["down_blocks.0.downsamplers.0", "up_blocks.0.attentions.0"]
    assert read["up_blocks.1.resnets.0"] == ["down_blocks.0.resnets.0", "up_blocks.0.upsamplers.0"]
    assert read["up_blocks.1.resnets.1"] == ["up_blocks.1.resnets.0"], "the first convolution's output is no block's"
    assert reference.tower == (), "w4a8 keeps no first blocks of a UNet at 8 bits"


def test_training_improves_calls_that_it_has_not_seen(trained_ddpm: Training) -> None:
    reference, recipe, start, result, files = trained_ddpm
    assert [outcome.name for outcome in result.blocks] == list(reference.blocks)
    assert sum(outcome.kept for outcome in result.blocks) > len(reference.blocks) / 2
    assert result.network.kept
    convolutions = [name for name in result.result.correction if reference.linears[name].convolution]
    assert convolutions
    assert any((result.result.codes[name] != start.codes[name]).any() for name in convolutions)

    def mean(result: CalibrationResult) -> float:
        feeds = calls_of(reference, 321)
        exact = [reference.forward(feed) for feed in feeds]
        with Simulation.of(reference, result, recipe.assign(reference.linears)).on(reference):
            return float(np.mean([sqnr(y, reference.forward(feed)) for feed, y in zip(feeds, exact, strict=True)]))

    assert mean(result.result) > mean(start) + 0.2
    last = len(reference.blocks)
    assert [name for name in files if name.startswith(("exact", "error", "first"))] == [
        f"error.{last}", f"exact.{last}", f"first.{last}",
    ], "values that no later block reads are deleted"  # fmt: skip


@pytest.mark.parametrize("trained", ["trained_ddpm", "trained_stable_diffusion"])
def test_the_result_computes_the_trained_values(trained: str, request: pytest.FixtureRequest) -> None:
    reference, recipe, _, result, _ = request.getfixturevalue(trained)
    assert result.network.kept
    assigned, feeds = recipe.assign(reference.linears), [*calls_of(reference, 5), *calls_of(reference, 6)]
    with Simulation.of(reference, result.result, assigned).on(reference):
        simulated = [reference.forward(feed) for feed in feeds]
    network, outputs = QuantizedNetwork(reference, result.result, assigned, reference.chain(feeds[0])), []
    for feed in feeds:
        network.at(np.full(len(simulated[0]), float(feed["timestep"][0])))
        with ExitStack() as stack, torch.no_grad():
            for block in reference.blocks:
                stack.enter_context(network.on(network.layers(block, "nothing")))
            outputs.append(reference.forward(feed))
    # A code next to a tie may move by one, and changes the rest of its call; not in all calls.
    equal = [sqnr(one, other) for one, other in zip(simulated, outputs, strict=True)]
    rounding = [sqnr(reference.forward(feed), one) for feed, one in zip(feeds, simulated, strict=True)]
    assert max(equal) > 90
    assert np.median(np.subtract(equal, rounding)) > 12
