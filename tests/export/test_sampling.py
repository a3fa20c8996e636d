"""Schedulers of diffusers: refused with a remedy that holds, or run to the end, before any work."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dq_export.core.network import Feed
from dq_export.families.dit import DIT
from dq_export.families.family import Pictures
from dq_export.families.prediction import FLOW, NOISE
from dq_export.families.reference import Float32, ModelError, Network
from dq_export.families.sampling import Rehearsal, load_scheduler
from dq_export.families.stand_in import StandIn


def saved(folder: Path, name: Any, **values: Any) -> Path:
    (folder / "scheduler_config.json").write_text(json.dumps({"_class_name": name, **values}))
    return folder


def sample(network: Network, scheduler: Any, steps: int, channels: int, guidance: float) -> Float32:
    """A picture of ones, as a DiT draws it."""
    label, null = np.zeros(1, dtype=np.int64), np.ones(1, dtype=np.int64)
    pictures = Pictures(
        noise=np.ones((1, channels, 4, 4), dtype=np.float32), conditions={"class_labels": label}, null={"class_labels": null}
    )
    config = SimpleNamespace(in_channels=channels, sample_size=4, num_embeds_ada_norm=1)
    stand_in = StandIn(network, DIT.inputs(SimpleNamespace(config=config)), config, DIT.network_class(DIT.architectures[0]), True)
    return DIT.draw(stand_in, scheduler, pictures, steps=steps, guidance=guidance)


def rehearsed_timesteps(scheduler: Any, steps: int, channels: int) -> list[float]:
    """The timesteps of a DiT's trajectory."""
    return Rehearsal(
        draw=lambda chosen, count, network: sample(network, chosen, count, channels, 2.0),
        state="hidden_states",
        output=lambda shape: shape,
    ).timesteps(scheduler, steps)


