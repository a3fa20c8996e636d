"""Prompts to pictures on a real tritonserver: what they draw, how they share calls, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import server
from conftest import PROMPTED_STEPS, sqnr
from serving_requests import LONGEST, ask, ask_together, healthy, tensors
from tritonclient.utils import InferenceServerException

import dq_export
from dq_export.core.recipe import Recipe
from dq_export.deploy.triton.check import check_repository
from dq_export.families.source import PACKAGED
from dq_export.pipeline import run
from dq_export.preparation import Options

FOLDER = PACKAGED / "pixart-digits"
TOKENS, WIDTH = 300, 64
READ = 4
"""Tokens of "a handwritten nine", with the one that ends it."""
OFF = np.ones((1, TOKENS), dtype=np.float32)


@pytest.fixture(scope="module")
def pipeline(prompted: Path) -> Any:
    """diffusers' own pipeline with the engine inside."""
    from diffusers import PixArtSigmaPipeline

    loaded = PixArtSigmaPipeline.from_pretrained(FOLDER, vae=None, transformer=None)
    loaded.transformer = dq_export.load(prompted)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def draw_with(pipeline: Any, prompts: list[str], noise: Any, **more: Any) -> Any:
    import torch

    settings = {"use_resolution_binning": False, "clean_caption": False, "num_inference_steps": PROMPTED_STEPS, **more}
    return pipeline(prompts, latents=torch.from_numpy(noise), output_type="latent", **settings).images.numpy()


def noise_of(pictures: int) -> Any:
    return np.random.default_rng(3).standard_normal((pictures, 1, 16, 16), dtype=np.float32)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_picture_is_the_one_that_diffusers_draws_with_the_engine(text_client: Any, pipeline: Any, guidance: float) -> None:
    prompts, noise = ["a seven", "The Digit 3 "], noise_of(2)
    actual = ask(text_client, prompt=prompts, negative_prompt=["an eight"] * 2, latents=noise, guidance_scale=guidance)
    exact = draw_with(pipeline, prompts, noise, guidance_scale=guidance, negative_prompt=["an eight"] * 2)
    # Encoded by another runtime: conditions differ by float32 rounding, which a few 8-bit activations round to another step.
    assert sqnr(exact, actual["latents"]) > 30
    assert np.abs(exact).max() > 0.9
    pixels = np.clip(np.rint(actual["latents"] * np.float32(127.5) + np.float32(127.5)), 0, 255).astype(np.uint8)
    assert np.array_equal(actual["images"], pixels.transpose(0, 2, 3, 1))


def test_embeddings_take_the_prompts_place_and_a_step_is_diffusers_own(text_client: Any, pipeline: Any) -> None:
    text, mask, null, null_mask = (tensor.detach().numpy() for tensor in pipeline.encode_prompt(["a five"]))
    noise = noise_of(1)
    embeddings = {"prompt_embeds": text, "prompt_attention_mask": mask.astype(np.float32)}
    embeddings |= {"negative_prompt_embeds": null, "negative_prompt_attention_mask": null_mask.astype(np.float32)}
    for steps in (1, PROMPTED_STEPS):
        actual = ask(text_client, **embeddings, latents=noise, guidance_scale=3.0, num_inference_steps=steps)["latents"]
        exact = draw_with(pipeline, ["a five"], noise, guidance_scale=3.0, num_inference_steps=steps)
        # From the second step on, what float32 rounds otherwise moves a few 8-bit activations to the next step.
        assert np.abs(actual - exact).max() < 1e-5 if steps == 1 else sqnr(exact, actual) > 30


def encoded(client: Any, pipeline: Any, model: str) -> tuple[Any, Any]:
    """The outputs of a server's model and of transformers for the tokens of one prompt."""
    import tritonclient.grpc as grpc

    tokens = pipeline.tokenizer(["a handwritten nine"], padding="max_length", max_length=TOKENS, return_tensors="np")
    inputs = []
    for name in ("input_ids", "attention_mask"):
        inputs.append(grpc.InferInput(name, [1, TOKENS], "INT64"))
        inputs[-1].set_data_from_numpy(tokens[name].astype(np.int64))
    actual = client.infer(model, inputs, client_timeout=LONGEST)
    text, mask, *_ = pipeline.encode_prompt(["a handwritten nine"], False)
    assert np.array_equal(actual.as_numpy("encoder_attention_mask"), mask.numpy())
    return actual.as_numpy("encoder_hidden_states"), text.detach().numpy()


