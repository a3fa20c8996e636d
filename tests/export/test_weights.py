"""Files of weights: which are read, in every format that is published, and what the restricted reader refuses."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import feed_of, run_onnx
from safetensors.torch import load_file, save_file

from dq_export.families.float_graph import load
from dq_export.families.reference import ModelError
from dq_export.families.source import load_reference, locate
from dq_export.families.tensors import read_tensors, stored
from dq_export.families.weights import find_weights

STEM = "diffusion_pytorch_model"


@pytest.fixture
def model(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny pipeline, to be changed."""
    shutil.copytree(tiny_folder, tmp_path / "model")
    return tmp_path / "model"


def rewrite(model: Path, *names: str, index: str = "", half: bool = False, **options: Any) -> dict[str, Any]:
    """Store the transformer's tensors in other files: spread over `names`, with an index if one is named."""
    folder = model / "transformer"
    (path,) = folder.glob("*.safetensors")
    tensors = {name: value.half() if half else value for name, value in load_file(path).items()}
    path.unlink()
    places = {name: names[i % len(names)] for i, name in enumerate(tensors)}
    for file in names:
        part = {name: value for name, value in tensors.items() if places[name] == file}
        if file.endswith(".bin"):
            torch.save(part, folder / file, **options)
        else:
            save_file(part, folder / file, metadata={"format": "pt"})
    if index:
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return tensors


def two(suffix: str, variant: str = "") -> tuple[str, str]:
    start = f"{STEM}.{variant}" if variant else STEM
    return f"{start}-00001-of-00002.{suffix}", f"{start}-00002-of-00002.{suffix}"


@pytest.mark.parametrize(
    ("names", "index", "options"),
    [
        ([f"{STEM}.bin"], "", {}),
        ([f"{STEM}.bin"], "", {"_use_new_zipfile_serialization": False}),
        (two("bin"), f"{STEM}.bin.index.json", {}),
        (two("safetensors"), f"{STEM}.safetensors.index.json", {}),
        ((f"{STEM}-00001-of-00002.safetensors", "rest.bin"), f"{STEM}.safetensors.index.json", {}),
        ([f"{STEM}.ema.bin"], "", {}),
    ],
    ids=["bin", "old bin", "bin in shards", "safetensors in shards", "both in one index", "bin of a variant"],
)
def test_the_same_weights_in_other_files_are_the_same_model(
    names: tuple[str, ...], index: str, options: Any, model: Path, tiny: Any
) -> None:
    rewrite(model, *names, index=index, **options)
    assert load_reference(str(model)).digest == tiny.digest


@pytest.mark.parametrize(
    ("names", "index"),
    [
        ([f"{STEM}.fp16.safetensors"], ""),
        ([f"{STEM}.fp16.bin"], ""),
        (two("safetensors", "fp16"), f"{STEM}.safetensors.index.fp16.json"),
        (two("safetensors", "fp16"), f"{STEM}.safetensors.fp16.index.json"),
        (two("bin", "fp16"), f"{STEM}.bin.index.fp16.json"),
    ],
)
def test_a_variant_is_read_where_it_is_all_there_is(names: tuple[str, ...], index: str, model: Path) -> None:
    tensors = rewrite(model, *names, index=index, half=True)
    assert locate(str(model)).variant == "fp16"
    name = "transformer_blocks.0.attn1.to_q"
    np.testing.assert_array_equal(load_reference(str(model)).weight(name), tensors[f"{name}.weight"].float().numpy())


def test_of_several_files_one_is_read_and_the_rest_may_be_anything(model: Path) -> None:
    folder = model / "transformer"
    assert find_weights(folder).files == (folder / f"{STEM}.safetensors",)
    for name in (f"{STEM}.bin", f"{STEM}.fp16.safetensors", f"{STEM}.fp16.bin", f"{STEM}.non_ema.bin", "optimizer.bin"):
        (folder / name).write_bytes(b"not read")
    assert find_weights(folder).files == (folder / f"{STEM}.safetensors",)
    assert find_weights(folder, "fp16").files == (folder / f"{STEM}.fp16.safetensors",)
    assert find_weights(folder, "non_ema").files == (folder / f"{STEM}.non_ema.bin",)
    assert load_reference(str(model)).sampler
    with pytest.raises(ModelError, match=r"no weights of variant 'fp61'; there is one without a variant, fp16, non_ema.* 'fp16'"):
        locate(str(model), variant="fp61")
    (folder / f"{STEM}.safetensors").unlink()
    assert find_weights(folder).files == (folder / f"{STEM}.bin",), "a pickle without a variant goes before other weights"
    (folder / f"{STEM}.bin").unlink()
    with pytest.raises(ModelError, match=r"weights of several variants \(fp16, non_ema\); choose one with --variant"):
        locate(str(model))


