"""Models of the hub: its cache as the hub's own library lays it out, and a hub on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import STAGES, save_tiny
from local_hub import Hub, serving
from safetensors.numpy import load_file
from test_checkpoints import as_published, edit, save_vae

import dq_export
from dq_export.families.hub import needed_files
from dq_export.families.reference import ModelError
from dq_export.families.source import load_reference, locate

STEM = "diffusion_pytorch_model"
COMMIT = "eab87f77abd5aef071a632f08807fbaab0b704d0"
QUICK = {"steps": 3, "calib_size": 1, "parity_size": 1, "min_sqnr": 5}
OLD = {
    "_class_name": "Transformer2DModel", "_diffusers_version": "0.12.0.dev0", "activation_fn": "gelu-approximate",
    "attention_bias": True, "attention_head_dim": 16, "cross_attention_dim": None, "dropout": 0.0, "in_channels": 4,
    "norm_elementwise_affine": False, "norm_num_groups": 32, "norm_type": "ada_norm_zero", "num_attention_heads": 2,
    "num_embeds_ada_norm": 1000, "num_layers": 2, "num_vector_embeds": None, "only_cross_attention": False, "out_channels": 8,
    "patch_size": 2, "sample_size": 8, "upcast_attention": False, "use_linear_projection": False,
}  # fmt: skip
"""config.json of facebook/DiT-XL-2-256's transformer, key for key, with the sizes of a tiny one."""


def publish(today: Path, folder: Path) -> None:
    """A pipeline of today's diffusers in the files of early 2023: pickles, old names, an old configuration."""
    import torch
    from safetensors.torch import load_file as load_torch

    shutil.copytree(today, folder)
    path = folder / "transformer" / f"{STEM}.safetensors"
    torch.save(load_torch(path), path.with_suffix(".bin"))
    path.unlink()
    (folder / "transformer" / "config.json").write_text(json.dumps(OLD))
    as_published(folder / "vae")
    edit(folder / "vae" / "config.json", _diffusers_version="0.12.0.dev0", _name_or_path="stabilityai/sd-vae-ft-ema")
    edit(folder / "scheduler" / "scheduler_config.json", _diffusers_version="0.12.0.dev0", trained_betas=None)
    index = {"_class_name": "DiTPipeline", "_diffusers_version": "0.12.0.dev0", "id2label": {"0": "tench, Tinca tinca"}}
    parts = {"transformer": "Transformer2DModel", "vae": "AutoencoderKL", "scheduler": "DDIMScheduler"}
    (folder / "model_index.json").write_text(json.dumps({**index, **{part: ["diffusers", name] for part, name in parts.items()}}))


def cached(folder: Path, cache: Path, name: str = "facebook--DiT-XL-2-256") -> Path:
    """The folder as the hub's library keeps it: files are links into blobs."""
    model = cache / f"models--{name}"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(COMMIT)
    (model / "blobs").mkdir()
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        blob = model / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copyfile(path, blob)
        link = model / "snapshots" / COMMIT / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return model


