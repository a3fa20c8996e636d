"""Files in the layouts that trainers publish, converted, and taken by whole exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import convert_efficientdm
import convert_qdit
import convert_quest
import convert_tdq
import numpy as np
import onnx_ir as ir
import pytest
import torch
from conftest import QUICK, feed_of, recipe_of, run_onnx, sqnr

import dq_export
from dq_export.calibration.table_checks import centred_codes
from dq_export.calibration.table_reader import read_tables
from dq_export.calibration.tables import Tables
from dq_export.core.recipe import Recipe, RecipeError
from dq_export.core.table_file import load_table_file
from dq_export.families.reference import Reference

T = 4
BLOCKS = tuple(
    f"transformer_blocks.{i}.{name}" for i in (0, 1) for name in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "ff.net.0.proj")
)
NAME = BLOCKS[-1]


def tables_of(tiny: Reference, path: Path, **options: Any) -> Tables:
    recipe = recipe_of(tiny, **options)
    return read_tables(path, tiny, recipe.assign(tiny.linears), recipe, tiny.timesteps(T))


def rising(tiny: Reference) -> str:
    return ",".join(map(str, sorted(tiny.timesteps(T))))


def save(path: Path, state: dict[str, Any]) -> str:
    torch.save(state, path)
    return str(path)


def steps_of(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def efficientdm(tiny: Reference, bits: int) -> dict[str, Any]:
    """A layer of its QuantModel for each linear: packed weights, low-rank matrices, tables whose last row is the first call's."""
    torch.manual_seed(0)
    state: dict[str, Any] = {}
    for name in BLOCKS:
        module, weight = f"model.{name}", torch.from_numpy(tiny.weight(name).copy())
        delta, zero = ranges(weight, bits)
        codes = ((weight / delta).round() + zero).clamp(0, 2**bits - 1).to(torch.uint8)
        codes_of_byte = 8 // bits
        packed = sum(codes[j::codes_of_byte].to(torch.int32) << (bits * j) for j in range(codes_of_byte))
        down, up = 0.02 * torch.randn(4, weight.shape[1]), 0.1 * torch.randn(len(weight), 4)
        step, point = ranges((codes - zero) * delta + up @ down, bits)
        state |= {
            f"{module}.weight": packed.to(torch.uint8),  # type: ignore[union-attr]
            f"{module}.bias": torch.from_numpy(tiny.bias(name).copy()),
            f"{module}.intn_dequantizer.delta": delta,
            f"{module}.intn_dequantizer.zero_point": zero,
            f"{module}.loraA.weight": down,
            f"{module}.loraB.weight": up,
            f"{module}.weight_quantizer.delta": step,
            f"{module}.weight_quantizer.zero_point": point,
            f"{module}.act_quantizer.delta_list": torch.linspace(0.02, 0.03, T) * 16 / 2 ** (bits - 4),
            f"{module}.act_quantizer.zp_list": torch.full((T,), 2.0 ** (bits - 1) - 0.3),
        }
    return state | {"model.conv.act_quantizer.delta_list": torch.ones(T), "model.conv.loraA.weight": torch.ones(4, 3, 3, 3)}


