"""Second moments of quantized inputs: their values, and how long they stay in memory."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import calibrate_tiny, calibration_of, recipe_of

from dq_export.calibration import hessians
from dq_export.calibration.calibrate import calibrate
from dq_export.calibration.collect.calls import Call
from dq_export.calibration.hessians import TILE, Moments, stream_hessians
from dq_export.families.reference import Reference


def test_hessians_are_the_second_moments_of_the_quantized_inputs(tiny: Reference) -> None:
    recipe = recipe_of(tiny, bits="w4a8", granularity="token", scaling="smooth")
    plans = calibrate_tiny(tiny, recipe)[0].sites
    calls = calibration_of(tiny, recipe, Path()).calls
    inputs: dict[str, list[np.ndarray]] = {name: [] for name in plans}
    times: list[float] = []

    def watch(name: str, value: Any) -> None:
        inputs[name].append(plans[name].quantized(value.numpy()[:: -(-len(value) // 256)], times[-1]))

    order = tiny.timesteps(recipe.steps)
    times.append(order[0])
    with tiny.observe(watch):
        tiny.trajectory(
            np.arange(4), steps=recipe.steps, seed=0, guidance=2.0, before=lambda feed: times.append(float(feed["timestep"][0]))
        )
    reach = {name: max(float(np.abs(item).max()) for item in actual) for name, actual in inputs.items()}

    def streamed(space: int, **words: bool) -> dict[str, np.ndarray]:
        actual: dict[str, np.ndarray] = {}
        for part in stream_hessians(calls, plans, reach, order, space, **words):
            actual |= {name: moments.whole() for name, moments in part.items()}
        return actual

    whole = streamed(1 << 30)
    for name, items in inputs.items():
        rows = np.concatenate(items).astype(np.float64)
        np.testing.assert_allclose(whole[name], rows.T @ rows / len(rows), atol=1e-5 * reach[name] ** 2)
        np.testing.assert_array_equal(whole[name], whole[name].T)
    for name, matrix in streamed(8 * 32 * 32).items():  # one site at a time
        np.testing.assert_array_equal(matrix, whole[name])
    for name, moments in streamed(1 << 30, diagonal=True).items():
        np.testing.assert_allclose(moments, np.diagonal(whole[name]), rtol=1e-5)


def test_of_many_calls_some_contribute_at_every_timestep(
    tiny: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(tiny, bits="w4a8", rounding="gptq", calib_size=16, steps=6)
    contributing: list[tuple[int, int]] = []
    contributes = Call.contributes

    def watch(call: Call, stride: int) -> bool:
        answer = contributes(call, stride)
        if answer:
            contributing.append((call.number // call.steps, call.place))
        return answer

    monkeypatch.setattr(Call, "contributes", watch)
    monkeypatch.setattr(hessians, "CALLS", 4)
    calibration = calibration_of(tiny, recipe, tmp_path)
    assert calibration.sampling.batches == 2
    assert calibrate(calibration) is not None
    assert set(contributing) == {(0, 0), (0, 3), (1, 2), (1, 5)}, "of 12 calls each third, which is another one in each batch"
    monkeypatch.setattr(hessians, "CALLS", 12)
    contributing.clear()
    assert calibrate(calibration_of(tiny, recipe, tmp_path / "every")) is not None
    assert len(set(contributing)) == 12


class Watched:
    """Changes nothing; remembers the sites whose Hessians it was given."""

    name = ""

    def __init__(self) -> None:
        self.parts: list[set[str]] = []

    def prepare(self, linear: str, weight: np.ndarray) -> np.ndarray:
        return weight

    def hessian(self, linear: str, streamed: np.ndarray | None, in_scale: np.ndarray) -> np.ndarray | None:
        if streamed is not None:
            self.parts[-1].add(linear)
        return streamed


def rounded_within(tiny: Reference, space: int, folder: Path) -> tuple[list[set[str]], dict[str, np.ndarray]]:
    """Of a calibration with GPTQ: the linears that are rounded after each run over the pictures, and the codes."""
    recipe = recipe_of(tiny, bits="w4a8", rounding="gptq", scaling="none")
    plugin = Watched()

    def watch(done: int, total: int, unit: str = "") -> None:
        if total == calibration.sampling.calls and done == 1:  # the first of the pictures' network calls
            plugin.parts.append(set())
            assert not any(type(item) is Moments for item in gc.get_objects()), "those of the run before"

    calibration = calibration_of(tiny, recipe, folder, progress=watch, plugin=plugin, space=space)
    result = calibrate(calibration)
    assert result is not None
    return plugin.parts, dict(result.codes)


def test_as_many_hessians_are_summed_at_once_as_fit(tiny: Reference, tmp_path: Path) -> None:
    linears = {name for site in tiny.sites for name in site.linears}
    parts, codes = rounded_within(tiny, 1 << 30, tmp_path / "wide")
    assert parts == [set(), linears]  # the first run is that of the ranges
    parts, others = rounded_within(tiny, 8 * 32 * 32, tmp_path / "tight")
    assert parts == [set(), *(set(site.linears) for site in tiny.sites)]
    assert codes.keys() == others.keys()
    for name, actual in codes.items():
        np.testing.assert_array_equal(actual, others[name])


def test_moments_of_which_half_is_kept_are_whole_again() -> None:
    rows = np.random.default_rng(1).normal(size=(200, 150)).astype(np.float32)
    exact = rows.T @ rows
    values = np.concatenate([exact[start : start + TILE, start:].reshape(-1) for start in range(0, 150, TILE)])
    assert values.size < 0.75 * exact.size
    whole = Moments(values, 150, True).whole()
    np.testing.assert_array_equal(whole, whole.T)
    np.testing.assert_allclose(whole, exact, rtol=1e-5, atol=1e-3)