def test_another_parts_variant_is_taken_where_it_is_there(model: Path) -> None:
    with pytest.raises(ModelError, match="no weights of variant 'fp16'"):
        find_weights(model / "transformer", "fp16")
    assert find_weights(model / "transformer", "fp16", required=False).variant == ""


class Runs:
    """A pickle that makes a file when it is loaded the usual way."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


class Large:
    """A pickle of a gigabyte of nothing, which torch's restricted loader would make."""

    def __reduce__(self) -> Any:
        return bytearray, (1 << 30,)


def squeeze(path: Path) -> None:
    """Compress a zip file's records, as torch.save never does."""
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def unequal_to(content: Any, after: Callable[[Path], None] = lambda path: None) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        torch.save(content, path)
        after(path)

    return make


WEIGHT = {"a": torch.ones(3)}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: torch.save({"a": Runs(path.parent / "ran")}, path), r"refers to 'posix\.mkdir', which no tensor needs"),
        (lambda path: torch.save(Runs(path.parent / "ran"), path, _use_new_zipfile_serialization=False), r"'posix\.mkdir'"),
        (unequal_to({"a": Large()}), r"refers to '__builtin__\.bytearray'"),
        (unequal_to(torch.nn.Linear(2, 2)), r"refers to 'torch\.nn\.modules\.linear\.Linear'"),
        (unequal_to({"state_dict": WEIGHT}), "'state_dict' is 'dict'; expected a dense tensor for each name"),
        (unequal_to([torch.ones(3)]), "holds 'list'; expected tensors by name"),
        (unequal_to({1: torch.ones(3)}), "holds 'dict'; expected tensors by name"),
        (unequal_to({"a": torch.ones(3).to_sparse()}), r"refers to 'torch\._utils\._rebuild_sparse_tensor'"),
        (
            unequal_to({"a": torch.ones(1).expand(1 << 20, 1 << 20)}),
            r"shape \(1048576, 1048576\) and repeats fewer stored numbers",
        ),
        (unequal_to(WEIGHT, squeeze), "its records are compressed; save it anew with torch.save"),
        (unequal_to(WEIGHT, shorten), "cut short or damaged"),
        (lambda path: path.write_bytes(b""), "empty; copy or download it again"),
        (lambda path: path.write_bytes(b"\x80\x02junk" * 9), r"damaged, or not a file of torch\.save"),
        (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "run `git lfs pull`"),
        (lambda path: os.mkfifo(path), "a link to nothing, or not a regular file"),
        (lambda path: path.symlink_to("../../blobs/gone"), "a link to nothing, or not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "a link to nothing, or not a regular file"),
    ],
)
@pytest.mark.parametrize("read", [read_tensors, stored], ids=["tensors", "places"])
def test_a_pickle_of_anything_but_tensors_by_name_is_refused(spoil: Any, message: str, read: Any, tmp_path: Path) -> None:
    path = tmp_path / f"{STEM}.bin"
    spoil(path)
    with pytest.raises(ModelError, match=message) as error:
        read(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_what_only_torch_refuses_is_refused_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import re

    from dq_export.families import tensors

    torch.save({"a": Runs(tmp_path / "ran")}, tmp_path / "x.bin")
    monkeypatch.setattr(tensors, "PLAIN", re.compile(".*"))
    with pytest.raises(ModelError, match=r"torch's restricted loader refuses it \(.*posix\.mkdir.*\)"):
        read_tensors(tmp_path / "x.bin")
    assert not (tmp_path / "ran").exists()


def test_an_index_is_no_back_door_for_pickles(model: Path) -> None:
    rewrite(model, *two("safetensors"), index=f"{STEM}.safetensors.index.json")
    index = model / "transformer" / f"{STEM}.safetensors.index.json"
    torch.save({"a": Runs(model / "ran")}, model / "transformer" / "x.bin")
    index.write_text(index.read_text().replace(two("safetensors")[1], "x.bin"))
    with pytest.raises(ModelError, match=r"x\.bin: this pickle refers to 'posix\.mkdir'"):
        load_reference(str(model))
    assert not (model / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weight_map": {"a": "../vae/x.safetensors"}}, r"tensor 'a' lies in '\.\./vae/x\.safetensors'; expected the name of a"),
        ({"weight_map": {"a": "/etc/x.bin"}}, r"lies in '/etc/x\.bin'"),
        ({"weight_map": {"a": "x.pt"}}, r"lies in 'x\.pt'"),
        ({"weight_map": {"a": 3}}, "lies in 3"),
        ({"weight_map": {"a": "gone.safetensors"}}, r"names 'gone\.safetensors', 1 of 1 files that are not there"),
        ({"weight_map": {}}, "expected a weight_map of tensor names to file names, found {}"),
        ([], "expected a weight_map"),
        ("{", "not readable as JSON"),
    ],
)
def test_an_index_of_other_files_is_refused(content: Any, message: str, model: Path) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (model / "transformer" / f"{STEM}.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match=message):
        locate(str(model))


def test_a_tensor_that_stands_in_two_shards_is_refused(model: Path) -> None:
    rewrite(model, *two("safetensors"), index=f"{STEM}.safetensors.index.json")
    one, other = (model / "transformer" / name for name in two("safetensors"))
    save_file({**load_file(one), **load_file(other)}, other, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="stands twice in the checkpoint"):
        load_reference(str(model))


def test_places_in_a_file_are_those_of_its_bytes(tmp_path: Path) -> None:
    whole = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tensors = {"whole": whole, "part": whole[2:], "turned": whole.t(), "half": whole.half()}
    torch.save(tensors, tmp_path / "x.bin")
    save_file({"whole": whole, "half": whole.half()}, tmp_path / "x.safetensors")
    for file, names in (("x.bin", ["whole", "part", "half"]), ("x.safetensors", ["whole", "half"])):
        content = (tmp_path / file).read_bytes()
        places = stored(tmp_path / file)
        for name in names:
            place, exact = places[name], tensors[name]
            assert (place.float32, place.shape) == (exact.dtype == torch.float32, tuple(exact.shape))
            assert place.offset is not None
            assert content[place.offset : place.offset + exact.nbytes] == exact.numpy().tobytes()
    assert stored(tmp_path / "x.bin")["turned"].offset is None


def test_the_float_graph_reads_its_weights_from_a_link_to_the_pickle(model: Path, tmp_path: Path) -> None:
    rewrite(model, f"{STEM}.bin")
    reference = load_reference(str(model))
    (tmp_path / "out").mkdir()
    reference.export_onnx(tmp_path / "out" / "model.onnx", shared=True)
    link = tmp_path / "out" / f"{STEM}.bin"
    assert os.path.samefile(link, model / "transformer" / link.name)
    assert (tmp_path / "out" / "model.onnx.data").stat().st_size < link.stat().st_size / 10
    feed = feed_of(reference)
    exact = reference.forward(feed)
    np.testing.assert_allclose(run_onnx(tmp_path / "out" / "model.onnx", feed), exact, rtol=0, atol=1e-5 * np.abs(exact).max())
    weights = {value.name: value for value in load(tmp_path / "out" / "model.onnx").graph.initializers.values()}
    name = "transformer_blocks.1.ff.net.2"
    actual = weights[f"transformer.{name}.weight"].const_value
    assert actual is not None
    np.testing.assert_array_equal(actual.numpy(), reference.weight(name))


@pytest.mark.parametrize("name", ["x.bin", "old.bin", "x.safetensors"])
def test_any_damage_ends_in_one_line(name: str, tmp_path: Path) -> None:
    import random

    tensors = {f"w{i}": torch.randn(4, i + 2) for i in range(3)}
    save_file(tensors, tmp_path / "x.safetensors")
    torch.save(tensors, tmp_path / "x.bin")
    torch.save(tensors, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    whole, chance, messages = (tmp_path / name).read_bytes(), random.Random(0), []
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(chance.choice([1, 2, 8])):
            start = chance.randrange(min(chance.choice([700, len(content)]), len(content)))
            content[start : start + chance.choice([1, 1, 4])] = chance.randbytes(chance.choice([0, 1, 1, 4]))
        if chance.random() < 0.2:
            del content[chance.randrange(len(content)) :]
        (tmp_path / f"damaged-{name}").write_bytes(content)
        for read in (stored, read_tensors):
            try:
                read(tmp_path / f"damaged-{name}")
            except ModelError as error:
                messages.append(str(error))
    assert len(messages) > 150, "most damage is seen"
    assert not any("\n" in message for message in messages)