@pytest.fixture(scope="module")
def today(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny(tmp_path_factory.mktemp("today"), in_channels=4, out_channels=8, num_embeds_ada_norm=1000)
    save_vae(folder / "vae", latent_channels=4)
    return folder


@pytest.fixture(scope="module")
def home(today: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """HF_HOME with the published model in its cache."""
    home = tmp_path_factory.mktemp("home")
    publish(today, home / "published")
    cached(home / "published", home / "hub")
    return home


def run(home: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", **environment}
    command = [sys.executable, "-m", "dq_export", *words]
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)


def test_the_readmes_command_exports_the_model_as_the_hub_has_it(home: Path, today: Path, tmp_path: Path) -> None:
    """`dq-export --model dit`, and then again from the recipe that it wrote."""
    flags = [word for key, value in QUICK.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    result = run(home, "--model", "dit", "--bits", "w8a8", "--triton", *flags, "-o", str(tmp_path / "hub"))
    assert result.returncode == 0, result.stderr
    dq_export.quantize(model=str(today), output_dir=tmp_path / "plain", triton=True, **QUICK)
    assert (tmp_path / "hub" / "model.onnx.data").read_bytes() == (tmp_path / "plain" / "model.onnx.data").read_bytes()
    assert (tmp_path / "hub" / "model.onnx").read_bytes() == (tmp_path / "plain" / "model.onnx").read_bytes()
    scales, expected = (load_file(tmp_path / name / "calibration.safetensors") for name in ("hub", "plain"))
    assert set(scales) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(scales[name], value)
    assert os.path.samefile(
        tmp_path / "hub" / "float" / f"{STEM}.bin",
        home / "hub/models--facebook--DiT-XL-2-256/snapshots" / COMMIT / f"transformer/{STEM}.bin",
    )
    assert (tmp_path / "hub" / "triton" / "decoder" / "1" / "model.onnx").exists()
    recipe = (tmp_path / "hub" / "recipe.yaml").read_text()
    assert f"model: dit\nrevision: {COMMIT}\n" in recipe
    second = run(home, "--recipe", str(tmp_path / "hub" / "recipe.yaml"), "-o", str(tmp_path / "hub"))
    assert second.returncode == 0, second.stderr
    assert " ".join(second.stderr.split()).count("kept from an earlier run") == len(STAGES)


def test_a_folder_of_the_cache_is_its_snapshot(home: Path, tmp_path: Path) -> None:
    model = tmp_path / "models--owner--name"
    shutil.copytree(home / "hub" / "models--facebook--DiT-XL-2-256", model, symlinks=True)
    assert locate(str(model)).model == str((model / "snapshots" / COMMIT).resolve())
    (model / "refs" / "main").unlink()
    assert locate(str(model)).model.endswith(COMMIT), "the only one"
    shutil.copytree(model / "snapshots" / COMMIT, model / "snapshots" / "other", symlinks=True)
    with pytest.raises(
        ModelError, match=rf"no refs/main, and not exactly one snapshot; there is {COMMIT}, other: choose with --rev"
    ):
        locate(str(model))
    assert locate(str(model), "other").model.endswith("/snapshots/other")
    (model / "refs" / "v2").write_text("other\n")
    assert locate(str(model), "v2").model.endswith("/snapshots/other")
    for wrong in ("v3", "../refs/v2", str(model / "refs" / "v2")):
        with pytest.raises(ModelError, match="is not in it"):
            locate(str(model), wrong)
    with pytest.raises(ModelError, match=r"is a folder, which has no revision 'v2'; leave it out"):
        locate(str(model / "snapshots" / COMMIT), "v2")


def test_a_hub_id_may_hold_its_revision(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    for model, revision in (("facebook/DiT-XL-2-256@main", ""), ("dit", COMMIT), ("dit@main", "main"), (f"dit@{COMMIT}", "")):
        source = locate(model, revision)
        assert (source.model, source.revision) == (model.split("@")[0], COMMIT)
    with pytest.raises(ModelError, match="another revision than --revision 'v2'"):
        locate("dit@main", "v2")
    with pytest.raises(ModelError, match="revision 'v2' is not in it"):
        locate("dit@v2")
    assert load_reference("dit").guidance == 4.0


PLAIN = ["model_index.json", "transformer/config.json", "scheduler/scheduler_config.json", "vae/config.json", "README.md"]


@pytest.mark.parametrize(
    ("weights", "variant", "expected"),
    [
        (["transformer/{}.bin", "vae/{}.bin"], "", ["transformer/{}.bin", "vae/{}.bin"]),
        (["transformer/{}.bin", "transformer/{}.safetensors"], "", ["transformer/{}.safetensors"]),
        (
            ["transformer/{}.fp16.bin", "transformer/{}.safetensors", "vae/{}.bin"], "fp16",
            ["transformer/{}.fp16.bin", "vae/{}.bin"],
        ),
        (["transformer/{}.fp16.safetensors", "transformer/{}.bin"], "", ["transformer/{}.bin"]),
        (
            ["transformer/{}.safetensors.index.json", "transformer/{}-00001-of-00001.safetensors",
             "transformer/{}.fp16-00001-of-00001.safetensors", "transformer/{}.safetensors.index.fp16.json", "{}.ckpt"], "",
            ["transformer/{}.safetensors.index.json", "transformer/{}-00001-of-00001.safetensors"],
        ),
    ],
)  # fmt: skip
def test_only_needed_files_are_downloaded(weights: list[str], variant: str, expected: list[str]) -> None:
    named = [name.format(STEM) for name in weights]
    files = needed_files([*PLAIN, *named, "text_encoder/model.safetensors"], variant, "owner/name")
    assert sorted(files) == sorted([*PLAIN[:4], *(name.format(STEM) for name in expected)])


def test_a_unets_folder_is_downloaded_as_a_transformers_is() -> None:
    parts = [f"{part}/config.json" for part in ("unet", "vae", "safety_checker")]
    weights = [f"{part}/{STEM}.safetensors" for part in ("unet", "vae", "safety_checker")]
    files = needed_files(["model_index.json", "v1-5-pruned.ckpt", *parts, *weights], "", "owner/name")
    assert sorted(files) == sorted(["model_index.json", *parts[:2], *weights[:2]])


def test_a_controlnet_is_downloaded_with_its_network() -> None:
    parts = [f"{part}/{name}" for part in ("unet", "controlnet") for name in ("config.json", f"{STEM}.safetensors")]
    files = needed_files(["model_index.json", *parts, f"controlnet/{STEM}.bin", "controlnet/images/bird.png"], "", "owner/name")
    assert sorted(files) == sorted(["model_index.json", *parts])


def test_text_encoders_are_downloaded_for_prompts() -> None:
    tokenizer = ["tokenizer/spiece.model", "tokenizer/tokenizer_config.json", "tokenizer/special_tokens_map.json"]
    shards = [f"text_encoder/model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    encoder = ["text_encoder/config.json", "text_encoder/model.safetensors.index.json", *shards]
    others = [f"text_encoder/pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
    others += ["text_encoder/pytorch_model.bin.index.json", "text_encoder/model.fp16.safetensors", "tokenizer/more/x.json"]
    network = f"transformer/{STEM}.safetensors"
    names = [*PLAIN, network, "prompts.txt", *tokenizer, *encoder, *others]
    alone = needed_files(names, "", "owner/name")
    assert sorted(alone) == sorted([*PLAIN[:4], network, "prompts.txt"])
    files = needed_files(names, "", "owner/name", ("tokenizer", "text_encoder"))
    index = "text_encoder/pytorch_model.bin.index.json"  # small, as every JSON file
    assert sorted(set(files)) == sorted([*alone, *tokenizer, *encoder, index])
    names.append(f"transformer/{STEM}.fp16.safetensors")
    half = needed_files(names, "fp16", "owner/name", ("tokenizer", "text_encoder"))
    assert [name for name in half if name.endswith("safetensors")] == [names[-1], "text_encoder/model.fp16.safetensors"]


@pytest.fixture
def hub(home: Path, tmp_path: Path) -> Iterator[Hub]:
    """A hub with the published model."""
    shutil.copytree(home / "published", tmp_path / "served")
    with serving(tmp_path / "served", COMMIT) as hub:
        yield hub


LOCATE = "import sys; from dq_export.families.source import locate; print(locate(*sys.argv[1:]).checkpoint.weights.files[0])"


def fetched(address: str, home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """What `locate` finds in a process of its own, for the library reads its address when it is imported."""
    variables = {**os.environ, "HF_HOME": str(home), "HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    return subprocess.run([sys.executable, "-c", LOCATE, *words], env=variables, capture_output=True, text=True, check=False)


def test_a_hub_gives_small_files_first_and_one_format_of_the_weights(hub: Hub, tmp_path: Path) -> None:
    address = hub.address
    result = fetched(address, tmp_path / "one", "owner/name", "main")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith(f"snapshots/{COMMIT}/transformer/{STEM}.bin")
    assert sorted(hub.read) == sorted([*PLAIN[:4], f"transformer/{STEM}.bin", f"vae/{STEM}.bin"])
    (hub.folder / "transformer" / f"{STEM}.safetensors").write_bytes(b"x")
    hub.read.clear()
    assert fetched(address, tmp_path / "two", "owner/name").returncode == 0
    assert [name for name in hub.read if name.startswith("transformer/d")] == [f"transformer/{STEM}.safetensors"]
    edit(hub.folder / "transformer" / "config.json", _class_name="WanTransformer3DModel")
    hub.read.clear()
    other = fetched(address, tmp_path / "three", "owner/name")
    assert "ModelError" in other.stderr
    assert "architecture 'WanTransformer3DModel' is not supported" in other.stderr
    assert sorted(hub.read) == sorted(PLAIN[:4]), "no weights of a model that cannot be used"


@pytest.mark.slow
def test_missing_models_and_revisions_are_errors(hub: Hub, tmp_path: Path) -> None:
    address = hub.address
    assert "it has no revision 'v9'; give a branch, a tag or a commit" in fetched(address, tmp_path, "owner/name", "v9").stderr
    assert "the hub has no such model, or it is private" in fetched(address, tmp_path, "owner/other").stderr
    assert "no weights of variant 'fp16'" in fetched(address, tmp_path, "owner/name", "", "fp16").stderr
    assert "neither in the local cache nor reachable" in fetched("http://127.0.0.1:9", tmp_path / "empty", "owner/name").stderr
