"""Statistics of a real, small DiT while it samples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import calibrate_tiny, recipe_of, save_tiny

from dq_export.calibration.collect.calls import Calls
from dq_export.calibration.collect.histograms import collect_histograms
from dq_export.calibration.collect.sampling import Sampling
from dq_export.calibration.collect.statistics import collect_ranges
from dq_export.core.artifacts import CalibrationError, CalibrationResult
from dq_export.core.progress import unwatched
from dq_export.families.reference import Reference
from dq_export.families.source import load_reference

SAMPLING = Sampling(calib_size=10, steps=3, seed=4, guidance=2.0, conditions=5)


def calls_of(reference: Reference, sampling: Sampling, calls: list[tuple[int, int]] | None = None) -> Calls:
    """The network calls of a sampling; their progress goes to `calls`."""
    return Calls(
        denoiser=reference,
        sampling=sampling,
        progress=unwatched if calls is None else lambda done, total, unit="": calls.append((done, total)),
    )


def recorded(reference: Reference, sampling: Sampling) -> dict[str, dict[float, np.ndarray]]:
    """Every input of every site, all at once."""
    arrays: dict[str, dict[float, list[np.ndarray]]] = {}
    times: list[float] = []
    with reference.observe(
        lambda name, value: arrays.setdefault(name, {}).setdefault(times[-1], []).append(value.numpy().copy())
    ):
        for conditions, seed in map(sampling.pictures, range(sampling.batches)):
            reference.trajectory(
                conditions,
                steps=sampling.steps,
                seed=seed,
                guidance=sampling.guidance,
                before=lambda feed: times.append(float(feed["timestep"][0])),
            )
    return {name: {t: np.concatenate(parts) for t, parts in by.items()} for name, by in arrays.items()}


def test_streamed_statistics_equal_those_of_everything_at_once(tiny: Reference, tmp_path: Path) -> None:
    names = tuple(site.name for site in tiny.sites)
    calls = []
    ranges = collect_ranges(calls_of(tiny, SAMPLING, calls), names, tmp_path)
    arrays = recorded(tiny, SAMPLING)
    assert calls[-1] == (6, 6)  # 2 batches of 3 steps
    for name in names:
        assert ranges[name].timesteps.tolist() == list(arrays[name])
        for i, (timestep, rows) in enumerate(arrays[name].items()):
            np.testing.assert_array_equal(ranges[name].low[i], rows.min(axis=0))
            np.testing.assert_array_equal(ranges[name].high[i], rows.max(axis=0))
            results = ranges[name].rows[ranges[name].row_step == i]
            assert len(results)
            assert all((rows == row).all(axis=1).any() for row in results), f"a kept row is not of timestep {timestep}"


def ranges(reference: Reference, folder: Path, **changes: int) -> Any:
    name = reference.sites[2].name
    return collect_ranges(calls_of(reference, replace(SAMPLING, **changes)), (name,), folder)[name]


def test_more_pictures_only_add_to_what_was_seen(tiny: Reference, tmp_path: Path) -> None:
    eight, ten = (
        ranges(tiny, tmp_path / "8", calib_size=8),
        ranges(tiny, tmp_path / "10", calib_size=10),
    )  # the first batch is the same: equal to the bit
    assert (ten.low <= eight.low).all()
    assert (ten.high >= eight.high).all()
    assert (ten.low < eight.low).any()


def test_a_picture_is_the_same_in_a_batch_of_another_size(tiny: Reference, tmp_path: Path) -> None:
    three, one = ranges(tiny, tmp_path / "3", calib_size=3), ranges(tiny, tmp_path / "1", calib_size=1)
    slack = 1e-4 * np.abs(three.high).max()  # matrix products sum in an order that depends on the batch; 3 steps amplify it
    assert (three.low <= one.low + slack).all()
    assert (three.high >= one.high - slack).all()


def test_as_many_rows_are_kept_whatever_the_pictures_and_steps(tiny: Reference, tmp_path: Path) -> None:
    def rows_kept(calib_size: int, steps: int) -> int:
        sampling = replace(SAMPLING, calib_size=calib_size, steps=steps)
        folder = tmp_path / f"{calib_size}-{steps}"
        ranges = collect_ranges(calls_of(tiny, sampling), (tiny.sites[0].name,), folder, rows_kept=24)
        return len(ranges[tiny.sites[0].name].rows)

    assert rows_kept(8, 3) == rows_kept(16, 3) == rows_kept(32, 3) == rows_kept(8, 24) == 24  # 3, 6, 12 and 24 network calls
    assert rows_kept(16, 24) == 24  # 48 calls: every other one gives a row


def test_only_the_named_sites_are_watched_and_none_is_afterwards(tiny: Any, tmp_path: Path) -> None:
    names = (tiny.sites[1].name, tiny.sites[3].name)
    assert set(collect_ranges(calls_of(tiny, SAMPLING), names, tmp_path)) == set(names)
    assert not any(module._forward_pre_hooks for module in tiny.model.modules())


def test_every_row_in_the_histogram_is_counted_once_for_each_channel(tiny: Reference, tmp_path: Path) -> None:
    name = tiny.sites[3].name
    ranges = collect_ranges(calls_of(tiny, SAMPLING), (name,), tmp_path)[name]
    width = ranges.low.shape[1]
    ones, zeros = np.ones(width, dtype=np.float32), np.zeros(width, dtype=np.float32)
    amax = {name: ranges.amax(ones, zeros)}
    counts = collect_histograms(calls_of(tiny, SAMPLING), {name: (ones, zeros)}, amax, tmp_path)[name]
    # 16 tokens a picture, twice with guidance: batches of 8 and 2 bring 256 and 64 rows, of which every 2nd and all count.
    assert counts.sum(axis=1).tolist() == [(128 + 64) * width] * 3


def test_amax_is_that_of_the_scaled_input(tiny: Reference, tmp_path: Path) -> None:
    name = tiny.sites[0].name
    ranges = collect_ranges(calls_of(tiny, SAMPLING), (name,), tmp_path)[name]
    width = ranges.low.shape[1]
    in_scale, in_shift = np.linspace(0.5, 2, width, dtype=np.float32), np.linspace(-1, 1, width, dtype=np.float32)
    rows = recorded(tiny, SAMPLING)[name]
    exact = [np.abs((r - in_shift) / in_scale).max() for r in rows.values()]
    np.testing.assert_allclose(ranges.amax(in_scale, in_shift), exact, rtol=1e-6)  # one division's rounding
    amax = ranges.amax(in_scale, in_shift)
    counts = collect_histograms(calls_of(tiny, SAMPLING), {name: (in_scale, in_shift)}, {name: amax}, tmp_path)[name]
    share = (counts * (np.arange(2048) >= 1024)).sum() / counts.sum()
    scaled = np.concatenate([(np.abs((r - in_shift) / in_scale) / a).ravel() for r, a in zip(rows.values(), amax, strict=True)])
    assert share == pytest.approx((scaled >= 0.5).mean(), abs=0.02)  # about 128 of each call's rows are counted


def test_a_seed_gives_the_same_bytes(tiny: Reference, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        calibrate_tiny(tiny, recipe_of(tiny, seed=seed, method="mse"))[0].save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


def test_every_option_changes_the_tables(tiny: Reference) -> None:
    def tables(**options: Any) -> bytes:
        result, _ = calibrate_tiny(tiny, recipe_of(tiny, **options))
        return b"".join(plan.activation.scale.tobytes() + plan.in_scale.tobytes() for plan in result.sites.values())

    options = ({}, {"method": "mse"}, {"method": "percentile"}, {"bins": 1}, {"scaling": "none"}, {"guidance_scale": 3.0})
    results = [tables(scaling="smooth", **o) if "scaling" not in o else tables(**o) for o in options[:5]]
    assert len(set(results)) == 5


def broken(folder: Path, edit: Any) -> Reference:
    reference = load_reference(str(save_tiny(folder)))
    edit(reference)
    return reference


def test_an_input_that_is_zero_throughout_is_an_error(tmp_path: Path) -> None:
    def zero_value(reference: Any) -> None:
        reference.model.transformer_blocks[1].attn1.to_v.weight.data.zero_()
        reference.model.transformer_blocks[1].attn1.to_v.bias.data.zero_()

    reference = broken(tmp_path, zero_value)
    with pytest.raises(CalibrationError, match=r"'transformer_blocks.1.attn1.to_out.0' is zero.*--exclude"):
        calibrate_tiny(reference, recipe_of(reference))


def test_all_inputs_that_cannot_be_measured_are_named_at_once(tmp_path: Path) -> None:
    def spoil(reference: Any) -> None:
        for block in reference.model.transformer_blocks:
            block.attn1.to_v.weight.data.zero_()
            block.attn1.to_v.bias.data.zero_()
        reference.model.transformer_blocks[1].ff.net[0].proj.bias.data.fill_(float("inf"))

    reference = broken(tmp_path, spoil)
    names = tuple(site.name for site in reference.sites)
    with pytest.raises(CalibrationError) as error:
        collect_ranges(calls_of(reference, replace(SAMPLING, steps=1)), names, tmp_path)
    assert [line.split("'")[1] for line in str(error.value).splitlines()] == [
        "transformer_blocks.0.attn1.to_out.0",
        "transformer_blocks.1.attn1.to_out.0",
        "transformer_blocks.1.ff.net.2",
    ]


def test_nan_in_an_input_is_an_error(tmp_path: Path) -> None:
    def overflow(reference: Any) -> None:
        reference.model.transformer_blocks[0].ff.net[0].proj.bias.data.fill_(float("nan"))

    reference = broken(tmp_path, overflow)
    with pytest.raises(CalibrationError, match=r"'transformer_blocks.0.ff.net.2' has NaN or Inf at timestep"):
        calibrate_tiny(reference, recipe_of(reference))


def test_results_read_back(tiny_calibrated: Any, tmp_path: Path) -> None:
    result, _ = tiny_calibrated
    result.save(tmp_path / "c.safetensors")
    loaded = CalibrationResult.load(tmp_path / "c.safetensors")
    assert list(loaded.sites) == list(result.sites)
    for name, plan in result.sites.items():
        other = loaded.sites[name]
        assert other.site == plan.site
        assert other.activation == plan.activation
        np.testing.assert_array_equal(other.in_scale, plan.in_scale)
        np.testing.assert_array_equal(other.in_shift, plan.in_shift)
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "c.safetensors").read_bytes()


def test_a_file_cut_short_or_of_something_else_is_an_error(tiny_calibrated: Any, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    path = tmp_path / "c.safetensors"
    tiny_calibrated[0].save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CalibrationError, match="not a readable calibration file"):
        CalibrationResult.load(path)
    save_file({"x": np.ones(2)}, path)
    with pytest.raises(CalibrationError, match="expected 'dq-export calibration 4'"):
        CalibrationResult.load(path)
