"""Block-wise distillation of a real, small DiT."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import calibration_of, feed_of, recipe_of, save_tiny, sqnr

from dq_export.calibration.calibrate import calibrate
from dq_export.calibration.simulation import Simulation
from dq_export.calibration.training.distill import Distillation, distill
from dq_export.calibration.training.network import QuantizedNetwork
from dq_export.calibration.training.trainer import Trainer
from dq_export.core.artifacts import CalibrationResult
from dq_export.core.recipe import Recipe
from dq_export.families.reference import ModelError, Reference
from dq_export.families.source import load_reference
from dq_export.families.torch_blocks import TorchChain

QUICK: dict[str, Any] = {"rounding": "distill", "distill_iterations": 30, "distill_batch": 8, "calib_size": 8}
QUICK["distill_pictures"] = 8


def started(reference: Reference, recipe: Recipe, folder: Path) -> CalibrationResult:
    result = calibrate(calibration_of(reference, recipe, folder / "start"))
    assert result is not None
    return result


def trained(
    reference: Reference, recipe: Recipe, start: CalibrationResult, folder: Path, progress: Callable[..., None] | None = None
) -> Distillation:
    more = {"progress": progress} if progress else {}
    return distill(calibration_of(reference, recipe, folder / "training", **more), start, lambda outcome: None)


def mean_sqnr(reference: Reference, result: CalibrationResult, recipe: Recipe) -> float:
    """dB of a call on pictures that calibration has not seen, mean over its timesteps."""
    feeds: list[Any] = []
    reference.trajectory(np.arange(4), steps=recipe.steps, seed=321, guidance=2.0, before=lambda feed: feeds.append(dict(feed)))
    exact = [reference.forward(feed) for feed in feeds]
    with Simulation.of(reference, result, recipe.assign(reference.linears)).on(reference):
        return float(np.mean([sqnr(y, reference.forward(feed)) for feed, y in zip(feeds, exact, strict=True)]))


@pytest.mark.parametrize(
    ("options", "gain"),
    [
        ({"bits": "w4a4"}, 0.2),
        ({"bits": "w4a4", "granularity": "token", "scaling": "smooth", "shift": True}, 0.1),
        ({"bits": "w4a8", "scaling": "smooth", "shift": True}, 0.2),
    ],
    ids=["w4a4", "token", "w4a8"],
)
def test_training_improves_calls_that_it_has_not_seen(
    options: dict[str, Any], gain: float, tiny: Reference, tmp_path: Path
) -> None:
    recipe = recipe_of(tiny, **{**QUICK, "distill_iterations": 120}, **options)
    start = started(tiny, recipe, tmp_path)
    training = trained(tiny, recipe, start, tmp_path)
    result, outcomes = training.result, training.blocks
    assert [outcome.name for outcome in outcomes] == list(tiny.blocks) == ["transformer_blocks.0", "transformer_blocks.1"]
    assert outcomes[0].kept
    assert all((outcome.after > outcome.before) == outcome.kept for outcome in outcomes)
    assert training.network.kept
    assert training.network.after > training.network.before
    assert mean_sqnr(tiny, result, recipe) > mean_sqnr(tiny, start, recipe) + gain
    for name, plan in result.sites.items():
        before = start.sites[name].activation
        assert plan.activation.bins == before.bins
        assert (plan.activation != before) == (name in result.correction), "scales, or the clip of a token's, are trained, too"


@pytest.mark.parametrize(
    "options",
    [{"bits": "w4a4", "scaling": "smooth", "shift": True}, {"bits": "w8a8", "granularity": "token"}],
    ids=["shift", "token"],
)
def test_the_result_computes_the_trained_values(options: dict[str, Any], tiny: Reference, tmp_path: Path) -> None:
    recipe = recipe_of(tiny, **QUICK, **options)
    result = trained(tiny, recipe, started(tiny, recipe, tmp_path), tmp_path).result
    assigned, feed = recipe.assign(tiny.linears), feed_of(tiny, 600)
    with Simulation.of(tiny, result, assigned).on(tiny):
        simulated = tiny.forward(feed)
    # Training's own layers, with the trained numbers.
    network = QuantizedNetwork(tiny, result, assigned, tiny.chain(feed))
    network.at(np.full(3, 600.0))
    with ExitStack() as stack:
        for block in tiny.blocks:
            layers = network.layers(block, "nothing")
            stack.enter_context(network.on(layers))
        outputs = tiny.forward(feed)
    assert sqnr(simulated, outputs) > sqnr(tiny.forward(feed), simulated) + 12  # codes next to a tie move by one


def test_a_run_that_was_killed_gives_the_same_bytes(tiny: Reference, tmp_path: Path) -> None:
    recipe = recipe_of(tiny, **QUICK, bits="w4a4", finish=10)
    start = started(tiny, recipe, tmp_path)
    whole = trained(tiny, recipe, start, tmp_path / "whole")
    whole.result.save(tmp_path / "whole.safetensors")
    assert whole.finish is not None
    waiting = [2, 5, 20, 30, 4, 25, 20, 40, 5, 3]  # events until each kill

    def killed(done: int, total: int, unit: str = "") -> None:
        if waiting:
            waiting[0] -= 1
            if not waiting[0]:
                del waiting[0]
                raise KeyboardInterrupt

    kills = 0
    while True:
        try:
            second = trained(tiny, recipe, start, tmp_path / "killed", killed)
            break
        except KeyboardInterrupt:
            kills += 1
    assert kills == 10
    second.result.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert (second.blocks, second.network, second.finish) == (whole.blocks, whole.network, whole.finish)


def test_a_batch_that_is_computed_in_parts_gives_the_same_training(
    tiny: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(tiny, **QUICK, bits="w4a4")
    start = started(tiny, recipe, tmp_path)
    whole = trained(tiny, recipe, start, tmp_path / "whole")
    monkeypatch.setattr("dq_export.calibration.training.trainer.AT_ONCE", 3 * 4 * 16 * 32)
    rows: list[int] = []
    run = TorchChain.run
    monkeypatch.setattr(
        TorchChain, "run", lambda chain, *inputs: (rows.append(len(inputs[1]["timestep"])), run(chain, *inputs))[1]
    )
    parts = trained(tiny, recipe, start, tmp_path / "parts")
    assert max(rows[len(tiny.blocks) :]) == 3
    assert whole.network.kept
    assert [outcome.kept for outcome in parts.blocks] == [outcome.kept for outcome in whole.blocks]
    for name, codes in whole.result.codes.items():
        assert (parts.result.codes[name] != codes).mean() < 0.005 < (start.codes[name] != codes).mean()
    for name, plan in whole.result.sites.items():
        np.testing.assert_allclose(parts.result.sites[name].activation.scale, plan.activation.scale, rtol=5e-3)


def test_a_finish_trains_scales_and_biases_alone(tiny: Reference, tmp_path: Path) -> None:
    rates = {"distill_iterations": 1, "distill_scale_rate": 0.5, "distill_bias_rate": 1.0}
    recipe = recipe_of(tiny, **{**QUICK, **rates}, bits="w4a8", finish=100)
    start = started(tiny, recipe, tmp_path)
    outcome = trained(tiny, recipe, start, tmp_path)
    assert outcome.finish is not None
    assert outcome.finish.kept
    assert not outcome.network.kept  # so that it begins where training did
    assert mean_sqnr(tiny, outcome.result, recipe) > mean_sqnr(tiny, start, recipe) + 0.5
    for name, codes in start.codes.items():
        np.testing.assert_array_equal(outcome.result.codes[name], codes)
    for name, plan in outcome.result.sites.items():
        assert (plan.activation != start.sites[name].activation) == (name in outcome.result.correction)


def test_blocks_that_make_the_network_worse_together_are_not_kept(
    tiny: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(tiny, **QUICK, bits="w4a4")
    start = started(tiny, recipe, tmp_path)
    measure = Trainer.network
    monkeypatch.setattr(Trainer, "network", lambda trainer: replace(measure(trainer), kept=False))
    training = trained(tiny, recipe, start, tmp_path)
    assert any(outcome.kept for outcome in training.blocks)
    assert not training.result.correction
    for name, codes in start.codes.items():
        np.testing.assert_array_equal(training.result.codes[name], codes)


def test_a_training_that_makes_it_worse_is_not_kept(tiny: Reference, tmp_path: Path) -> None:
    recipe = recipe_of(tiny, **{**QUICK, "distill_iterations": 3}, bits="w8a8", distill_rate=1.0, distill_bias_rate=1.0)
    start = started(tiny, recipe, tmp_path)
    training = trained(tiny, recipe, start, tmp_path)
    result, outcomes = training.result, training.blocks
    assert not any(outcome.kept for outcome in outcomes)
    assert all(outcome.after < outcome.before for outcome in outcomes)
    assert not result.correction
    for name, codes in start.codes.items():
        np.testing.assert_array_equal(result.codes[name], codes)
    assert {name: plan.activation for name, plan in result.sites.items()} == {
        name: plan.activation for name, plan in start.sites.items()
    }


def test_a_network_with_long_skips_is_refused(tmp_path: Path) -> None:
    reference: Any = load_reference(str(save_tiny(tmp_path)))
    feed = feed_of(reference, [500] * 3)
    assert reference.chain(feed).shapes == (((16, 32),), ((2, 8, 8),))
    first, second = reference.model.transformer_blocks
    earlier: list[Any] = []
    first.register_forward_pre_hook(lambda module, inputs: earlier.clear())
    first.attn1.register_forward_pre_hook(lambda module, inputs, named: earlier.append(inputs[0]), with_kwargs=True)
    second.register_forward_pre_hook(lambda module, inputs: (inputs[0] + earlier.pop(),) if earlier else (inputs[0],))
    with pytest.raises(ModelError, match=r"transformer_blocks\.1 .* reads more than the outputs of blocks before it"):
        reference.chain(feed)
