"""A server without a text encoder, of an export from `--conditions`: requests hold embeddings."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import server
import torch
from conftest import sqnr
from flux2 import SIDE as FLUX2_SIDE
from flux2 import TINY, flux2_pipeline, save_flux2
from json_file import edit
from safetensors.numpy import save_file
from sd3 import save_sd3, sd3_pipeline
from served import serving_client
from serving_requests import ask, healthy
from toy import PROMPTS
from tritonclient.utils import InferenceServerException

import dq_export
from dq_export.core.condition_file import save_conditions
from dq_export.core.recipe import RecipeError
from dq_export.deploy.triton.check import check_repository
from dq_export.families.source import load_reference

STEPS, SIDE, PIXELS = 3, 64, 8
QUICK: dict[str, Any] = {
    "triton": True, "steps": STEPS, "calib_size": 2, "parity_size": 2, "min_sqnr": 5.0, "scaling": "none",
    "sizes": f"{SIDE}x{SIDE}",
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sd3(tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="module")
def embeddings(model: Path) -> dict[str, Any]:
    """What the pipeline's text encoders give for two prompts, by names in requests."""
    text, null, pooled, null_pooled = sd3_pipeline(model).encode_prompt([*PROMPTS[:2]], None, None, negative_prompt=["", ""])
    named = {"prompt_embeds": text, "pooled_prompt_embeds": pooled}
    named |= {"negative_prompt_embeds": null, "negative_pooled_prompt_embeds": null_pooled}
    return {name: tensor.detach().numpy() for name, tensor in named.items()}


