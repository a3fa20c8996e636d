"""Tables of coefficients against the schedulers of diffusers that they were probed from."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Nobody, save_tiny

from dq_export.deploy.triton.serving.job import Job
from dq_export.deploy.triton.serving.schedules import ScheduleError, Schedules
from dq_export.families.prediction import FLOW, NOISE
from dq_export.families.reference import ModelError, Reference
from dq_export.families.sampler_tables import KINDS, CurvedError, Sending, probe, table_of, tabulate
from dq_export.families.source import load_reference


class Watcher(Nobody):
    """A client that keeps its previews."""

    def __init__(self) -> None:
        self.latents: dict[int, Any] = {}

    def preview(self, step: int, latents: Any) -> None:
        self.latents[step] = latents


def scheduler_of(kind: str, **changes: Any) -> Any:
    import diffusers

    config = {"num_train_timesteps": 1000, "timestep_spacing": "leading", "steps_offset": 1, **changes}
    return getattr(diffusers, kind).from_config({**config, "clip_sample": changes.get("clip_sample", False)})


def sampled(
    reference: Reference, schedules: Schedules, name: str, steps: int, guidance: float, interval: int = 0
) -> tuple[Any, Watcher]:
    """What a server would draw, with the float network."""
    watcher, null = Watcher(), len(reference.conditions)
    labels = np.array([1, 3, null, null][: 4 if guidance > 1 else 2])
    job = Job(
        client=watcher, steps=schedules.steps(name, steps), latents=reference.noise(2, 7),
        conditions=lambda: {"class_labels": labels}, guidance=guidance, preview_interval=interval,
    )  # fmt: skip
    while job.at < steps:
        states, timestep, rows = job.feed()
        job.advance(reference.forward({"hidden_states": states, "timestep": timestep.astype(np.int64), **rows}))
    return job.latents, watcher


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)], ids=["fixed-sigma", "learned-sigma"])
def network(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_reference(str(save_tiny(tmp_path_factory.mktemp("network"), out_channels=request.param)))


@pytest.mark.parametrize("prediction", ["epsilon", pytest.param("v_prediction", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", KINDS[NOISE.name])
def test_a_trajectory_is_diffusers_own(network: Any, name: str, prediction: str) -> None:
    """To 1e-5 of the picture's range, whatever the steps and the guidance."""
    kind, options = KINDS[NOISE.name][name]
    network.scheduler = scheduler_of(kind, prediction_type=prediction, **options)
    schedules = tabulate(network.scheduler, 20, lambda done, total: None).schedules
    for steps in (1, 2, 5, 20):
        for guidance in (1.0, 4.0):
            exact = network.draw(network.forward, network.noise(2, 7), np.array([1, 3]), steps=steps, guidance=guidance)
            actual, _ = sampled(network, schedules, name, steps, guidance)
            assert np.abs(actual - exact).max() < 1e-5 * np.abs(exact).max()


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("kind", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_timesteps_are_the_schedulers(kind: str, spacing: str) -> None:
    scheduler = scheduler_of(kind, timestep_spacing=spacing)
    schedules = Schedules({"it": table_of(scheduler, 9)})
    scheduler.set_timesteps(9)
    assert [step.timestep for step in schedules.steps("it", 9)] == [float(t) for t in scheduler.timesteps]


def test_previews_are_the_pictures_that_the_scheduler_predicts(network: Any) -> None:
    import torch

    scheduler = network.scheduler = scheduler_of("DDIMScheduler")
    schedules = Schedules({"ddim": table_of(scheduler, 8)})
    _, watcher = sampled(network, schedules, "ddim", 8, 1.0, interval=3)
    exact: dict[int, Any] = {}
    scheduler.set_timesteps(8)
    latents = torch.from_numpy(network.noise(2, 7))
    for index, timestep in enumerate(scheduler.timesteps, start=1):
        feed = {"hidden_states": latents.numpy(), "timestep": np.array([int(timestep)]), "class_labels": np.array([1, 3])}
        step = scheduler.step(torch.from_numpy(network.forward(feed))[:, :2], timestep, latents)
        latents, exact[index] = step.prev_sample, step.pred_original_sample.numpy()
    assert watcher.latents.keys() == {3, 6}
    for index, picture in watcher.latents.items():
        assert np.abs(picture - exact[index]).max() < 1e-5 * np.abs(exact[index]).max()


REFUSED = {
    "clipping": ("DDIMScheduler", {"clip_sample": True}, "clips or thresholds the sample"),
    "thresholding": ("DDIMScheduler", {"thresholding": True}, "clips or thresholds the sample"),
    "noise at each step": ("DDPMScheduler", {"timestep_spacing": "linspace"}, "draws noise at every step"),
    "third order": ("DPMSolverMultistepScheduler", {"solver_order": 3}, "uses more than one earlier step"),
    "fractional timesteps": ("EulerDiscreteScheduler", {"timestep_spacing": "linspace"}, "sends the fractional timestep"),
    "two calls a step": ("HeunDiscreteScheduler", {}, "calls the network"),
}


@pytest.mark.parametrize(("kind", "changes", "reason"), REFUSED.values(), ids=REFUSED)
def test_samplers_that_no_table_can_hold_are_refused(kind: str, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(CurvedError, match=reason):
        table_of(scheduler_of(kind, **changes), 9)


def test_a_sampler_that_is_refused_is_named_and_another_takes_its_place() -> None:
    table = tabulate(scheduler_of("DDIMScheduler", clip_sample=True), 9, lambda done, total: None)
    assert (table.default, list(table.schedules.tables)) == ("dpmsolver++", ["dpmsolver++", "euler"])
    assert table.refused == ("DDIMScheduler clips or thresholds the sample",)
    table = tabulate(scheduler_of("DDPMScheduler"), 9, lambda done, total: None)
    assert table.default == "ddim"
    assert table.refused == ("DDPMScheduler, the checkpoint's own, is not offered",)
    table = tabulate(scheduler_of("EulerDiscreteScheduler"), 9, lambda done, total: None)
    assert (table.default, table.refused) == ("euler", ())


def test_a_checkpoint_that_no_sampler_serves_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dq_export.families.sampler_tables.KINDS", {NOISE.name: {"ddim": KINDS[NOISE.name]["ddim"]}})
    with pytest.raises(ModelError, match="no sampler of this checkpoint can be served: DDIMScheduler clips"):
        tabulate(scheduler_of("DDIMScheduler", clip_sample=True), 5, lambda done, total: None)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_flows_trajectory_and_previews_are_diffusers_own(steps: int) -> None:
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    entries = tabulate(scheduler, 8, lambda done, total: None, FLOW, Sending(integers=False))
    assert (entries.default, entries.refused) == ("euler", ())
    scheduler.set_timesteps(steps)
    table = entries.schedules.steps("euler", steps)
    exact = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 2, 4, 4), dtype=np.float32))
    latents = np.float32(table[0].noise) * exact.numpy()
    zeros = np.zeros_like(latents)
    for step, timestep, sigma in zip(table, scheduler.timesteps, scheduler.sigmas, strict=False):
        assert step.timestep == float(timestep)
        velocity = torch.tanh(exact * (1 + timestep / 1000))
        picture = (exact - sigma * velocity).numpy()
        assert np.abs(step.clean(latents, velocity.numpy()) - picture).max() < 1e-5
        latents = step.advance(np.float32(step.input) * latents, velocity.numpy(), zeros, zeros)
        exact = scheduler.step(velocity, timestep, exact).prev_sample
        assert np.abs(latents - exact.numpy()).max() < 1e-5


