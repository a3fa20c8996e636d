"""The float graph: traced from three blocks, with the checkpoint's own weights."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import calibrate_tiny, feed_of, recipe_of, run_onnx, save_tiny, sqnr
from safetensors.numpy import load_file, save_file

from dq_export.core.recipe import Recipe
from dq_export.families import structure, torch_export, torch_network
from dq_export.families.float_graph import load
from dq_export.families.reference import Reference
from dq_export.families.source import load_reference
from dq_export.passes.base import GraphError
from dq_export.passes.match import linears
from dq_export.passes.pipeline import canonical_passes
from dq_export.pipeline import run
from dq_export.stages.quantize import quantize_graph

BLOCKS = 5


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("deep"), num_layers=BLOCKS)


def exported(folder: Path, target: Path) -> ir.Model:
    target.mkdir(parents=True)
    load_reference(str(folder)).export_onnx(target / "model.onnx", shared=True)
    return load(target / "model.onnx")


@pytest.mark.slow
def test_repeated_blocks_are_those_of_tracing_them_all(deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    feed = feed_of(load_reference(str(deep)))
    repeated = exported(deep, tmp_path / "repeated")
    with monkeypatch.context() as patch:
        patch.setattr(torch_export, "repeat_block", lambda *arguments: False)  # as for a network whose blocks are not alike
        traced = exported(deep, tmp_path / "traced")
    assert [node.op_type for node in repeated.graph] == [node.op_type for node in traced.graph]
    names = {name for name in traced.graph.initializers if name.startswith("transformer.")}
    assert {name for name in repeated.graph.initializers if name.startswith("transformer.")} == names
    np.testing.assert_array_equal(
        run_onnx(tmp_path / "repeated" / "model.onnx", feed), run_onnx(tmp_path / "traced" / "model.onnx", feed)
    )


def test_blocks_that_differ_are_all_traced(deep: Path, tmp_path: Path) -> None:
    import torch

    reference: Any = load_reference(str(deep))
    reference.model.transformer_blocks[2].norm3 = torch.nn.Identity()
    feed = feed_of(reference)
    reference.export_onnx(tmp_path / "model.onnx", shared=True)
    exact, actual = reference.forward(feed), run_onnx(tmp_path / "model.onnx", feed)
    np.testing.assert_allclose(actual, exact, rtol=0, atol=1e-5 * np.abs(exact).max())


@pytest.mark.parametrize("blocks", [1, 2, 3, 4])
def test_a_network_of_any_number_of_blocks_is_exported(blocks: int, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, num_layers=blocks)
    exported(folder, tmp_path / "float")
    reference = load_reference(str(folder))
    feed = feed_of(reference, 999)
    assert sqnr(reference.forward(feed), run_onnx(tmp_path / "float" / "model.onnx", feed)) > 120  # float32: 125-140


@pytest.mark.parametrize("timestep", [1, 500, 999])
def test_large_weights_do_not_make_rounding_loud(timestep: int, tmp_path: Path) -> None:
    """The graph's timestep embedding is PyTorch's to the last bits, so no block has an error to enlarge."""
    folder = save_tiny(tmp_path, num_layers=6, attention_head_dim=32)
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: 3 * value for name, value in load_file(path).items()}, path, metadata={"format": "pt"})
    exported(folder, tmp_path / "float")
    reference = load_reference(str(folder))
    feed = feed_of(reference, timestep)
    states = feed["hidden_states"]
    nearest = reference.forward({**feed, "hidden_states": np.nextafter(states, np.float32(np.inf))})
    exact = reference.forward(feed)
    # A last bit of the input is one rounding; the graph has one for each of some hundred nodes.
    assert sqnr(exact, run_onnx(tmp_path / "float" / "model.onnx", feed)) > sqnr(exact, nearest) - 15


def test_the_graph_does_not_name_the_machine_that_it_was_made_on(deep: Path, tmp_path: Path) -> None:
    import torch

    exported(deep, tmp_path / "out")
    content = (tmp_path / "out" / "model.onnx").read_bytes()
    assert str(Path(torch.__file__).parent).encode() not in content


def test_float32_weights_are_a_link_to_the_checkpoint(deep: Path, tmp_path: Path) -> None:
    exported(deep, tmp_path / "out")
    link = tmp_path / "out" / "diffusion_pytorch_model.safetensors"
    assert os.path.samefile(link, deep / "transformer" / link.name)
    written = (tmp_path / "out" / "model.onnx.data").stat().st_size
    assert written < link.stat().st_size / 10, "only what the checkpoint does not hold"


def test_where_there_are_no_links_the_weights_are_copied(deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: object, target: object) -> None:
        raise OSError("Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    exported(deep, tmp_path / "out")
    copy = tmp_path / "out" / "diffusion_pytorch_model.safetensors"
    assert copy.stat().st_nlink == 1
    assert copy.read_bytes() == (deep / "transformer" / copy.name).read_bytes()


def test_half_precision_weights_are_written_as_float32(deep: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(deep, tmp_path / "half")
    path = tmp_path / "half" / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: value.half() for name, value in load_file(path).items()}, path, metadata={"format": "pt"})
    exported(tmp_path / "half", tmp_path / "out")
    assert not (tmp_path / "out" / path.name).exists()
    reference = load_reference(str(tmp_path / "half"))
    feed = feed_of(reference)
    exact = reference.forward(feed)
    np.testing.assert_allclose(run_onnx(tmp_path / "out" / "model.onnx", feed), exact, rtol=0, atol=1e-5 * np.abs(exact).max())


def test_every_linear_of_every_block_is_named_as_in_pytorch(deep: Path, tmp_path: Path) -> None:
    from dq_export.passes.base import run_passes
    from dq_export.passes.canonical.fold_transpose import FoldTranspose

    reference = load_reference(str(deep))
    model = exported(deep, tmp_path / "out")
    run_passes(model, [FoldTranspose()])
    actual = linears(model)
    import torch

    modules = reference.model.named_modules()  # type: ignore[attr-defined]
    assert set(actual) == {name for name, module in modules if isinstance(module, torch.nn.Linear)}
    for name, linear in actual.items():
        np.testing.assert_array_equal(linear.weight(), reference.weight(name))


@pytest.mark.parametrize("damage", ["garbage", "cut weights", "no weights", "wide shape"])
def test_a_damaged_float_graph_is_refused_in_one_line(damage: str, deep: Path, tmp_path: Path) -> None:
    exported(deep, tmp_path / "out")
    file = tmp_path / "out" / "model.onnx"
    data = next(path for path in file.parent.iterdir() if path.suffix == ".safetensors")
    if damage == "garbage":
        file.write_bytes(b"\xff" * 99)
    elif damage == "cut weights":
        data.unlink()
        data.write_bytes(b"short")
    elif damage == "no weights":
        data.unlink()
    else:
        content = onnx.load(file, load_external_data=False)
        next(item for item in content.graph.initializer if item.external_data).dims[0] = 1 << 20
        file.write_bytes(content.SerializeToString())
    with pytest.raises(GraphError, match=r"model\.onnx: not the float graph that an export writes; remove its folder") as error:
        load(file)
    assert "\n" not in str(error.value)


def test_text_that_is_no_utf8_is_refused_when_the_graph_is_written(tiny: Reference, tiny_onnx: Path, tmp_path: Path) -> None:
    result, assigned = calibrate_tiny(tiny, recipe_of(tiny))
    for file in tiny_onnx.parent.iterdir():
        shutil.copyfile(file, tmp_path / file.name)
    source = tmp_path / tiny_onnx.name
    source.write_bytes(source.read_bytes().replace(b"node_add", b"node_ad\xcf"))
    with pytest.raises(GraphError, match=r"float\.onnx: not the float graph"):
        quantize_graph(source, tmp_path / "model.onnx", canonical_passes(result, assigned))


@pytest.mark.parametrize(
    ("options", "timesteps"),
    [({"timesteps": "shared"}, "shared"), ({"timesteps": "per-sample"}, "per-sample"), ({"triton": True}, "per-sample")],
    ids=["shared", "per-sample", "triton"],
)
def test_one_trace_serves_the_structure_and_the_graph(
    options: dict[str, Any], timesteps: str, tiny_folder: Path, tiny: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traces = []

    def traced(*words: Any, shared: bool) -> ir.Model:
        traces.append(shared)
        return torch_export.export_graph(*words, shared=shared)

    monkeypatch.setattr(torch_network, "export_graph", traced)
    monkeypatch.setattr(structure, "STRUCTURES", {})  # of this process's other tests
    run(Recipe.parse({"model": str(tiny_folder), **options}, "test"), tmp_path / "out", until="float")
    assert traces == [timesteps == "shared"]
    (entry,) = structure.STRUCTURES.values()
    assert entry.sites == tiny.sites
