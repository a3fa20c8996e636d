"""A checkpoint that samples latents: its VAE goes to the server, too."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import server
from conftest import save_tiny
from serving_requests import LONGEST, ask, tensors
from tiny_vae import save_vae

import dq_export
from dq_export.families.reference import ModelError

QUICK: dict[str, Any] = {"triton": True, "steps": 4, "calib_size": 2, "parity_size": 2, "min_sqnr": 5.0}


def save_latent(folder: Path) -> Path:
    """A pipeline of a tiny DiT and a tiny VAE: latents of 2 x 8 x 8, pictures of 16 x 16."""
    save_tiny(folder)
    save_vae(folder / "vae", scaling_factor=0.3)
    return folder


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_latent(tmp_path_factory.mktemp("latent"))


@pytest.fixture(scope="module")
def out(latent: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latent-out") / "out"
    dq_export.export(model=str(latent), output_dir=folder, **QUICK)
    return folder


@pytest.fixture(scope="module")
def latent_client(out: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    import tritonclient.grpc as grpc

    if server.missing():
        pytest.skip(server.missing())
    options = ("--model-control-mode=explicit", "--load-model=*")
    with server.serving(out / "triton", tmp_path_factory.mktemp("latent-server"), *options, wait="ready") as running:
        client = grpc.InferenceServerClient(running.grpc)
        yield client
        client.close()


def test_pictures_equal_those_that_diffusers_decodes(latent_client: Any, latent: Path) -> None:
    import torch
    from diffusers import AutoencoderKL

    actual = ask(latent_client, class_labels=[1, 4, 2], seed=3)
    vae = AutoencoderKL.from_pretrained(latent / "vae").eval()
    with torch.inference_mode():
        exact = vae.decode(torch.from_numpy(np.array(actual["latents"])) / 0.3).sample
    pixels = ((exact / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy()
    assert actual["images"].shape == (3, 16, 16, 3)
    assert np.abs(actual["images"].astype(np.int64) - pixels).max() <= 1  # a value between two levels may go either way
    assert pixels.std() > 3


def test_without_its_decoder_a_client_gets_latents_or_the_reason(latent_client: Any) -> None:
    import tritonclient.grpc as grpc
    from tritonclient.utils import InferenceServerException

    exact = ask(latent_client, class_labels=[1], seed=3)
    latent_client.unload_model("decoder")
    with pytest.raises(InferenceServerException, match="decoder"):
        ask(latent_client, class_labels=[1], seed=3)
    outputs = [grpc.InferRequestedOutput("latents")]
    alone = latent_client.infer("pipeline", tensors(class_labels=[1], seed=3), outputs=outputs, client_timeout=LONGEST)
    assert np.array_equal(alone.as_numpy("latents"), exact["latents"])
    latent_client.load_model("decoder")
    assert np.array_equal(ask(latent_client, class_labels=[1], seed=3)["images"], exact["images"])


@pytest.mark.slow
def test_a_changed_vae_is_written_again_and_an_equal_one_is_kept(out: Path, latent: Path, tmp_path: Path) -> None:
    copy = tmp_path / "out"
    shutil.copytree(out, copy)
    source = tmp_path / "model"
    shutil.copytree(latent, source)
    before = (copy / "triton" / "decoder" / "1" / "model.onnx.data").read_bytes()
    config = source / "vae" / "config.json"
    config.write_text(config.read_text().replace('"scaling_factor": 0.3', '"scaling_factor": 0.5'))
    dq_export.export(model=str(source), output_dir=copy, overwrite=True, **QUICK)
    graph = (copy / "triton" / "decoder" / "1" / "model.onnx").read_bytes()
    assert graph != (out / "triton" / "decoder" / "1" / "model.onnx").read_bytes()
    assert (copy / "triton" / "decoder" / "1" / "model.onnx.data").read_bytes() == before


def test_a_damaged_vae_is_refused_before_anything_is_done(latent: Path, tmp_path: Path) -> None:
    source = tmp_path / "model"
    shutil.copytree(latent, source)
    path = source / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"vae/diffusion_pytorch_model\.safetensors: cut short"):
        dq_export.export(model=str(source), output_dir=tmp_path / "out", **QUICK)
    assert not (tmp_path / "out").exists()
