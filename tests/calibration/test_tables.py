"""Files of tables: what they decide, and every way in which they do not fit."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import calibration_of, recipe_of
from own_tables import Tensors, save_own, tables_of

sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))
from ddpm import save_ddpm

from dq_export.calibration.calibrate import calibrate
from dq_export.calibration.simulation import Simulation
from dq_export.calibration.table_reader import read_tables
from dq_export.calibration.tables import Tables
from dq_export.core.artifacts import CalibrationResult
from dq_export.core.recipe import RecipeError
from dq_export.core.rule import Rule
from dq_export.core.scales import ScaleTable
from dq_export.core.table_file import Codes, Entry, Header, save_table_file
from dq_export.families.reference import Reference
from dq_export.families.source import load_reference

STEPS = 5
QKV = tuple(f"transformer_blocks.1.attn1.to_{letter}" for letter in "qkv")
FC1, FC2 = "transformer_blocks.1.ff.net.0.proj", "transformer_blocks.1.ff.net.2"
Calibrated = tuple[CalibrationResult, Mapping[str, Rule]]


def tables_in(tiny: Reference, path: Path, **options: Any) -> Tables:
    """The tables of a file for a recipe of the tiny DiT."""
    recipe = recipe_of(tiny, **options)
    return read_tables(path, tiny, recipe.assign(tiny.linears), recipe, tiny.timesteps(STEPS))


def calibrated_with(tiny: Reference, path: Path, folder: Path, **options: Any) -> Calibrated:
    recipe = recipe_of(tiny, **options)
    calibration = calibration_of(tiny, recipe, folder, tables=tables_in(tiny, path, **options))
    result = calibrate(calibration)
    assert result is not None
    return result, calibration.assigned


@pytest.fixture(scope="module")
def stored(tiny: Reference, tiny_calibrated: Calibrated) -> tuple[Header, Tensors]:
    """Scaled and shifted, per step, 8 bits."""
    return tables_of(*_swapped(tiny_calibrated, tiny))


def _swapped(calibrated: Calibrated, tiny: Reference) -> tuple[CalibrationResult, Reference, Mapping[str, Rule], list[float]]:
    return calibrated[0], tiny, calibrated[1], tiny.timesteps(STEPS)


def test_a_calibration_comes_back_from_its_tables(tiny: Reference, tiny_calibrated: Calibrated, tmp_path: Path) -> None:
    before, assigned = tiny_calibrated
    path = save_own(tmp_path / "tables", before, tiny, assigned, tiny.timesteps(STEPS))
    after, _ = calibrated_with(tiny, path, tmp_path, scaling="none", method="mse", rounding="mse", bins=1)
    for name, plan in before.sites.items():
        actual = after.sites[name]
        assert actual.activation == plan.activation
        np.testing.assert_array_equal(actual.in_scale, plan.in_scale)
        np.testing.assert_array_equal(actual.in_shift, plan.in_shift)
        assert actual.method == "given by our own+shift"
    for name, scale in before.weight_scale.items():
        np.testing.assert_allclose(after.weight_scale[name], scale, rtol=3e-7)
    # The bias is made of the checkpoint's weight: what the rounded one moves is in the correction.
    one, two = (Simulation.of(tiny, result, assigned) for result in (before, after))
    for name, weight in one.weights.items():
        np.testing.assert_allclose(two.weights[name], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{"bits": "w4a4", "rounding": "gptq", "group_size": 16}, {"bits": "w6a6"}])
def test_tables_of_fewer_bits_come_back(options: dict[str, Any], tiny: Reference, tmp_path: Path) -> None:
    recipe = recipe_of(tiny, scaling="smooth", shift=False, bins="per-step", **options)
    calibration = calibration_of(tiny, recipe, tmp_path / "first")
    before = calibrate(calibration)
    assert before is not None
    path = save_own(tmp_path / "tables", before, tiny, calibration.assigned, tiny.timesteps(STEPS))
    after, assigned = calibrated_with(tiny, path, tmp_path / "second", **{**options, "rounding": "rtn"})
    for name in before.weight_scale:
        if name in before.codes:
            np.testing.assert_array_equal(after.codes[name], before.codes[name])
        if name in before.multiplier:
            np.testing.assert_array_equal(after.multiplier[name], before.multiplier[name])
    assert {name: plan.activation for name, plan in after.sites.items()} == {
        name: plan.activation for name, plan in before.sites.items()
    }
    assert after.reach.keys() == before.reach.keys()
    assert assigned == calibration.assigned


def only(stored: tuple[Header, Tensors], *names: str, **changes: Any) -> tuple[Header, Tensors]:
    """The part of a file that is about some linears. `changes`: of its header."""
    header, tensors = stored
    part = {key: value for key, value in tensors.items() if key.startswith(tuple(f"{name}." for name in names))}
    return header.model_copy(update={"linears": {name: header.linears[name] for name in names}, **changes}), part


def save(path: Path, content: tuple[Header, Tensors]) -> Path:
    save_table_file(path, *content)
    return path


def test_linears_that_a_file_does_not_have_are_calibrated(
    tiny: Reference, stored: tuple[Header, Tensors], tmp_path: Path
) -> None:
    path = save(tmp_path / "tables", only(stored, FC1))
    actual, _ = calibrated_with(tiny, path, tmp_path, scaling="none")
    assert [name for name, plan in actual.sites.items() if plan.method.startswith("given")] == [FC1]
    assert {plan.method for name, plan in actual.sites.items() if name != FC1} == {"none"}


@pytest.mark.parametrize("names", [(FC2,), QKV])
def test_an_asymmetric_table_becomes_a_shift(names: tuple[str, ...], tiny: Reference, tmp_path: Path) -> None:
    """A value that has a code in one has it in the other, except for one code at an end."""
    timesteps = sorted(tiny.timesteps(STEPS))
    scale = np.linspace(0.02, 0.03, STEPS).astype(np.float32)
    point = np.full(STEPS, 37.4, dtype=np.float32)
    entry = Entry(activation=Codes(bits=8, signed=False))
    tensors = {f"{name}.activation.{part}": value for name in names for part, value in (("scale", scale), ("zero_point", point))}
    path = save(
        tmp_path / "tables", (Header(method="x", timesteps=tuple(timesteps), linears=dict.fromkeys(names, entry)), tensors)
    )
    tables = tables_in(tiny, path)
    table, scaling = tables.activations[names[0]], tables.scalings[names[0]]
    rows = np.random.default_rng(0).normal(1.5, 1.0, (400, len(scaling.in_scale))).astype(np.float32)
    for step, width, zero in zip(timesteps, scale, np.rint(point), strict=True):
        expected = width * (np.clip(np.rint(rows / width) + zero, 0, 255) - zero)
        actual = table.nearest(rows - scaling.in_shift, step) + scaling.in_shift
        wide = table.at(step)
        inside = (rows > width * (1 - zero)) & (rows < width * (254 - zero))
        assert inside.mean() > 0.5
        assert wide <= width * 1.25
        assert np.abs(actual - expected)[inside].max() <= (width + wide) / 2 * 1.001
    assert scaling.in_shift[0] != 0


def test_a_zero_point_that_stays_costs_no_step(tiny: Reference, tmp_path: Path) -> None:
    timesteps = tuple(sorted(tiny.timesteps(STEPS)))
    scale = np.full(STEPS, 0.5, dtype=np.float32)
    tensors = {f"{FC2}.activation.scale": scale, f"{FC2}.activation.zero_point": np.full(STEPS, 1.0, np.float32)}
    header = Header(method="x", timesteps=timesteps, linears={FC2: Entry(activation=Codes(bits=4, signed=False))})
    actual = tables_in(tiny, save(tmp_path / "tables", (header, tensors)), bits="w4a4", group_size=16)
    assert actual.activations[FC2] == ScaleTable(scale=scale[:1], qtype=actual.activations[FC2].qtype)
    # 0 … 15 about 1 are -0.5 … 7.0, whose middle is 3.25.
    np.testing.assert_array_equal(actual.scalings[FC2].in_shift, 3.25)
    assert actual.scalings[FC2].method == "given by x+shift"


def test_a_middle_zero_point_is_no_shift(tiny: Reference, tmp_path: Path) -> None:
    timesteps = tuple(sorted(tiny.timesteps(STEPS)))
    tensors = {
        f"{FC2}.activation.scale": np.ones(STEPS, np.float32),
        f"{FC2}.activation.zero_point": np.full(STEPS, 128, np.float32),
    }
    header = Header(method="x", timesteps=timesteps, linears={FC2: Entry(activation=Codes(bits=8, signed=False))})
    actual = tables_in(tiny, save(tmp_path / "tables", (header, tensors)))
    assert not actual.scalings[FC2].in_shift.any()


@pytest.mark.parametrize("form", ["weight", "codes"])
def test_trained_weights_and_biases_take_the_checkpoints_place(
    form: str, tiny: Reference, stored: tuple[Header, Tensors], tmp_path: Path
) -> None:
    """The value projection's rows are scaled and shifted by its reader, and its columns by its own input."""
    header, tensors = only(stored, *QKV)
    tensors = dict(tensors)
    value, noise = QKV[2], np.random.default_rng(0)
    in_scale = tensors[f"{value}.in_scale"]
    trained = tiny.weight(value) + noise.normal(0, 0.05, tiny.weight(value).shape).astype(np.float32)
    bias = tensors[f"{value}.bias"] = tiny.bias(value) + noise.normal(0, 0.5, len(trained)).astype(np.float32)
    if form == "weight":
        tensors[f"{value}.weight"] = trained * in_scale
        del tensors[f"{value}.weight.codes"], tensors[f"{value}.weight.scale"]
        header = header.model_copy(
            update={"linears": {**header.linears, value: Entry(activation=header.linears[value].activation)}}
        )
    else:
        scale = np.abs(trained * in_scale).max(axis=1) / np.float32(127)
        tensors[f"{value}.weight.scale"] = scale
        tensors[f"{value}.weight.codes"] = np.rint(trained * in_scale / scale[:, None]).astype(np.int8)
    result, assigned = calibrated_with(tiny, save(tmp_path / "tables", (header, tensors)), tmp_path, scaling="smooth", shift=True)
    assert result.sites["transformer_blocks.1.attn1.to_out.0"].in_shift.any()
    simulated = Simulation.of(tiny, result, assigned)
    step = np.abs(trained * in_scale).max(axis=1, keepdims=True) / 127 / in_scale
    assert (np.abs(simulated.weights[value] - trained) <= step * 0.51).all()
    # With the codes the bias is that of the file; a weight that is still rounded gives it what rounding moves.
    moved = 0 if form == "codes" else (trained.astype(np.float64) - simulated.weights[value]) @ tensors[f"{value}.in_shift"]
    np.testing.assert_allclose(simulated.biases[value], bias + moved, atol=2e-5)
    assert value in result.codes