def test_the_text_encoder_equals_transformers(text_client: Any, pipeline: Any) -> None:
    actual, exact = encoded(text_client, pipeline, "text_encoder")
    np.testing.assert_allclose(actual, exact, atol=1e-5)


def test_a_text_encoder_of_8_bits_is_served(
    text_client: Any, texts: server.Server, prompted: Path, pipeline: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(prompted, out)
    recipe = Recipe.load(out / "recipe.yaml").model_copy(update={"text_encoder_bits": 8})
    report = run(recipe, out, Options(overwrite=True), until="triton")
    assert report is not None
    assert report.text_encoder is not None
    assert report.text_encoder.sqnr > 30
    assert report.text_encoder.stored_bytes < report.text_encoder.float_bytes - 150_000  # of 49,152 weights
    assert check_repository(out / "triton") == []
    # Beside the float one of the server that runs. It stays loaded: a server with an unloaded model is not ready.
    added = prompted / "triton" / "text_encoder_8"
    shutil.copytree(out / "triton" / "text_encoder", added)
    config = (added / "config.pbtxt").read_text().replace('name: "text_encoder"', 'name: "text_encoder_8"')
    (added / "config.pbtxt").write_text(config)
    try:
        text_client.load_model("text_encoder_8")
        actual, exact = encoded(text_client, pipeline, "text_encoder_8")
    finally:
        shutil.rmtree(added)
    # The report is about the farthest of all prompts.
    assert report.text_encoder.sqnr - 3 < sqnr(exact[:, :READ], actual[:, :READ]) < 60


def test_prompts_of_all_lengths_share_calls_with_equal_results(text_client: Any) -> None:
    prompts = ["a one", "a handwritten two", "draw the digit 3", "", "four " * 100, "five"]
    requests = [
        {"prompt": [prompts[i % 6]], "seed": i, "num_inference_steps": 4 + i % 3, "guidance_scale": 1.0 + 2 * (i % 2)}
        for i in range(12)
    ]
    alone = [ask(text_client, **request)["latents"] for request in requests]
    together, rows, calls = ask_together(text_client, requests)
    assert [np.array_equal(a, b["latents"]) for a, b in zip(alone, together, strict=True)] == [True] * len(requests)
    assert rows / calls > 4  # alone it is 1 or 2


def test_a_stream_shows_previews_of_a_prompt(text_client: Any) -> None:
    import queue

    answers: queue.Queue[Any] = queue.Queue()
    text_client.start_stream(callback=lambda result, error: answers.put((result, error)))
    text_client.async_stream_infer("pipeline_stream", tensors(prompt=["a two"], seed=1, num_inference_steps=6, preview_every=4))
    actual = [answers.get(timeout=60) for _ in range(2)]
    text_client.stop_stream()
    assert [error for _, error in actual] == [None, None]
    assert [int(result.as_numpy("step")[0, 0]) for result, _ in actual] == [4, 0]
    exact = ask(text_client, prompt=["a two"], seed=1, num_inference_steps=6)["latents"]
    assert np.array_equal(actual[-1][0].as_numpy("latents"), exact)


EMBEDDED: dict[str, Any] = {"prompt_embeds": np.zeros((1, TOKENS, WIDTH)), "prompt_attention_mask": OFF}
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("no prompt", {"seed": [1]}, "prompt: missing; send prompt, or prompt_embeds with prompt_attention_mask"),
    ("a negative prompt alone", {"negative_prompt": ["a"]}, "prompt: missing"),
    ("too many tokens", {"prompt": ["a " * 300]}, "prompt: more than 300 tokens"),
    (
        "too many tokens of no picture",
        {"prompt": ["a"], "negative_prompt": ["a " * 300]},
        "negative_prompt: more than 300 tokens",
    ),
    ("too many bytes", {"prompt": ["a" * 20_000]}, "prompt: 20000 bytes; expected at most 16384"),
    ("no text", {"prompt": [b"\xff\xfe"]}, "prompt: expected UTF-8"),
    ("prompt and embeddings", {"prompt": ["a"], **EMBEDDED}, "prompt: send it or prompt_embeds, not both"),
    (
        "embeddings without mask",
        {"prompt_embeds": EMBEDDED["prompt_embeds"]},
        "expected prompt_embeds with prompt_attention_mask",
    ),
    ("NaN embeddings", {**EMBEDDED, "prompt_embeds": np.full((1, TOKENS, WIDTH), np.nan)}, "prompt_embeds: NaN or Inf"),
    ("no token", {**EMBEDDED, "prompt_attention_mask": 0 * OFF}, "prompt_attention_mask: expected 1 for tokens"),
    ("half a token", {**EMBEDDED, "prompt_attention_mask": OFF / 2}, "prompt_attention_mask: expected 1 for tokens"),
    ("embeddings of another length", {**EMBEDDED, "prompt_embeds": np.zeros((1, 16, WIDTH))}, "unexpected shape for input"),
    ("embeddings for others", {**EMBEDDED, "prompt_embeds": np.zeros((2, TOKENS, WIDTH))}, "batch size does not match"),
    ("too many pictures", {"prompt": ["a"] * 9}, "inference request batch-size must be <= 8"),
]


