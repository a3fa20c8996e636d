"""Folders of models: whose class is found, which parts lie beside the network, and what is wrong with the rest."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import run_onnx, save_tiny
from json_file import edit
from tiny_vae import save_vae
from typer.testing import CliRunner

from dq_export.core.recipe import Recipe
from dq_export.families.checkpoint import RENAMED, architecture_of
from dq_export.families.decoder import export_decoder, load_vae, todays_name
from dq_export.families.reference import ModelError
from dq_export.families.source import load_reference, locate, pin

STEM = "diffusion_pytorch_model"


@pytest.fixture
def model(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny pipeline, to be changed."""
    shutil.copytree(tiny_folder, tmp_path / "model")
    return tmp_path / "model"


def as_published(vae: Path) -> None:
    """The VAE's tensors as a pickle under the names that diffusers gave them before 0.15."""
    import torch
    from safetensors.torch import load_file

    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, value in load_file(vae / f"{STEM}.safetensors").items():
        for today, before in old.items() if "attentions" in name else ():
            name = name.replace(f".{today}.", f".{before}.")
        renamed[name] = value
    assert sum("proj_attn" in name for name in renamed) == 4, "two attentions, a weight and a bias each"
    torch.save(renamed, vae / f"{STEM}.bin")
    (vae / f"{STEM}.safetensors").unlink()


def test_classes_are_renamed_as_diffusers_renames_them() -> None:
    from diffusers.models import model_loading_utils

    names = model_loading_utils._CLASS_REMAPPING_DICT
    assert {(old, norm): new for old, norms in names.items() for norm, new in norms.items()} == RENAMED
    assert architecture_of({"_class_name": "Transformer2DModel", "norm_type": "layer_norm"}) == "Transformer2DModel"
    assert architecture_of({"_class_name": "DiTTransformer2DModel", "norm_type": ["ada_norm_zero"]}) == "DiTTransformer2DModel"
    assert architecture_of({"_class_name": ["Transformer2DModel"]}) is None


def test_a_configuration_of_2023_is_the_same_model(model: Path, tiny: Any) -> None:
    path = model / "transformer" / "config.json"
    config = json.loads(path.read_text())
    del config["norm_eps"]
    old = {
        "_class_name": "Transformer2DModel", "_diffusers_version": "0.12.0.dev0", "cross_attention_dim": None,
        "num_vector_embeds": None, "only_cross_attention": False, "use_linear_projection": False, "upcast_attention": False,
    }  # fmt: skip
    path.write_text(json.dumps({**config, **old}))
    assert load_reference(str(model)).digest == tiny.digest
    edit(path, norm_type="layer_norm")
    with pytest.raises(ModelError, match=r"architecture 'Transformer2DModel' is not supported; supported: DiTTransformer2D"):
        load_reference(str(model))


def test_the_transformers_folder_is_as_good_as_the_pipelines(
    model: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    save_vae(model / "vae")
    edit(model / "scheduler" / "scheduler_config.json", prediction_type="v_prediction", rescale_betas_zero_snr=True)
    whole, part = load_reference(str(model)), load_reference(str(model / "transformer"))
    assert whole.digest == part.digest != tiny.digest
    assert whole.decoder == part.decoder == model / "vae"
    assert part.scheduler.config.prediction_type == "v_prediction"  # type: ignore[attr-defined]
    (model.parent / "link").symlink_to(model / "transformer")
    monkeypatch.chdir(model / "transformer")
    for name in (".", str(model.parent / "link")):
        assert locate(name).checkpoint.scheduler == model / "scheduler"
    monkeypatch.chdir(model.parent)
    shutil.move(model / "transformer", model.parent / "alone")
    (model / "transformer").symlink_to(model.parent / "alone")
    assert locate(str(model)).checkpoint.scheduler == model / "scheduler"
    alone = load_reference(str(model.parent / "alone"))
    assert alone.decoder is None
    assert alone.scheduler.config.prediction_type == "epsilon"  # type: ignore[attr-defined]


def no_config(model: Path) -> None:
    (model / "scheduler" / "scheduler_config.json").unlink()


def file_in_place(model: Path) -> None:
    shutil.rmtree(model / "scheduler")
    (model / "scheduler").write_text("x")


def lost_folder(model: Path) -> None:
    shutil.rmtree(model / "scheduler")
    edit(model / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])


def prior(model: Path) -> None:
    shutil.rmtree(model / "transformer")
    (model / "prior").mkdir()
    edit(model / "model_index.json", _class_name="KandinskyPriorPipeline", prior=["diffusers", "PriorTransformer"])