def altered(stored: tuple[Header, Tensors], *names: str, drop: tuple[str, ...] = (), **tensors: Any) -> tuple[Header, Tensors]:
    """Good tables of some linears with parts of the first replaced or left out."""
    header, rest = only(stored, *names)
    parts = {f"{names[0]}.{part.replace('__', '.')}": value for part, value in tensors.items()}
    return header, {key: value for key, value in {**rest, **parts}.items() if key not in {f"{names[0]}.{part}" for part in drop}}


F32 = np.float32
LONG = {"activation__scale": np.ones(4, F32)}
FAULTS: dict[str, tuple[tuple[str, ...], dict[str, Any], dict[str, Any], str]] = {
    "length": ((FC1,), LONG, {}, r"activation.scale' has shape \[4\]; expected \[5\]"),
    "nan": ((FC1,), {"activation__scale": np.full(5, np.nan, F32)}, {}, "activation.scale has NaN or Inf"),
    "zero": ((FC1,), {"activation__scale": np.zeros(5, F32)}, {}, "activation.scale has 0; expected > 0"),
    "double": ((FC1,), {"activation__scale": np.ones(5)}, {}, "is F64; expected F32"),
    "no scale": ((FC1,), {"drop": ("weight.scale",)}, {}, "weight.codes' needs '.*weight.scale', which is not there"),
    "no table": ((FC1,), {"drop": ("activation.scale",)}, {}, "has 'activation' in the header and no tensor 'activation.scale'"),
    "part": ((FC1,), {"weight__scales": np.ones(128, F32)}, {}, "weight.scales' is of no linear.* Did you mean '.*weight.scale'"),
    "in_scale": ((FC1,), {"in_scale": np.ones(31, F32)}, {}, r"in_scale' has shape \[31\]; expected \[32\]"),
    "both": ((FC1,), {"weight": np.ones((128, 32), F32)}, {}, "has a weight and codes of one; give one of them"),
    "bits": ((FC1,), {}, {"bits": "w4a4", "group_size": 16}, "has a table for codes of 8 bits, but .* to int4; pass the --bits"),
    "token": ((FC1,), {}, {"granularity": "token"}, "computes a scale for each token; pass --granularity tensor"),
    "float input": ((FC1,), {}, {"bits": "w8a16", "group_size": 16}, "the recipe leaves its input float"),
    "fp8": ((FC1,), {}, {"bits": "fp8"}, "a file cannot give codes of float8 weights"),
    "reader": (QKV, {"activation__scale": np.ones(5, F32)}, {}, "to_q' and '.*to_k' read one input, but their tables"),
    "lacking": (QKV[:2], {}, {}, "to_q' and '.*to_v' read one input, but their tables differ"),
    "correction": ((FC1,), {}, {"bias_correction": True}, "bias_correction measures errors against the checkpoint's weights"),
    "distill": ((FC1,), {}, {"rounding": "distill", "bins": "per-step"}, "rounding distill would train again what the file"),
    "excluded": ((FC1,), {}, {"rules": (Rule(match="net.0", action="float", reason="no"), Rule(action="w8a8"))}, "stays float"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_named(fault: str, tiny: Reference, stored: tuple[Header, Tensors], tmp_path: Path) -> None:
    names, changes, options, message = FAULTS[fault]
    if "rules" in options:
        options = {"rules": (*options["rules"][:1], *tiny.rules)}
    path = save(tmp_path / "tables", altered(stored, *names, **changes))
    with pytest.raises(RecipeError, match=message) as error:
        tables_in(tiny, path, **options)
    assert all(line.startswith(f"tables {path}: ") for line in str(error.value).splitlines())


EIGHT = Codes(bits=8, signed=True)


def header_of(stored: tuple[Header, Tensors], **changes: Any) -> tuple[Header, Tensors]:
    header, tensors = only(stored, FC1)
    return header.model_copy(update=changes), tensors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timesteps": (0.0, 200.0, 200.0, 600.0, 800.0)}, "must be distinct and ascend, found 200 before 200; sort the rows"),
        ({"timesteps": (800.0, 600.0, 400.0, 200.0, 0.0)}, "must be distinct and ascend, found 800 before 600; sort the rows"),
        ({"timesteps": (0.0, 0.2, 0.4, 0.6, 0.8)}, "are 0 … 0.8, but the sampler sends 800, whose nearest row is for 0.8;"),
        ({"timesteps": (0.0, float("inf"))}, "not a finite number|finite number"),
        ({"timesteps": (0.0, 1e300)}, "less than or equal to 1000000000"),
        ({"timesteps": ()}, "timesteps = .*at least 1 item"),
        ({"linears": {"transformer_blocks.1.ff.net.0.projj": Entry(activation=EIGHT)}}, "is of no linear of the"),
        (
            {"linears": {FC1: Entry(activation=EIGHT, weight=Codes(bits=4, signed=True))}},
            "weight.codes reaches .* its codes are 4 bits signed, -8 … 7",
        ),
        ({"format": "dq-export import 2"}, "format = 'dq-export import 2'"),
        ({"method": ""}, "method = "),
    ],
)  # fmt: skip
def test_a_header_that_does_not_fit_is_named(
    changes: dict[str, Any], message: str, tiny: Reference, stored: tuple[Header, Tensors], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        tables_in(tiny, save(tmp_path / "tables", header_of(stored, **changes)))


def test_an_unknown_linear_is_named_with_the_nearest(tiny: Reference, stored: tuple[Header, Tensors], tmp_path: Path) -> None:
    header, tensors = only(stored, FC1)
    other = "blocks.1.ff.net.0.proj"
    renamed = {key.replace(FC1, other): value for key, value in tensors.items()}
    path = save(tmp_path / "tables", (header.model_copy(update={"linears": {other: header.linears[FC1]}}), renamed))
    with pytest.raises(RecipeError, match=rf"'{other}' is not a linear of the network. Did you mean '.*ff.net.0.proj'"):
        tables_in(tiny, path)


def test_zero_points_that_wander_are_refused(tiny: Reference, tmp_path: Path) -> None:
    timesteps = tuple(sorted(tiny.timesteps(STEPS)))
    tensors = {
        f"{FC2}.activation.scale": np.ones(STEPS, F32),
        f"{FC2}.activation.zero_point": np.linspace(0, 255, STEPS).astype(F32),
    }
    header = Header(method="x", timesteps=timesteps, linears={FC2: Entry(activation=Codes(bits=8, signed=False))})
    path = save(tmp_path / "tables", (header, tensors))
    with pytest.raises(
        RecipeError, match=r"no one shift suits the zero points of all timesteps: at timestep .* would grow by 100%"
    ):
        tables_in(tiny, path)


def test_a_shift_where_none_folds_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    tiny: Any = load_reference(str(tiny_folder))
    sites = tuple(replace(site, fold=replace(site.fold, shifts=False)) for site in tiny.sites)
    tiny.structure = replace(tiny.structure, sites=sites)
    timesteps = tuple(sorted(tiny.timesteps(STEPS)))
    tensors = {f"{FC2}.activation.scale": np.ones(STEPS, F32)}
    header = Header(method="x", timesteps=timesteps, linears={FC2: Entry(activation=Codes(bits=8, signed=False))})
    path = save(tmp_path / "one", (header, tensors))
    with pytest.raises(RecipeError, match=r"its input cannot absorb a shift: at timestep .* would grow by 100%"):
        tables_in(tiny, path)
    tensors[f"{FC2}.in_shift"] = np.ones(128, F32)
    path = save(tmp_path / "two", (header, tensors))
    with pytest.raises(RecipeError, match="its input cannot have an 'in_shift', because a Mul on all tokens cannot absorb it"):
        tables_in(tiny, path)


def test_a_scale_for_each_element_of_a_patch_is_refused(tmp_path: Path) -> None:
    """A convolution's input is scaled by channel."""
    unet = load_reference(str(save_ddpm(tmp_path / "model")))
    name = "mid_block.resnets.0.conv1"
    width = unet.linears[name].width
    header = Header(method="x", timesteps=tuple(sorted(unet.timesteps(STEPS))), linears={name: Entry()})
    scales = {"one": np.arange(1, width + 1), "two": np.arange(1, width // 9 + 1).repeat(9)}
    paths = {key: save(tmp_path / key, (header, {f"{name}.in_scale": scale.astype(F32)})) for key, scale in scales.items()}
    with pytest.raises(RecipeError, match=f"'{name}.in_scale' differs within a patch; give the 9 elements of each channel one"):
        tables_in(unet, paths["one"])
    assert tables_in(unet, paths["two"]).scalings[name].in_scale.tolist() == scales["two"].tolist()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "not readable as safetensors"), (None, "no such file"), ({}, "no 'dq_export_import' in its metadata")],
)
def test_another_file_is_refused(content: Any, message: str, tiny: Reference, tmp_path: Path) -> None:
    from dq_export.core.tensor_file import save_tensors

    path = tmp_path / "tables"
    if isinstance(content, dict):
        save_tensors(path, {"a": np.ones(3)})
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        tables_in(tiny, path)