@pytest.fixture(scope="module")
def out(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of a copy of the model that has no text encoders."""
    place = tmp_path_factory.mktemp("embeddings")
    save_conditions(place / "encoded.safetensors", load_reference(str(model)).encode(PROMPTS, "cpu"))
    shutil.copytree(model, place / "model", ignore=shutil.ignore_patterns("text_encoder*", "tokenizer*"))
    dq_export.export(model=str(place / "model"), output_dir=place / "out", conditions=str(place / "encoded.safetensors"), **QUICK)
    return place / "out"


@pytest.fixture(scope="module")
def address(out: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if server.missing():
        pytest.skip(server.missing())
    place = tmp_path_factory.mktemp("server")
    with server.serving(out / "triton", place, "--disable-auto-complete-config", wait="ready") as running:
        yield running.grpc


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[Any]:
    import tritonclient.grpc as grpc

    connected = grpc.InferenceServerClient(address)
    yield connected
    connected.close()


def positive(embeddings: dict[str, Any]) -> dict[str, Any]:
    return {name: rows for name, rows in embeddings.items() if not name.startswith("negative_")}


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_embeddings_draw_what_diffusers_draws_with_the_engine(
    client: Any, model: Path, out: Path, embeddings: dict[str, Any], guidance: float
) -> None:
    start = np.random.default_rng(3).standard_normal((2, 4, SIDE // PIXELS, SIDE // PIXELS), dtype=np.float32)
    rows = embeddings if guidance > 1 else positive(embeddings)
    actual = ask(client, **rows, latents=start, guidance_scale=guidance)["latents"]
    pipeline = sd3_pipeline(model)
    pipeline.transformer = dq_export.load(out)
    tensors = {name: torch.from_numpy(value) for name, value in (rows | {"latents": start}).items()}
    sizes: dict[str, Any] = {"height": SIDE, "width": SIDE, "num_inference_steps": STEPS, "output_type": "latent"}
    exact = pipeline(**tensors, **sizes, guidance_scale=guidance).images.numpy()
    assert sqnr(exact, actual) > 30
    assert np.abs(actual[0] - actual[1]).max() > 0.1


def test_guidance_needs_the_embeddings_of_an_empty_prompt(client: Any, embeddings: dict[str, Any]) -> None:
    message = (
        "negative_prompt_embeds with negative_pooled_prompt_embeds: missing; guidance needs the embeddings of an empty prompt. "
        "guidance_scale 1 draws without"
    )
    with pytest.raises(InferenceServerException, match=message):
        ask(client, **positive(embeddings), guidance_scale=3.0)


@pytest.mark.parametrize("name", ["prompt", "negative_prompt"])
def test_prompts_are_refused(client: Any, embeddings: dict[str, Any], name: str) -> None:
    with pytest.raises(InferenceServerException, match=f"unexpected inference input '{name}'"):
        ask(client, **embeddings, **{name: ["a red square"] * 2})


def test_a_part_of_the_embeddings_is_refused(client: Any, embeddings: dict[str, Any]) -> None:
    with pytest.raises(InferenceServerException, match="expected prompt_embeds with pooled_prompt_embeds together"):
        ask(client, prompt_embeds=embeddings["prompt_embeds"], guidance_scale=1.0)
    with pytest.raises(InferenceServerException, match=r"negative_prompt_embeds: expected .* together"):
        ask(client, **positive(embeddings), negative_prompt_embeds=embeddings["negative_prompt_embeds"])


def test_the_repository_is_whole_and_healthy(client: Any, out: Path) -> None:
    assert check_repository(out / "triton") == []
    assert not (out / "triton" / "text_encoder").exists()
    assert healthy(client)


def draw(address: str, out: Path, archive: Path) -> subprocess.CompletedProcess[str]:
    program = str(out / "triton" / "client.py")
    command = [sys.executable, program, "--url", address, "--embeddings", str(archive), "--seed", "7"]
    picture = str(archive.with_name("latents.npy"))
    return subprocess.run([*command, "--steps", "2", "-o", picture], capture_output=True, text=True, check=False)


def test_the_client_sends_an_archive_of_embeddings(
    address: str, client: Any, out: Path, embeddings: dict[str, Any], tmp_path: Path
) -> None:
    np.savez(tmp_path / "encoded.npz", **embeddings)
    result = draw(address, out, tmp_path / "encoded.npz")
    assert (result.returncode, result.stdout) == (0, f"{tmp_path / 'latents.npy'}: seeds 7, 8\n"), result.stderr
    exact = ask(client, **embeddings, seed=[7, 8], num_inference_steps=2)["latents"]
    assert np.array_equal(np.load(tmp_path / "latents.npy"), exact)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"\x93NUMPY"])
def test_the_client_refuses_a_file_that_is_no_archive(out: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "encoded.npz").write_bytes(content)
    result = draw("127.0.0.1:1", out, tmp_path / "encoded.npz")
    assert result.returncode == 2
    assert f"error: --embeddings {tmp_path / 'encoded.npz'}: " in result.stderr
    assert "Traceback" not in result.stderr


def test_the_readme_asks_for_embeddings(out: Path) -> None:
    readme = (out / "triton" / "README.md").read_text()
    assert "its own `prompt_embeds` and `pooled_prompt_embeds` and `seed` alone" in readme
    assert 'numpy.savez("encoded.npz", prompt_embeds=..., pooled_prompt_embeds=...)' in readme
    assert "Guidance needs `negative_prompt_embeds` and `negative_pooled_prompt_embeds`, too" in readme
    assert "python client.py --embeddings encoded.npz" in readme
    for word in ("--prompt", "text_encoder", "tokenizers", "v2/models/pipeline/infer", "images.py"):
        assert word not in readme


def test_bits_of_a_text_encoder_that_is_not_there_are_refused(out: Path, tmp_path: Path) -> None:
    model, conditions = out.with_name("model"), out.with_name("encoded.safetensors")
    settings = {**QUICK, "conditions": str(conditions), "text_encoder_bits": 8}
    with pytest.raises(RecipeError, match="with --conditions the server has no text encoder; leave one of the two out"):
        dq_export.export(model=str(model), output_dir=tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_flux2_dev_whose_text_encoder_is_not_read_is_served(tmp_path: Path) -> None:
    """Its guidance is an input of the network, so there is no negative condition."""
    out, place = tmp_path / "out", tmp_path / "server"
    place.mkdir()
    model, random, (height, width) = save_flux2(tmp_path / "model", guidance_embeds=True), np.random.default_rng(4), FLUX2_SIDE
    edit(model / "model_index.json", _class_name="Flux2Pipeline")
    text = random.standard_normal((2, 512, TINY["joint_attention_dim"]), dtype=np.float32)
    save_file({"encoder_hidden_states": text}, tmp_path / "encoded.safetensors")
    settings = {**QUICK, "sizes": f"{height}x{width}", "conditions": str(tmp_path / "encoded.safetensors")}
    dq_export.export(model=str(model), output_dir=out, **settings)
    start = random.standard_normal((2, TINY["in_channels"], height // 16, width // 16), dtype=np.float32)
    with serving_client(out, place) as connected:
        actual = ask(connected, prompt_embeds=text, latents=start, guidance_scale=3.5)["latents"]
    pipeline = flux2_pipeline(model, dq_export.load(out))
    tensors = {"prompt_embeds": torch.from_numpy(text), "latents": torch.from_numpy(start)}
    sizes: dict[str, Any] = {"height": height, "width": width, "num_inference_steps": STEPS, "output_type": "latent"}
    exact = pipeline(**tensors, **sizes, guidance_scale=3.5).images.numpy()
    assert sqnr(exact.transpose(0, 2, 1).reshape(actual.shape), actual) > 30