def all_schedulers() -> list[str]:
    import diffusers

    return [
        name for name in dir(diffusers)
        if inspect.isclass(kind := getattr(diffusers, name, None)) and issubclass(kind, diffusers.SchedulerMixin)
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore:__array_wrap__")  # of NumPy, from what KDPM2 does with a tensor
@pytest.mark.parametrize("name", all_schedulers())
def test_every_scheduler_of_diffusers_runs_or_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    """With `trailing` timesteps, which are whole numbers: with its own, Euler's are not."""
    saved(tmp_path, name, timestep_spacing="trailing")
    if name not in NOISE.schedulers:
        with pytest.raises(ModelError, match=rf"^\S+: {name} does not sample a network that predicts noise[^\n]*$"):
            load_scheduler(tmp_path, {})
        return
    scheduler = load_scheduler(tmp_path, {})
    if name in ("EDMEulerScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"):
        with pytest.raises(ModelError, match=r"fractional timestep [^\n]*; put DDIMScheduler in its place[^\n]*$"):
            rehearsed_timesteps(scheduler, 20, 4)
        return
    timesteps = rehearsed_timesteps(scheduler, 20, 4)
    assert len(timesteps) >= 20
    assert all(0 <= timestep < 1000 and timestep == int(timestep) for timestep in timesteps)


@pytest.mark.parametrize("name", all_schedulers())
def test_a_network_of_flows_takes_schedulers_of_flows_alone(name: str, tmp_path: Path) -> None:
    saved(tmp_path, name)
    if name in FLOW.schedulers:
        assert type(load_scheduler(tmp_path, {}, FLOW)).__name__ == name
        return
    with pytest.raises(
        ModelError, match=rf"^\S+: {name} does not sample a network that predicts the velocity of a flow; [^\n]*for example "
        rf"{FLOW.plain}$"
    ):  # fmt: skip
        load_scheduler(tmp_path, {}, FLOW)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stochastic_sampling": True}, "stochastic_sampling = True: expected False"),
        ({"invert_sigmas": True}, "invert_sigmas = True: expected False"),
        ({"shift": 0}, "shift = 0: expected greater than 0"),
        ({"max_shift": "1"}, "max_shift = '1': expected a valid number"),
        ({"shift_terminal": 1}, "shift_terminal = 1: expected less than 1"),
    ],
)
def test_values_of_a_scheduler_of_flows_are_refused_by_key(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    saved(tmp_path, FLOW.plain, **values)
    with pytest.raises(ModelError, match=rf"^{tmp_path}/scheduler_config.json: {message}[^\n]*$"):
        load_scheduler(tmp_path, {}, FLOW)


REHEARSALS = {
    "karras-cosine": (
        "DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "beta_schedule": "squaredcos_cap_v2"},
        "set use_karras_sigmas to false",
    ),
    "learned-range": ("DDPMScheduler", {"variance_type": "learned_range"}, "set variance_type to fixed_small"),
    "learned": ("DDPMScheduler", {"variance_type": "learned"}, "set variance_type to fixed_small"),
    "solver-learned": ("DPMSolverMultistepScheduler", {"variance_type": "learned_range"}, "set variance_type to null"),
    "euler-linspace": ("EulerDiscreteScheduler", {"timestep_spacing": "linspace"}, "set timestep_spacing to trailing"),
    "euler-default": ("EulerDiscreteScheduler", {}, "set timestep_spacing to trailing"),
    "heun": ("HeunDiscreteScheduler", {}, "set timestep_spacing to trailing"),
    "too-many": ("DDIMScheduler", {"num_train_timesteps": 20}, "change --steps to 20 or less"),
    "no-signal": ("DDIMScheduler", {"beta_start": 0.9, "beta_end": 1.0, "clip_sample": False}, "put another scheduler in"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "values", "remedy"), REHEARSALS.values(), ids=REHEARSALS)
def test_a_scheduler_that_would_fail_is_refused_with_the_remedy(
    name: str, values: dict[str, Any], remedy: str, tmp_path: Path
) -> None:
    scheduler = load_scheduler(saved(tmp_path, name, **values), {})
    with pytest.raises(ModelError, match=rf"^scheduler {name} cannot sample in 50 steps \([^\n]*\); {remedy}[^\n]*$"):
        rehearsed_timesteps(scheduler, 50, 4)
    words = remedy.split()
    if words[0] == "set":
        change = {words[1]: {"null": None, "false": False}.get(words[3], words[3])}
        rehearsed_timesteps(load_scheduler(saved(tmp_path, name, **{**values, **change}), {}), 50, 4)
    elif words[0] == "change":
        assert len(rehearsed_timesteps(scheduler, int(words[3]), 4)) == 20


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_train_timesteps": 10**9}, "num_train_timesteps = 1000000000: expected less than or equal to 10000"),
        ({"num_train_timesteps": 0}, "num_train_timesteps = 0: expected greater"),
        ({"num_train_timesteps": "1000"}, "num_train_timesteps = '1000': expected a valid integer"),
        ({"beta_start": float("nan")}, "beta_start = nan: expected a finite number"),
        ({"beta_end": 2}, "beta_end = 2: expected less than or equal to 1"),
        ({"beta_schedule": "laplace"}, r"makes no DDIMScheduler \(laplace is not implemented"),
        ({"beta_schedule": "lineer"}, "beta_schedule = 'lineer': expected 'linear'"),
        ({"trained_betas": [0.1, "a"]}, r"trained_betas\[1\] = 'a': expected a valid number"),
        ({"trained_betas": [0.1] * 10}, "trained_betas: expected num_train_timesteps 1000 of them, found 10"),
        ({"trained_betas": 0.1}, "trained_betas = 0.1: expected a valid list"),
        ({"prediction_type": "flow_prediction"}, "prediction_type = 'flow_prediction': expected 'epsilon'"),
        ({"steps_offset": -1}, "steps_offset = -1: expected greater"),
        ({"clip_sample": "no"}, "clip_sample = 'no': expected a valid boolean"),
        ({"_class_name": "os"}, "'os' is not a scheduler of diffusers"),
        ({"_class_name": ["DDIMScheduler"]}, r"\['DDIMScheduler'\] is not a scheduler of diffusers"),
        ({"_class_name": "DiTTransformer2DModel"}, "'DiTTransformer2DModel' is not a scheduler of diffusers"),
    ],
)
def test_a_value_that_no_scheduler_has_is_refused_by_file_and_key(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    saved(tmp_path, **{"name": values.get("_class_name", "DDIMScheduler"), **values})
    with pytest.raises(ModelError, match=rf"^{tmp_path}/scheduler_config.json: {message}[^\n]*$"):
        load_scheduler(tmp_path, {})


def test_what_diffusers_ignores_or_writes_itself_is_accepted(tmp_path: Path) -> None:
    from diffusers import DPMSolverMultistepScheduler

    assert load_scheduler(saved(tmp_path, "DDIMScheduler", solver_order="x", set_alpha_to_one=False, skip=7), {}).config.skip == 7
    DPMSolverMultistepScheduler().save_pretrained(tmp_path)
    assert "-Infinity" in (tmp_path / "scheduler_config.json").read_text()
    assert load_scheduler(tmp_path, {}).config.lambda_min_clipped == float("-inf")


def test_a_rehearsal_leaves_the_scheduler_as_it_was(tmp_path: Path) -> None:
    """A second trajectory of a solver that remembers earlier steps is the first one's."""
    scheduler = load_scheduler(saved(tmp_path, "UniPCMultistepScheduler", timestep_spacing="trailing"), {})

    def tenth(feed: Feed) -> Float32:
        return np.asarray(0.1 * feed["hidden_states"], dtype=np.float32)

    first = sample(tenth, scheduler, 6, 2, 1.0)
    rehearsed_timesteps(scheduler, 9, 2)
    np.testing.assert_array_equal(first, sample(tenth, scheduler, 6, 2, 1.0))


JSON = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 12_000), st.integers(-(10**30), 10**30), st.floats(), st.text(max_size=3),
    st.sampled_from(["linear", "trailing", "linspace", "v_prediction", "sample", "bh1", "heun", "sde-dpmsolver++", "dpmsolver"]),
    st.lists(st.floats() | st.integers(-2, 9) | st.text(max_size=2), max_size=4), st.dictionaries(st.text(max_size=2), st.none()),
)  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # of NumPy and PyTorch, on values that make infinities before they are refused
@given(st.data())
def test_any_value_of_any_scheduler_is_refused_in_one_line_or_runs(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    import diffusers

    name = data.draw(st.sampled_from(sorted(NOISE.schedulers)))
    keys = sorted(set(inspect.signature(getattr(diffusers, name).__init__).parameters) - {"self"})
    values = data.draw(st.dictionaries(st.sampled_from(keys), JSON, min_size=1, max_size=2))
    folder = saved(tmp_path_factory.mktemp("any"), name, **{"timestep_spacing": "trailing", **values})
    try:
        timesteps = rehearsed_timesteps(load_scheduler(folder, {}), 4, 2)
    except ModelError as error:
        message = str(error)
    else:
        message = f"{name} runs"
        assert timesteps
    assert name in message or "scheduler_config.json" in message
    assert "\n" not in message