def ranges(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Steps and zero points [out, 1] from each row's least to its greatest number."""
    low, high = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
    delta = (high - low) / (2**bits - 1)
    return delta, (-low / delta).round()


def merged(state: dict[str, Any], tiny: Reference, name: str, bits: int) -> np.ndarray[Any, Any]:
    """What EfficientDM multiplies by."""
    part = {key.removeprefix(f"model.{name}."): value for key, value in state.items()}
    delta, zero = ranges(torch.from_numpy(tiny.weight(name).copy()), bits)
    codes = ((torch.from_numpy(tiny.weight(name).copy()) / delta).round() + zero).clamp(0, 2**bits - 1)
    whole = (codes - zero) * delta + part["loraB.weight"] @ part["loraA.weight"]
    step, point = part["weight_quantizer.delta"], part["weight_quantizer.zero_point"]
    return (((whole / step).round() + point).clamp(0, 2**bits - 1) - point).numpy() * step.numpy()


def test_efficientdm(tiny: Reference, tiny_folder: Path, tmp_path: Path) -> None:
    state = efficientdm(tiny, 4)
    words = [save(tmp_path / "a.pth", state), str(tmp_path / "tables"), "--timesteps", rising(tiny), "--rename", "^model\\.="]
    convert_efficientdm.main([*words, "--activation-bits", "4"])
    file = load_table_file(tmp_path / "tables")
    assert set(file.header.linears) == set(BLOCKS)
    weight = centred_codes(file, NAME) * file.read(NAME, "weight.scale")[:, None]
    np.testing.assert_allclose(weight, merged(state, tiny, NAME, 4), atol=1e-6)
    with pytest.raises(
        RecipeError, match=r"weight.codes' has the range .* int4 holds -7 … 7: give it a rule with weights of more bits"
    ):
        tables_of(tiny, tmp_path / "tables", bits="w4a4", group_size=0)
    convert_efficientdm.main([*words, "--activation-bits", "4", "--float-weights"])
    np.testing.assert_allclose(load_table_file(tmp_path / "tables").read(NAME, "weight"), weight, atol=1e-6)
    table = tables_of(tiny, tmp_path / "tables", bits="w4a4", group_size=0).activations[NAME]
    np.testing.assert_allclose([table.at(t) for t in sorted(tiny.timesteps(T))], 16 * np.linspace(0.02, 0.03, T), rtol=1e-6)
    options = {**QUICK, "bits": "w4a4", "group_size": 0}
    dq_export.build(model=str(tiny_folder), output_dir=tmp_path / "out", tables=str(tmp_path / "tables"), **options)
    assert np.isfinite(run_onnx(tmp_path / "out" / "model.onnx", feed_of(tiny))).all()


def test_weights_of_4_bits_lie_exactly_in_codes_of_8(tiny: Reference, tiny_folder: Path, tmp_path: Path) -> None:
    """With their zero points: an integer GEMM of 8 bits computes what EfficientDM trained."""
    state = efficientdm(tiny, 4)
    for key in state:
        if key.endswith("delta_list"):
            state[key] = state[key] / 16
        if key.endswith("zp_list"):
            state[key] = torch.full((T,), 127.7)
    words = [save(tmp_path / "a.pth", state), str(tmp_path / "tables"), "--timesteps", rising(tiny), "--rename", "^model\\.="]
    convert_efficientdm.main([*words, "--activation-bits", "8"])
    dq_export.build(model=str(tiny_folder), output_dir=tmp_path / "out", tables=str(tmp_path / "tables"), **QUICK)
    stored = {
        name: value.const_value.numpy() for name, value in ir.load(tmp_path / "out" / "model.onnx").graph.initializers.items()
    }
    weight = stored[f"{NAME}.weight_codes"].T * stored[f"{NAME}.weight_scale"][:, None]
    np.testing.assert_allclose(weight, merged(state, tiny, NAME, 4), atol=1e-6)
    assert 7 < np.abs(stored[f"{NAME}.weight_codes"]).max() <= 15


def quest(tiny: Reference, channels: bool) -> dict[str, Any]:
    """A layer of its QuantModel for each linear: float weights with their step, tables [T, 1, C] in the order of sampling."""
    torch.manual_seed(0)
    state: dict[str, Any] = {}
    for name in BLOCKS:
        module, weight = f"model.{name}", torch.from_numpy(tiny.weight(name).copy()) + 0.01 * torch.randn(tiny.weight(name).shape)
        delta, zero = ranges(weight, 8)
        width = weight.shape[1]
        differences = torch.linspace(0.5, 2.0, width) if channels else torch.ones(width)
        lists = torch.linspace(0.03, 0.02, T)[:, None, None] * differences
        state |= {
            f"{module}.weight": weight,
            f"{module}.bias": torch.from_numpy(tiny.bias(name).copy()),
            f"{module}.weight_quantizer.delta": delta,
            f"{module}.weight_quantizer.zero_point": zero,
            f"{module}.act_quantizer.delta_list": lists,
            f"{module}.act_quantizer.zero_point_list": torch.full((T, 1, width), 120.0),
        }
    return state


@pytest.mark.parametrize("channels", [False, True])
def test_quest(channels: bool, tiny: Reference, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = quest(tiny, channels)
    sampled = ",".join(map(str, tiny.timesteps(T)))  # from the largest on
    words = [save(tmp_path / "a.pth", state), str(tmp_path / "tables"), "--timesteps", sampled, "--rename", "^model\\.="]
    convert_quest.main([*words, "--activation-bits", "8", "--weight-bits", "8"])
    file = load_table_file(tmp_path / "tables")
    if channels:
        product = file.read(NAME, "activation.scale")[:, None] * file.read(NAME, "in_scale")
        np.testing.assert_allclose(product[::-1], state[f"model.{NAME}.act_quantizer.delta_list"][:, 0], rtol=1e-5)
        assert "steps 0% apart, ranges by" in capsys.readouterr().out
        expected = state[f"model.{NAME}.weight"].numpy() * file.read(NAME, "in_scale")
        np.testing.assert_allclose(file.read(NAME, "weight"), expected, rtol=1e-6)
        dq_export.build(model=str(tiny_folder), output_dir=tmp_path / "out", tables=str(tmp_path / "tables"), **QUICK)
        feed = feed_of(tiny)
        assert sqnr(tiny.forward(feed), run_onnx(tmp_path / "out" / "model.onnx", feed)) > 15
    else:
        np.testing.assert_allclose(file.read(NAME, "activation.scale"), np.linspace(0.02, 0.03, T), rtol=1e-6)
        np.testing.assert_array_equal(file.read(NAME, "activation.zero_point"), 120)
        before = centred_codes(file, NAME)
        with pytest.raises(RecipeError, match=r"weight.codes' has the range .* around its zero point; int8 holds -127 … 127"):
            tables_of(tiny, tmp_path / "tables")
        convert_quest.main([*words, "--activation-bits", "8", "--weight-bits", "8", "--float-weights"])
        assert tables_of(tiny, tmp_path / "tables").has_weight(NAME)
        weight, delta = state[f"model.{NAME}.weight"], state[f"model.{NAME}.weight_quantizer.delta"]
        state[f"model.{NAME}.weight_quantizer.alpha"] = -torch.ones_like(weight)  # adaptive rounding: all down
        save(tmp_path / "a.pth", state)
        convert_quest.main([*words, "--activation-bits", "8", "--weight-bits", "8"])
        after = centred_codes(load_table_file(tmp_path / "tables"), NAME)
        lowest = -state[f"model.{NAME}.weight_quantizer.zero_point"].numpy()
        np.testing.assert_array_equal(after, np.maximum((weight / delta).floor().numpy(), lowest))
        assert (after != before).any()


def test_modules_that_read_one_input_get_a_table_that_covers_theirs(tiny: Reference, tmp_path: Path) -> None:
    state = {name: steps_of(1, 2, 3, 4) for name in BLOCKS} | {"transformer_blocks.0.attn1.to_k": steps_of(2, 1, 3, 4)}
    words = [save(tmp_path / "a.pth", state), str(tmp_path / "tables"), "--timesteps", rising(tiny), "--activation-bits", "8"]
    convert_tdq.main(words)
    file = load_table_file(tmp_path / "tables")
    for letter in "qkv":
        np.testing.assert_array_equal(file.read(f"transformer_blocks.0.attn1.to_{letter}", "activation.scale"), [2, 2, 3, 4])
        np.testing.assert_array_equal(file.read(f"transformer_blocks.1.attn1.to_{letter}", "activation.scale"), [1, 2, 3, 4])
    assert tables_of(tiny, tmp_path / "tables").activations


def test_tdq(tiny: Reference, tiny_folder: Path, tmp_path: Path) -> None:
    """With steps that are evaluated from calibration's own, the engine is as good as calibration's."""
    state = {f"net.{name}": torch.linspace(0.03, 0.04, T) for name in (*BLOCKS, "transformer_blocks.1.ff.net.2")}
    words = [save(tmp_path / "a.pth", state), str(tmp_path / "tables"), "--timesteps", rising(tiny), "--activation-bits", "8"]
    convert_tdq.main([*words, "--rename", "^net\\.=", "--unsigned", "ff.net.2", "--skip", "blocks.0"])
    file = load_table_file(tmp_path / "tables")
    assert [entry.activation.signed for entry in file.header.linears.values() if entry.activation] == [True] * 4 + [False]
    dq_export.build(model=str(tiny_folder), output_dir=tmp_path / "out", tables=str(tmp_path / "tables"), **QUICK)
    feed = feed_of(tiny)
    assert sqnr(tiny.forward(feed), run_onnx(tmp_path / "out" / "model.onnx", feed)) > 20


@pytest.mark.parametrize("granularity", ["token", "token-group"])
def test_qdit(granularity: str, tiny: Reference, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "log").write_text(
        "cand: [16, 16, 16, 16, 16, 16, 16, 16], loss: 7.1\ncand: [16, 16, 32, 64, 32, 16, 16, 128], loss: 6.4\n"
    )
    words = [str(tmp_path / "log"), str(tmp_path / "recipe.yaml"), "--model", str(tiny_folder), "--granularity", granularity]
    convert_qdit.main(words)
    recipe = Recipe.load(tmp_path / "recipe.yaml")
    assigned = recipe.assign(tiny.linears)
    actual = [
        assigned[f"transformer_blocks.{i}.{name}"].scheme.weight.size
        for i in (0, 1)
        for name in ("attn1.to_k", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")
    ]  # type: ignore[union-attr]
    assert actual == [16, 16, 32, 64, 32, 16, 16, 128]
    values = {key: value for key, value in recipe.model_dump(mode="json").items() if value is not None}
    dq_export.build(output_dir=tmp_path / "out", **{**values, **QUICK})
    assert assigned["transformer_blocks.0.ff.net.2"].scheme.activation.granularity == granularity  # type: ignore[union-attr]
    feed = feed_of(tiny)
    assert sqnr(tiny.forward(feed), run_onnx(tmp_path / "out" / "model.onnx", feed)) > 10


def test_a_pickle_that_would_run_code_is_not_loaded(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pth", {"a": torch.nn.Linear(2, 2)})
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        convert_tdq.main([path, str(tmp_path / "tables"), "--timesteps", "0:4:1", "--activation-bits", "8"])


def test_other_numbers_of_rows_end_in_a_line(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pth", {"a": torch.ones(3)})
    with pytest.raises(SystemExit, match=r"a.activation.scale has 3 rows, and --timesteps are 4"):
        convert_tdq.main([path, str(tmp_path / "tables"), "--timesteps", "0:4:1", "--activation-bits", "8"])
    (tmp_path / "log").write_text("[1, 2, 3]")
    with pytest.raises(SystemExit, match="3 group sizes; expected four a block"):
        convert_qdit.main([str(tmp_path / "log"), str(tmp_path / "recipe.yaml")])
