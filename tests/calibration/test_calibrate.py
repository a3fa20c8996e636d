"""The whole calibration of a real, small DiT."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import calibrate_tiny, calibration_of, feed_of, recipe_of, save_tiny

from dq_export.calibration.calibrate import calibrate
from dq_export.core.artifacts import CalibrationError, CalibrationResult
from dq_export.core.folding import folded_weight
from dq_export.core.folds import Fold
from dq_export.core.rule import Rule
from dq_export.families.reference import Reference
from dq_export.families.source import load_reference

BASE: dict[str, Any] = {"scaling": "none", "method": "minmax", "bins": "per-step"}


def content(result: CalibrationResult) -> bytes:
    """Every number that the passes will use."""
    parts = []
    for plan in result.sites.values():
        parts += [plan.in_scale, plan.in_shift, plan.activation.scale, np.asarray(plan.activation.bins.edges)]
    return b"".join(part.tobytes() for part in parts)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ({"method": "minmax"}, {"method": "mse"}),
        ({"method": "minmax"}, {"method": "percentile"}),
        ({"method": "percentile", "percentile": 99}, {"method": "percentile", "percentile": 90}),
        ({"scaling": "none"}, {"scaling": "dilate"}),
        ({"scaling": "smooth", "alpha": 0.3}, {"scaling": "smooth", "alpha": 0.7}),
        ({"scaling": "dilate", "rho": 1}, {"scaling": "dilate", "rho": 4}),
        ({"shift": False}, {"shift": True}),
        ({"bins": 1}, {"bins": 2}),
        ({"bins": 1}, {"bins": "per-step"}),
        ({"steps": 3}, {"steps": 4}),
        ({"calib_size": 2}, {"calib_size": 3}),
        ({"seed": 0}, {"seed": 1}),
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_every_option_has_an_effect(tiny: Reference, one: dict[str, Any], two: dict[str, Any]) -> None:
    first, second = (content(calibrate_tiny(tiny, recipe_of(tiny, **{**BASE, **options}))[0]) for options in (one, two))
    assert first != second


def tied(folder: Path, *, shifts: bool = True) -> Reference:
    """A reference whose first and third site share one scaling, as the streams of joint attention do."""
    reference: Any = load_reference(str(folder))
    first, second, third, *rest = reference.sites
    first = replace(first, fold=replace(first.fold, shifts=shifts))
    third = replace(third, fold=Fold(parts=()), shares=first.name)
    reference.structure = replace(reference.structure, sites=(first, second, third, *rest))
    tied_reference: Reference = reference
    return tied_reference


def test_sites_that_share_a_fold_share_one_scaling_and_have_their_own_scales(tiny_folder: Path) -> None:
    reference = tied(tiny_folder)
    result, _ = calibrate_tiny(reference, recipe_of(reference, scaling="smooth", shift=True))
    first, _, third = list(result.sites.values())[:3]
    np.testing.assert_array_equal(first.in_scale, third.in_scale)
    np.testing.assert_array_equal(first.in_shift, third.in_shift)
    assert third.site.shares == first.site.name
    assert not np.array_equal(first.activation.scale, third.activation.scale)
    alone, _ = calibrate_tiny(load_reference(str(tiny_folder)), recipe_of(reference, scaling="smooth", shift=True))
    assert not np.array_equal(first.in_scale, alone.sites[first.site.name].in_scale), "both are judged"
    weight = reference.weight(third.site.name)
    expected = weight * third.in_scale
    np.testing.assert_array_equal(folded_weight(weight, third.site.name, list(result.sites.values())), expected)


def test_a_float_site_that_shares_a_scaling_is_scaled_too(tiny_folder: Path) -> None:
    reference = tied(tiny_folder)
    name = reference.sites[2].name
    rules = (Rule(match=rf"^{re.escape(name)}$", action="float", reason="test"), *reference.rules)
    result, _ = calibrate_tiny(reference, recipe_of(reference, rules=rules, scaling="smooth"))
    plan = result.sites[name]
    assert plan.activation is None
    assert plan.scaled
    np.testing.assert_array_equal(plan.in_scale, result.sites[reference.sites[0].name].in_scale)
    assert name not in result.weight_scale


@pytest.mark.parametrize(
    "options", [{"scaling": "auto", "shift": None}, {"scaling": "smooth", "shift": True}], ids=["auto", "shift"]
)
def test_inputs_that_take_no_shift_get_none(options: dict[str, Any], tiny_folder: Path) -> None:
    reference = tied(tiny_folder, shifts=False)
    result, _ = calibrate_tiny(reference, recipe_of(reference, **options))
    first, second, third = list(result.sites.values())[:3]
    assert not first.in_shift.any()
    assert not third.in_shift.any()
    assert second.in_shift.any()


def test_the_number_of_bins_is_the_requested_one(tiny: Reference) -> None:
    for request, bins in ((1, 1), (3, 3), (50, 5), ("per-step", 5)):  # the recipe samples 5 steps
        result, _ = calibrate_tiny(tiny, recipe_of(tiny, **{**BASE, "bins": request}))
        assert {len(plan.activation.bins) for plan in result.sites.values()} == {bins}


@pytest.mark.parametrize("options", [{"scaling": "smooth"}, {"scaling": "dilate", "rho": 4}], ids=["smooth", "dilate"])
def test_folded_weights_are_those_of_a_network_that_computes_the_same(tiny_folder: Path, options: dict[str, Any]) -> None:
    import torch

    reference: Any = load_reference(str(tiny_folder))
    result, assigned = calibrate_tiny(reference, recipe_of(reference, shift=False, **options))
    assert all(plan.scaled for plan in result.sites.values())
    folded = copy.deepcopy(reference)
    for name in assigned:
        folded.model.get_submodule(name).weight.data = torch.from_numpy(
            folded_weight(reference.weight(name), name, list(result.sites.values())).copy()
        )
    for plan in result.sites.values():  # biases by hand: weights are what calibration has to know
        site, s = plan.site, torch.from_numpy(plan.in_scale.copy())
        for part in site.fold.of_kind("linear"):
            # (x (1 + g) + b) / s = x (1 + g') + b' with b' = b / s and g' = (1 + g) / s - 1; rows of softmax sum to 1, so the
            # value's bias passes through unchanged.
            bias = folded.model.get_submodule(part.name).bias.data[slice(*part.rows)]
            bias += part.plus
            bias /= s
            bias -= part.plus
        if site.fold.kind == "token":
            folded.model.get_submodule(site.linears[0]).register_forward_pre_hook(lambda _, x, s=s: (x[0] / s,))
    feed = feed_of(reference)
    exact, actual = reference.forward(feed), folded.forward(feed)
    assert np.abs(actual - exact).max() <= 1e-5 * np.abs(exact).max()  # float32: some dozens of roundings of 6e-8
    for name, rule in assigned.items():
        weight = np.abs(folded.model.get_submodule(name).weight.detach().numpy())
        if rule.action == "w8a8":
            np.testing.assert_allclose(result.weight_scale[name] * 127, weight.max(axis=1), rtol=1e-6)  # one division
        elif rule.action == "weight-only":  # 32 inputs: one block of 32
            np.testing.assert_allclose(result.weight_scale[name] * 127, weight.max(axis=1)[None], rtol=1e-6)
        else:
            assert name not in result.weight_scale


def test_a_linear_that_stays_float_has_no_site_and_scales_nothing(tiny: Reference) -> None:
    out, value = "transformer_blocks.0.attn1.to_out.0", "transformer_blocks.0.attn1.to_v"
    rules = (Rule(match=r"blocks\.0\.attn1\.(to_out|to_v)", action="float", reason="test"), *tiny.rules)
    result, _ = calibrate_tiny(tiny, recipe_of(tiny, rules=rules, scaling="smooth"))
    assert out not in result.sites
    assert not {out, value} & set(result.weight_scale)
    query = result.sites["transformer_blocks.0.attn1.to_q"]
    assert query.site.linears[2] == value, "a float reader still reads the scaled tensor"
    np.testing.assert_array_equal(
        folded_weight(tiny.weight(value), value, list(result.sites.values())), tiny.weight(value) * query.in_scale
    )


@pytest.mark.parametrize(("heads", "block"), [(2, 32), (3, 16), (8, 128)])
def test_the_largest_block_that_divides_is_chosen(tmp_path: Path, heads: int, block: int) -> None:
    reference = load_reference(str(save_tiny(tmp_path, num_layers=1, num_attention_heads=heads)))  # 16 wide each
    result, _ = calibrate_tiny(reference, recipe_of(reference, steps=1, calib_size=1, scaling="none"))
    width = heads * 16
    assert result.weight_scale["transformer_blocks.0.norm1.linear"].shape == (width // block, 6 * width)


def test_a_width_that_no_block_divides_has_a_scale_for_each_channel(tmp_path: Path) -> None:
    reference = load_reference(str(save_tiny(tmp_path, attention_head_dim=12)))
    result, _ = calibrate_tiny(reference, recipe_of(reference, steps=1, calib_size=1, scaling="none"))
    for block in range(2):
        name = f"transformer_blocks.{block}.norm1.linear"
        exact = np.abs(reference.weight(name)).max(axis=1) / 127
        np.testing.assert_array_equal(result.weight_scale[name], exact.astype(np.float32))


@pytest.mark.parametrize(("method", "passes"), [("minmax", 1), ("percentile", 2), ("mse", 2)])
def test_progress_counts_every_network_call_input_and_weight_once(
    tiny: Reference, method: str, passes: int, tmp_path: Path
) -> None:
    recipe = recipe_of(tiny, method=method, steps=3, calib_size=9)
    values: list[tuple[int, int]] = []
    calibration = calibration_of(tiny, recipe, tmp_path, progress=lambda done, total, unit="": values.append((done, total)))
    calibrate(calibration)
    calls = [(done, 6) for done in range(7)]  # 9 pictures are two batches of 3 steps
    weights = sum(rule.action != "float" for rule in calibration.assigned.values())
    inputs = [(done, len(tiny.sites)) for done in range(1, len(tiny.sites) + 1)]
    expected = [*calls, *inputs, *(calls if passes == 2 else []), *((done, weights) for done in range(1, weights + 1))]
    assert list(dict.fromkeys(values)) == list(dict.fromkeys(expected))


def constant_input(folder: Path) -> Reference:
    """A model whose MLPs return the same for every token of every picture: the inputs of their second linears are constant."""
    reference: Any = load_reference(str(save_tiny(folder)))
    for block in reference.model.transformer_blocks:
        block.ff.net[0].proj.weight.data.zero_()
    return reference  # type: ignore[no-any-return]


def test_a_shift_that_leaves_nothing_of_constant_inputs_is_an_error_that_names_them_all(tmp_path: Path) -> None:
    reference = constant_input(tmp_path)
    with pytest.raises(CalibrationError) as error:
        calibrate_tiny(reference, recipe_of(reference, scaling="none", shift=True))
    lines = str(error.value).splitlines()
    assert [line.split("'")[1] for line in lines] == [f"transformer_blocks.{block}.ff.net.2" for block in (0, 1)]
    assert all("--no-shift" in line and "--exclude" in line for line in lines)


@pytest.mark.parametrize("scaling", ["auto", "none", "dilate", "smooth"])
def test_a_constant_input_is_quantized_without_a_shift(tmp_path: Path, scaling: str) -> None:
    reference = constant_input(tmp_path)
    result, _ = calibrate_tiny(reference, recipe_of(reference, scaling=scaling))
    assert np.isfinite(result.sites["transformer_blocks.0.ff.net.2"].error)


@pytest.mark.parametrize("bits", ["w8a8", "w4a16"])
def test_a_scale_that_float16_rounds_to_zero_is_refused_with_the_dtypes_that_hold_it(bits: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_tiny(tmp_path / "model")
    path = next((folder / "transformer").glob("*.safetensors"))
    tensors = load_file(path)
    tensors["transformer_blocks.0.attn1.to_q.weight"].mul_(1e-7)
    save_file(tensors, path, metadata={"format": "pt"})
    reference = load_reference(str(folder))
    recipe = recipe_of(reference, bits=bits, scaling="none", dtype="fp16", format="trt")
    with pytest.raises(CalibrationError, match=r"0\.attn1\.to_q': float16 rounds its scale of .* to 0; pass --dtype bf16"):
        calibrate(calibration_of(reference, recipe, tmp_path / "half"))
    calibrate(calibration_of(reference, recipe.model_copy(update={"dtype": "bf16"}), tmp_path / "whole"))