def test_a_flow_that_no_table_can_hold_is_refused_by_name() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

    for changes in ({"use_dynamic_shifting": True}, {"stochastic_sampling": True}):
        scheduler = FlowMatchEulerDiscreteScheduler(**changes)
        with pytest.raises(ModelError, match="no sampler of this checkpoint can be served: FlowMatchEulerDiscreteScheduler"):
            tabulate(scheduler, 5, lambda done, total: None, FLOW, Sending(integers=False))
    heun = tabulate(FlowMatchHeunDiscreteScheduler(), 5, lambda done, total: None, FLOW, Sending(integers=False))
    assert heun.refused == ("FlowMatchHeunDiscreteScheduler, the checkpoint's own, is not offered",)


def test_a_number_of_steps_with_too_many_calls_has_no_row() -> None:
    """`trailing` steps of 1000 / 61 are rounded so that one more fits in."""
    scheduler = scheduler_of("DPMSolverMultistepScheduler", timestep_spacing="trailing")
    scheduler.set_timesteps(61)
    assert len(scheduler.timesteps) == 62
    schedules = Schedules({"it": table_of(scheduler, 62)})
    for steps in (60, 62):
        assert len(schedules.steps("it", steps)) == steps
    with pytest.raises(ScheduleError, match="does not support so many"):
        schedules.steps("it", 61)


