"""`dq_export.load`: the engine of an export draws inside diffusers' own pipeline what the export recorded."""

from __future__ import annotations

import logging
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import save_tiny, sqnr
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline
from json_file import edit

import dq_export
from dq_export.core.recipe import Recipe
from dq_export.core.tensor_file import load_tensors
from dq_export.deploy.backend import BackendError
from dq_export.deploy.backends import backend_of
from dq_export.deploy.onnxruntime.cpu import Ort
from dq_export.families.reference import Float32, ModelError
from dq_export.families.source import load_reference
from dq_export.finished_folder import FinishedFolder, engine_of
from dq_export.output_folder import OutputError
from dq_export.pipeline import run
from dq_export.preparation import Options
from dq_export.stages.recording import HELD_OUT, draw, feed_of

STEPS, PICTURES, GUIDANCE, SEED = 4, 4, 2.0, 3
VALUES = {"steps": STEPS, "parity_size": PICTURES, "guidance_scale": GUIDANCE, "seed": SEED, "calib_size": 2, "scaling": "none"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DiTPipeline has ImageNet's null label, 1000, written into it."""
    return save_tiny(tmp_path_factory.mktemp("dit"), num_embeds_ada_norm=1000, out_channels=4)


def export(model: Path, out: Path, **values: Any) -> Path:
    run(Recipe.parse({"model": str(model), **VALUES, **values}, "test"), out, Options(overwrite=True), until="verify")
    return out


@pytest.fixture(scope="module")
def shared(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(model, tmp_path_factory.mktemp("shared") / "out")


@pytest.fixture(scope="module")
def per_sample(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(model, tmp_path_factory.mktemp("per-sample") / "out", timesteps="per-sample")


def pipeline_of(denoiser: Any, model: Path) -> tuple[Any, list[torch.Tensor]]:
    """DiTPipeline, and a list of the latents that its VAE decodes."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        latent_channels=2, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, scaling_factor=1.0,
        use_quant_conv=False, use_post_quant_conv=False,
    ).eval()  # fmt: skip
    latents: list[torch.Tensor] = []
    vae.decoder.register_forward_pre_hook(lambda _, inputs: latents.append(inputs[0]))
    pipeline = DiTPipeline(transformer=denoiser, vae=vae, scheduler=DDIMScheduler.from_pretrained(model / "scheduler"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, latents


def draw_with(denoiser: Any, model: Path, pictures: int) -> Float32:
    """The first of the recording's pictures, drawn by DiTPipeline from its noise."""
    pipeline, latents = pipeline_of(denoiser, model)
    seeds = [(SEED + HELD_OUT) * 100_003 + i for i in range(pictures)]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    pipeline(list(range(pictures)), GUIDANCE, generators, num_inference_steps=STEPS, output_type="np")
    return latents[0].numpy()


def drawn_by_the_export(out: Path, pictures: int) -> Float32:
    """The same, drawn as the export compares its engine with PyTorch."""
    recipe = FinishedFolder.open(out).recipe()
    backend, reference = backend_of(recipe), load_reference(recipe.model)
    assert backend is not None
    engine = backend.load(engine_of(out))
    return draw(reference, lambda feed: engine(feed_of(feed, recipe)), recipe.model_copy(update={"parity_size": pictures}))


@pytest.mark.parametrize("timesteps", ["shared", "per_sample"])
def test_a_pipeline_draws_what_the_export_recorded(timesteps: str, model: Path, request: pytest.FixtureRequest) -> None:
    """Bit for bit what the export's own calls of the engine draw, and as far from PyTorch's pictures as the report says."""
    out: Path = request.getfixturevalue(timesteps)
    actual = draw_with(dq_export.load(out), model, PICTURES)
    np.testing.assert_array_equal(actual, drawn_by_the_export(out, PICTURES))
    parity = FinishedFolder.open(out).report().parity
    assert parity is not None
    recorded = load_tensors(out / "parity" / "pytorch.safetensors")[0]["pictures"]
    assert sqnr(recorded, actual) == pytest.approx(parity.trajectories[0].sqnr, abs=1e-3)
    np.testing.assert_array_equal(draw_with(dq_export.load(out), model, 1), drawn_by_the_export(out, 1))


def test_a_pipeline_draws_with_openvino(shared: Path, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_ep_openvino")
    shutil.copytree(shared, tmp_path / "out")
    out = export(model, tmp_path / "out", provider="openvino")
    np.testing.assert_array_equal(draw_with(dq_export.load(out), model, PICTURES), drawn_by_the_export(out, PICTURES))


def test_samples_of_one_call_may_have_their_own_timesteps(per_sample: Path, shared: Path) -> None:
    state, labels, timesteps = torch.randn(2, 2, 8, 8), torch.tensor([1, 1000]), torch.tensor([20, 980])
    mixed = dq_export.load(per_sample)(state, timesteps, labels).sample
    alone = [dq_export.load(per_sample)(state[i : i + 1], timesteps[i], labels[i : i + 1]).sample for i in range(2)]
    assert sqnr(torch.cat(alone).numpy(), mixed.numpy()) > 60
    assert sqnr(alone[0].numpy(), mixed[1:].numpy()) < 10, "the timesteps make a difference"
    with pytest.raises(ValueError, match="export it with --timesteps per-sample"):
        dq_export.load(shared)(state, timesteps, labels)


def test_diffusers_own_ways_with_a_pipeline_pass_the_engine_over(
    shared: Path, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        engine = dq_export.load(str(shared))
        pipeline, _ = pipeline_of(engine, model)
        assert pipeline.to("cpu").components["transformer"] is engine
        assert pipeline.transformer.config.num_embeds_ada_norm == 1000
        assert caplog.messages == []
        pipeline.save_pretrained(tmp_path)
        (message,) = caplog.messages
        assert message.startswith("self.transformer=StandIn of DiTTransformer2DModel, to be set as pipe.transformer of type")
        other = DiTPipeline.from_pretrained(tmp_path, transformer=None)
        other.transformer = engine
        other.set_progress_bar_config(disable=True)
        images = [one([7], GUIDANCE, torch.Generator().manual_seed(0), STEPS, "np").images for one in (pipeline, other)]
    finally:
        logger.removeHandler(caplog.handler)
    np.testing.assert_array_equal(*images)
    assert images[0].std() > 0.05, "a picture that is one colour would prove nothing"


def test_a_folder_of_a_format_without_engines_gives_its_graph(shared: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(shared, out, ignore=shutil.ignore_patterns("engine"))
    exported_for(out, "onnx")
    np.testing.assert_array_equal(draw_with(dq_export.load(out), model, 1), draw_with(dq_export.load(shared), model, 1))


def test_a_batch_that_the_engine_was_not_built_for_is_refused(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a plan, which runs only on a GPU."""
    monkeypatch.setattr(Ort, "greatest_batch", lambda backend, model: 2)
    engine = dq_export.load(shared)
    engine(torch.randn(2, 2, 8, 8), torch.tensor(5), torch.tensor([1, 2]))
    with pytest.raises(
        ValueError, match=r"^hidden_states has shape \[3, 2, 8, 8\], and the network takes \[batch up to 2, 2, 8, 8\]$"
    ):
        engine(torch.randn(3, 2, 8, 8), torch.tensor(5), torch.tensor([1, 2, 3]))


def configured(out: Path, **changes: Any) -> None:
    edit(out / "float" / "config.json", **changes)


def exported_for(out: Path, name: str) -> None:
    """Change the format that a folder's recipe names."""
    path = out / "recipe.yaml"
    path.write_text(path.read_text().replace("format: ort", f"format: {name}").replace("provider: cpu", "provider: null"))


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (shutil.rmtree, OutputError, "no such folder; is it the output folder of a finished export?"),
        (lambda out: (shutil.rmtree(out), out.mkdir()), OutputError,
         "no recipe.yaml, model.onnx, report.json, float/config.json; is it the output folder of a finished export?"),
        (lambda out: (out / "report.json").unlink(), OutputError, "no report.json; is it the output folder of"),
        (lambda out: shutil.rmtree(out / "engine"), OutputError, "its engine is not built yet; run `dq-export finish {out}` on"),
        (lambda out: exported_for(out, "trt"), BackendError, "no model.plan; run `dq-export finish {out}`"),
        (lambda out: (out / "model.onnx").write_bytes(b"\x08"), BackendError, "refuses {out}/model.onnx"),
        (lambda out: (out / "float" / "config.json").write_text("[]"), ModelError, "expected a JSON object, found list"),
        (lambda out: configured(out, num_layers="many"), ModelError, "num_layers = 'many': expected a valid integer"),
        (lambda out: configured(out, _class_name="DiT"), ModelError, "architecture 'DiT' is not supported; supported: DiT"),
    ],
    ids=["no folder", "empty", "no report", "no engine", "no plan", "graph", "list", "value", "architecture"],
)  # fmt: skip
def test_a_folder_that_gives_no_engine_is_refused_in_one_line(
    spoil: Any, error: type[Exception], message: str, shared: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(shared, out)
    spoil(out)
    with pytest.raises(error) as failure:
        dq_export.load(out)
    assert message.format(out=out) in str(failure.value)
    assert str(out) in str(failure.value)
    assert "\n" not in str(failure.value)


def test_a_missing_runtime_is_named(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(
        BackendError, match=r"^onnxruntime is not installed; pip install 'dq-export\[cpu\]', needed for --format ort$"
    ):
        dq_export.load(shared)


def test_a_configuration_of_another_graph_ends_in_one_line(shared: Path, tmp_path: Path) -> None:
    shutil.copytree(shared, tmp_path / "out")
    configured(tmp_path / "out", sample_size=16)
    engine = dq_export.load(tmp_path / "out")
    with pytest.raises(BackendError, match=r"^ONNX Runtime cannot run the graph on these inputs: [^\n]*$"):
        engine(torch.randn(1, 2, 16, 16), torch.tensor(5), torch.tensor([1]))


def test_the_documents_lines_of_plain_onnxruntime_run(
    shared: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "pipelines.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "class_labels" in block]
    (tmp_path / "out").symlink_to(shared)
    (tmp_path / "model").symlink_to(model)
    monkeypatch.chdir(tmp_path)
    actual: dict[str, Any] = {}
    exec(code, actual)  # the page's own lines
    assert actual["latents"].shape == (4, 2, 8, 8)
    assert np.isfinite(actual["latents"].numpy()).all()