def half_unet(model: Path) -> None:
    shutil.rmtree(model / "transformer")
    edit(model / "model_index.json", unet=["diffusers", "UNet2DConditionModel"])


def half_downloaded(model: Path) -> None:
    shutil.rmtree(model / "transformer")
    edit(model / "model_index.json", transformer=["diffusers", "Transformer2DModel"])


def endless(model: Path) -> None:
    (model / "transformer" / "config.json").unlink()
    (model / "transformer" / "config.json").symlink_to("/dev/zero")


def pipe(model: Path) -> None:
    (model / "transformer" / "config.json").unlink()
    os.mkfifo(model / "transformer" / "config.json")


def changed(**values: Any) -> Callable[[Path], None]:
    return lambda model: edit(model / "transformer" / "config.json", **values)


def written(path: str, text: str) -> Callable[[Path], object]:
    return lambda model: (model / path).write_text(text)


CONFIG, SCHEDULER = "transformer/config.json", "scheduler/scheduler_config.json"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_config, "scheduler: no scheduler_config.json in it; copy or download it again, or remove"),
        (file_in_place, "scheduler: no scheduler_config.json in it"),
        (lost_folder, r"model_index\.json: names a scheduler, and there is no scheduler/scheduler_config\.json"),
        (prior, r"a 'KandinskyPriorPipeline' of 'prior: PriorTransformer', without a transformer or a unet"),
        (half_unet, r"model_index\.json names a unet, and there is no unet/config\.json"),
        (half_downloaded, r"model_index\.json names a transformer, and there is no transformer/config\.json"),
        (endless, "not a regular file"),
        (pipe, "not a regular file"),
        (written(CONFIG, " " * (17 << 20)), "larger than the 16777216 bytes"),
        (written(CONFIG, "[" * 5000 + "]" * 5000), "more than 32 levels"),
        (written(CONFIG, "[1]"), "expected a JSON object, found list"),
        (written(SCHEDULER, "[]"), "expected a JSON object, found list"),
        (written(SCHEDULER, "{}"), "None is not a scheduler of diffusers"),
        (written(SCHEDULER, '{"_class_name": ["DDIMScheduler"]}'), r"\['DDIMScheduler'\] is not a scheduler"),
        (written(SCHEDULER, '{"_class_name": "UNet2DModel"}'), "'UNet2DModel' is not a scheduler"),
        (written("model_index.json", "[]"), "expected a JSON object, found list"),
        (changed(_class_name=["x"]), "architecture None is not supported"),
        (changed(quantization_config={"quant_method": "bitsandbytes"}), "these weights are quantized already"),
        (changed(activation_fn=7), r"transformer/config\.json: "),
    ],
)
def test_an_incomplete_folder_is_refused_with_the_reason(spoil: Any, message: str, model: Path) -> None:
    spoil(model)
    with pytest.raises(ModelError, match=message) as error:
        load_reference(str(model))
    assert str(model) in str(error.value)
    assert "\n" not in str(error.value)


def test_parts_of_a_pipeline_say_what_they_are(model: Path) -> None:
    save_vae(model / "vae")
    with pytest.raises(ModelError, match="architecture 'AutoencoderKL' is not supported; supported: DiTTransformer2DModel"):
        locate(str(model / "vae"))
    with pytest.raises(ModelError, match="a scheduler's folder; pass that of the pipeline"):
        locate(str(model / "scheduler"))
    with pytest.raises(ModelError, match=r"a file; pass its diffusers folder, or make one: `DiffusionPipeline\.from_single_file"):
        locate(str(model / "transformer" / f"{STEM}.safetensors"))


def test_a_url_is_no_model_and_holds_the_id() -> None:
    with pytest.raises(ModelError, match=r"a URL; pass the hub id: --model owner/name$"):
        locate("https://example.org/owner/name/tree/main?x=1")


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae") / "vae"
    save_vae(folder)
    return folder


def test_a_vae_as_published_is_the_same_decoder(vae: Path, tmp_path: Path) -> None:
    for name in ("new", "old"):
        shutil.copytree(vae, tmp_path / name)
    as_published(tmp_path / "old")
    edit(tmp_path / "old" / "config.json", _diffusers_version="0.12.0.dev0", scaling_factor=0.18215)
    for name in ("new", "old"):
        assert export_decoder(tmp_path / name, (2, 8, 8), tmp_path / "onnx" / name / "model.onnx") == ""
    for name in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "onnx" / "old" / name).read_bytes() == (tmp_path / "onnx" / "new" / name).read_bytes()
    assert todays_name("decoder.mid_block.attentions.0.group_norm.weight").endswith("group_norm.weight")