def test_a_sampler_of_flows_has_no_table() -> None:
    """DPM-Solver++ with betas instead would not draw what the network learned."""
    import diffusers

    with pytest.raises(ModelError, match="--triton: no table holds FlowMatchEulerDiscreteScheduler for a network"):
        tabulate(diffusers.FlowMatchEulerDiscreteScheduler(), 5, lambda done, total: None)


def test_samplers_that_do_not_take_the_checkpoints_values_are_named() -> None:
    scheduler = scheduler_of("DDPMScheduler", beta_schedule="sigmoid")
    with pytest.raises(ModelError, match=r"can be served: DDIMScheduler does not take its values \(sigmoid is not implemented"):
        tabulate(scheduler, 3, lambda done, total: None)


def test_probing_leaves_torchs_random_numbers_alone() -> None:
    import torch

    torch.manual_seed(3)
    exact = torch.rand(4)
    torch.manual_seed(3)
    probe(scheduler_of("DDIMScheduler"), 5)
    assert torch.equal(torch.rand(4), exact)


def test_files_hold_every_number_and_no_pickle(tmp_path: Path) -> None:
    tables = {"ddim": table_of(scheduler_of("DDIMScheduler"), 7), "euler": table_of(scheduler_of("EulerDiscreteScheduler"), 7)}
    digests = []
    for name in ("a.npy", "b.npy"):
        Schedules(tables).save(tmp_path / name)
        digests.append(hashlib.sha256((tmp_path / name).read_bytes()).digest())
    assert digests[0] == digests[1]
    loaded = Schedules.load(tmp_path / "a.npy", ["ddim", "euler"])
    assert loaded.max_steps == 7
    assert all(np.array_equal(loaded.tables[name], tables[name]) for name in tables)
    with pytest.raises(ScheduleError, match="expected 1 tables of 9 columns, found"):
        Schedules.load(tmp_path / "a.npy", ["ddim"])


@pytest.mark.parametrize(
    ("name", "count", "reason"),
    [("pndm", 3, "scheduler 'pndm': expected ddim"), ("ddim", 0, "expected 1 to 4"), ("ddim", 5, "expected 1 to 4")],
)
def test_unknown_samplers_and_step_counts_are_errors(name: str, count: int, reason: str) -> None:
    with pytest.raises(ScheduleError, match=reason):
        Schedules({"ddim": table_of(scheduler_of("DDIMScheduler"), 4)}).steps(name, count)


def test_a_number_of_steps_that_a_scheduler_refuses_is_refused_by_the_server() -> None:
    scheduler = scheduler_of("DDIMScheduler", num_train_timesteps=4, steps_offset=0)
    schedules = Schedules({"ddim": table_of(scheduler, 6)})
    assert len(schedules.steps("ddim", 4)) == 4
    with pytest.raises(ScheduleError, match="does not support so many"):
        schedules.steps("ddim", 6)
