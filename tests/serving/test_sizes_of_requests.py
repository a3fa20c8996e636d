"""Pictures of several sizes on a real tritonserver, of an export with several `--sizes` and a VAE."""

from __future__ import annotations

import base64
import io
import json
import queue
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import server
from conftest import PROMPTED_STEPS, shared, whole_after
from serving_requests import ask, ask_together, tensors
from test_images import endpoint
from tiny_vae import save_vae
from tritonclient.utils import InferenceServerException

import dq_export
from dq_export.deploy.triton.check import check_repository
from dq_export.deploy.triton.serving.request import noise
from dq_export.families.source import PACKAGED

PIXELS = 2
"""Of a latent along a side: the VAE has two levels."""


def save_model(folder: Path) -> None:
    """The small model that draws prompts, with a tiny random VAE behind it."""
    shutil.copytree(PACKAGED / "pixart-digits", folder)
    save_vae(folder / "vae", latent_channels=1, sample_size=32, scaling_factor=0.3)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "vae": ["diffusers", "AutoencoderKL"]}))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared(tmp_path_factory, "sized-model", save_model)


@pytest.fixture(scope="module")
def sized(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export for latents of 16 x 16 to 24 x 32, with its repository in `triton/`. PixArt counts 8 pixels a latent."""

    def make(folder: Path) -> None:
        more: dict[str, Any] = {"calib_size": 4, "parity_size": 2, "steps": PROMPTED_STEPS, "scaling": "none", "bits": "w8a8"}
        dq_export.export(model=str(model), output_dir=folder, sizes="128x128,192x256", triton=True, **more)

    return shared(tmp_path_factory, "sized", make)


@pytest.fixture(scope="module")
def running(sized: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[server.Server]:
    if server.missing():
        pytest.skip(server.missing())
    options = ("--model-control-mode=explicit", "--load-model=*", "--disable-auto-complete-config")
    with server.serving(sized / "triton", tmp_path_factory.mktemp("sizes"), *options, wait="ready") as started:
        yield started


@pytest.fixture
def client(running: server.Server) -> Iterator[Any]:
    with whole_after(running) as connected:
        yield connected


@pytest.mark.parametrize(("height", "width"), [(32, 32), (48, 64), (40, 36)])
def test_a_picture_of_any_size_is_the_one_that_diffusers_draws_and_decodes(
    client: Any, sized: Path, model: Path, height: int, width: int
) -> None:
    import torch
    from diffusers import AutoencoderKL, PixArtSigmaPipeline

    pipeline = PixArtSigmaPipeline.from_pretrained(PACKAGED / "pixart-digits", vae=None, transformer=None)
    pipeline.transformer = dq_export.load(sized)
    pipeline.set_progress_bar_config(disable=True)
    shape = (1, height // PIXELS, width // PIXELS)
    # Embeddings and one step, as rounding of texts and of earlier steps moves a few 8-bit activations to the next step.
    text, mask, null, null_mask = (tensor.detach().numpy() for tensor in pipeline.encode_prompt(["a seven"]))
    embeddings = {"prompt_embeds": text, "prompt_attention_mask": mask.astype(np.float32)}
    embeddings |= {"negative_prompt_embeds": null, "negative_prompt_attention_mask": null_mask.astype(np.float32)}
    settings = {"use_resolution_binning": False, "clean_caption": False, "num_inference_steps": 1}
    answer = ask(client, **embeddings, seed=5, guidance_scale=3.0, height=height, width=width, num_inference_steps=1)
    latents = torch.from_numpy(noise(np.array([[5]], dtype=np.uint64), shape))
    exact = pipeline(
        ["a seven"], latents=latents, output_type="latent", guidance_scale=3.0, height=8 * shape[1], width=8 * shape[2],
        **settings,
    ).images.numpy()  # fmt: skip
    assert np.abs(exact - answer["latents"]).max() < 1e-5
    vae = AutoencoderKL.from_pretrained(model / "vae").eval()
    with torch.inference_mode():
        picture = vae.decode(torch.from_numpy(np.array(answer["latents"])) / 0.3).sample
    pixels = ((picture / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy()
    assert answer["images"].shape == (1, height, width, 3)
    assert np.abs(answer["images"].astype(np.int64) - pixels).max() <= 1  # a value between two levels may go either way
    assert pixels.std() > 3


def test_requests_of_mixed_sizes_in_flight_get_what_they_get_alone(client: Any) -> None:
    sizes = [{}, {"height": 48, "width": 64}, {"height": 40}, {"width": 36}]
    requests: list[dict[str, Any]] = [
        {
            "prompt": [f"a {i}"],
            "seed": i,
            "num_inference_steps": 6 + i % 3,
            "guidance_scale": 1.0 + 2 * (i % 2),
            **sizes[i // 2 % 4],
        }
        for i in range(24)
    ]
    single = [ask(client, **request) for request in requests]
    together, rows, calls = ask_together(client, requests)
    assert [answer["images"].shape[1:3] for answer in together[:8:2]] == [(32, 32), (48, 64), (40, 32), (32, 36)]
    for name in ("latents", "images"):
        assert [np.array_equal(a[name], b[name]) for a, b in zip(single, together, strict=True)] == [True] * len(requests)
    assert rows == sum(request["num_inference_steps"] * (1 + (request["guidance_scale"] > 1)) for request in requests)
    assert rows / calls > 3  # of 9 at most, the rows of a size; alone it is 1 or 2


BAD: list[tuple[dict[str, Any], str]] = [
    ({"height": 50}, "height 50: expected 32 to 48 in steps of 4; the nearest is 48"),
    ({"height": 34}, "height 34: expected 32 to 48 in steps of 4; the nearest are 32 and 36"),
    ({"width": 1024}, "width 1024: expected 32 to 64 in steps of 4; the nearest is 64"),
    ({"width": 0}, "width 0: expected 32 to 64 in steps of 4; the nearest is 32"),
    ({"height": 40, "latents": np.zeros((1, 1, 16, 16))}, "latents: expected with height 32 and width 32 alone"),
    ({"height": 40, "latents": np.zeros((1, 1, 20, 16))}, "unexpected shape for input 'latents'"),
]


@pytest.mark.parametrize(("inputs", "message"), BAD, ids=[row[1] for row in BAD])
def test_a_size_that_the_model_does_not_draw_is_refused_with_the_nearest(client: Any, inputs: Any, message: str) -> None:
    with pytest.raises(InferenceServerException) as caught:
        ask(client, prompt=["a"], **inputs)
    assert "INVALID_ARGUMENT" in str(caught.value.status())
    assert message in str(caught.value.message())


def test_a_stream_shows_previews_of_another_size(client: Any) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    client.start_stream(callback=lambda result, error: answers.put((result, error)))
    request = tensors(prompt=["a two"], seed=1, num_inference_steps=6, preview_every=4, height=48)
    client.async_stream_infer("pipeline_stream", request)
    pairs = [answers.get(timeout=60) for _ in range(2)]
    client.stop_stream()
    assert [error for _, error in pairs] == [None, None]
    assert [result.as_numpy("images").shape for result, _ in pairs] == [(1, 48, 32, 3)] * 2


def test_the_shipped_client_takes_a_size(running: server.Server, sized: Path, tmp_path: Path) -> None:
    from PIL import Image

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(sized / "triton" / "client.py"), "--url", running.grpc, "--prompt", "a seven", *words]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)

    done = run("--height", "48", "--width", "40", "--steps", "2", "-o", "seven.png")
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "seven.png") as picture:
        assert picture.size == (40, 48)
    done = run("--width", "20")
    assert (done.returncode, done.stderr) == (
        1, "error: width 20: expected 32 to 64 in steps of 4; the nearest is 32\n",
    )  # fmt: skip


def test_openais_size_is_width_by_height(running: server.Server, sized: Path) -> None:
    from PIL import Image

    def post(body: dict[str, Any]) -> tuple[int, Any]:
        content = json.dumps(body).encode()
        try:
            with urllib.request.urlopen(f"http://{address}/v1/images/generations", content, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    with endpoint(running, sized / "triton") as address:
        for size, expected in (("64x36", (64, 36)), ("auto", (32, 32))):
            status, answer = post({"prompt": "a seven", "size": size, "num_inference_steps": 2})
            assert (status, answer["size"]) == (200, f"{expected[0]}x{expected[1]}")
            with Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"]))) as picture:
                assert picture.size == expected
        status, answer = post({"prompt": "a seven", "size": "1024x1024"})
    assert (status, answer["error"]["param"]) == (400, "size")
    assert answer["error"]["message"] == "height 1024: expected 32 to 48 in steps of 4; the nearest is 48"


def test_the_repository_says_which_sizes_it_takes_and_what_is_not_bounded(sized: Path) -> None:
    text = (sized / "triton" / "README.md").read_text()
    for words in (
        "| INT32[n, 1] | 32, 32 | heights of 32 to 48 in steps of 4 and widths of 32 to 64 in steps of 4, in pixels |",
        "each size has calls of its own",
        "No config.pbtxt bounds the height and the width that `denoiser` and `decoder` take",
    ):
        assert words in text
    faults = check_repository(sized / "triton")
    assert [(item.model, item.severity) for item in faults] == [("decoder", "warning"), ("denoiser", "warning")]
    assert all("a request may ask for any size" in item.problem for item in faults)