def test_a_decoder_undoes_the_statistics_of_latents(tmp_path: Path) -> None:
    import torch

    mean, std = [0.4, -0.2], [1.5, 0.6]
    vae = save_vae(tmp_path / "vae", scaling_factor=0.5, latents_mean=mean, latents_std=std)
    assert export_decoder(tmp_path / "vae", (2, 8, 8), tmp_path / "onnx" / "model.onnx") == ""
    latents = np.random.default_rng(0).normal(size=(1, 2, 8, 8)).astype(np.float32)
    scaled = torch.tensor(std).view(2, 1, 1) * torch.from_numpy(latents) / 0.5 + torch.tensor(mean).view(2, 1, 1)
    with torch.inference_mode():
        expected = vae.decode(scaled).sample.numpy()
    actual = run_onnx(tmp_path / "onnx" / "model.onnx", {"latents": latents})
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_a_vae_that_makes_no_pictures_is_refused(vae: Path, tmp_path: Path) -> None:
    shutil.copytree(vae, tmp_path / "vae")
    for values, message in (
        ({"block_out_channels": [8, 32]}, "config.json and weights do not fit each other"),
        ({"up_block_types": ["Nothing", "UpDecoderBlock2D"]}, r"up_block_types\[0\] = .Nothing.: expected .UpDecoderBlock2D. or"),
        ({"layers_per_block": 10**9}, "layers_per_block = 1000000000"),
    ):
        edit(tmp_path / "vae" / "config.json", **values)
        with pytest.raises(ModelError, match=message):
            load_vae(tmp_path / "vae", (2, 8, 8))
        shutil.copyfile(vae / "config.json", tmp_path / "vae" / "config.json")
    save_vae(tmp_path / "grey", in_channels=1, out_channels=1)
    with pytest.raises(ModelError, match="decodes to 1 channels; expected 3"):
        load_vae(tmp_path / "grey", (2, 8, 8))
    assert load_vae(tmp_path / "grey", (4, 8, 8)) is None


def test_a_missing_vae_is_named_if_a_server_needs_it(model: Path) -> None:
    edit(model / "model_index.json", vae=["diffusers", "AutoencoderKL"])
    reference = load_reference(str(model))
    assert reference.decoder == model / "vae"
    with pytest.raises(ModelError, match=r"vae/config\.json: no such file"):
        load_vae(reference.decoder, reference.feed_shape)
    edit(model / "model_index.json", vae=[None, None])
    assert load_reference(str(model)).decoder is None


def test_a_recipe_finds_its_model_from_any_folder(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    folder = model / "transformer"
    (folder / f"{STEM}.safetensors").rename(folder / f"{STEM}.fp16.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("model", "./model", "~/model", "model/../model"):
        recipe, source = pin(Recipe(model=name))
        assert (recipe.model, recipe.revision, recipe.variant) == (str(model.resolve()), None, "fp16")
        assert os.path.samefile(source.checkpoint.weights.files[0], folder / f"{STEM}.fp16.safetensors")
    assert pin(Recipe(model="dit-digits"))[0] == Recipe(model="dit-digits")


@pytest.mark.parametrize(
    "words",
    [["--model=~/gone"], ["--model=dit-digits", "--recipe=~/gone"], ["verify", "~/gone"], ["check", "~/gone", "--target=trt"]],
)
def test_a_tilde_is_the_home_folder_wherever_a_path_is_taken(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dq_export.cli.app import app

    monkeypatch.setenv("HOME", str(tmp_path))
    result = CliRunner().invoke(app, words)
    assert result.exception is not None
    assert (str(tmp_path / "gone") in str(result.exception)) is (words != ["--model=~/gone"])


def test_one_flag_for_another_model_leaves_out_the_files_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dq_export.cli.export import recipe_of

    (tmp_path / "recipe.yaml").write_text("model: owner/name\nrevision: abc\nvariant: fp16\n")
    same = recipe_of(tmp_path / "recipe.yaml", {})
    assert (same.revision, same.variant) == ("abc", "fp16")
    other = recipe_of(tmp_path / "recipe.yaml", {"model": "owner/other", "variant": "bf16"})
    assert (other.model, other.revision, other.variant) == ("owner/other", None, "bf16")


def test_the_tiny_model_of_these_tests_is_a_pipeline(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    assert locate(str(folder)).checkpoint.scheduler == folder / "scheduler"