@pytest.mark.parametrize(("inputs", "message"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_a_bad_request_gets_an_error_that_names_the_fault(text_client: Any, inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(InferenceServerException) as error:
        ask(text_client, **inputs)
    assert "INVALID_ARGUMENT" in str(error.value.status())
    assert message in str(error.value.message())
    assert "\n" not in str(error.value.message())


def test_embeddings_that_overflow_the_network_harm_nobody(text_client: Any) -> None:
    body = {"prompt": ["a four"], "seed": 4, "num_inference_steps": 12}
    exact = ask(text_client, **body)["latents"]
    great = {**EMBEDDED, "prompt_embeds": np.full((1, TOKENS, WIDTH), 3e38)}

    def poison() -> bool:
        """Drawn from activations that are clipped to 8 bits, or refused for the network's output."""
        try:
            return bool(np.isfinite(ask(text_client, **great, num_inference_steps=12)["latents"]).all())
        except InferenceServerException as error:
            return "not finite at step" in str(error.message())

    with ThreadPoolExecutor(4) as pool:
        poisoned = [pool.submit(poison) for _ in range(2)]
        actual = list(pool.map(lambda request: ask(text_client, **request)["latents"], [body] * 2))
        assert all(item.result() for item in poisoned)
    assert all(np.array_equal(exact, latents) for latents in actual)


def test_without_its_text_encoder_a_client_gets_the_reason_and_cached_prompts_work(text_client: Any) -> None:
    exact = ask(text_client, prompt=["a six"], seed=6)["latents"]
    text_client.unload_model("text_encoder")
    try:
        with pytest.raises(InferenceServerException, match="text_encoder"):
            ask(text_client, prompt=["never seen before"])
        assert np.array_equal(ask(text_client, prompt=["a six"], seed=6)["latents"], exact)
    finally:
        text_client.load_model("text_encoder")


def test_health_asks_the_text_encoder_too(text_client: Any) -> None:
    assert healthy(text_client)
    text_client.unload_model("text_encoder")
    try:
        with pytest.raises(InferenceServerException, match="text_encoder"):
            healthy(text_client)
    finally:
        text_client.load_model("text_encoder")


def test_the_shipped_client_and_the_readmes_curl_draw_a_prompt(texts: server.Server, prompted: Path, tmp_path: Path) -> None:
    import re
    import urllib.request

    command = [sys.executable, str(prompted / "triton" / "client.py"), "--url", texts.grpc]
    command += ["--prompt", "a seven", "--prompt", "a two", "--steps", "4", "--seed", "7", "-o", "digits.png"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (result.returncode, result.stdout) == (0, "digits.png: seeds 7, 8\n"), result.stderr
    example = re.search(r"infer -d '(\{.*?\})'", (prompted / "triton" / "README.md").read_text(), re.DOTALL)
    assert example
    request = urllib.request.Request(f"http://{texts.http}/v2/models/pipeline/infer", data=example[1].encode())
    with urllib.request.urlopen(request, timeout=60) as answer:
        outputs = {item["name"]: item for item in json.load(answer)["outputs"]}
    assert outputs["images"]["shape"] == [2, 16, 16, 1]
