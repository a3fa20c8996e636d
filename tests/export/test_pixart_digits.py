"""The small text-to-image model that ships: diffusers' own pipeline reads its folder and draws what its prompts name."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import sqnr
from reading import Reader, named_digit

import dq_export
from dq_export.families.source import PACKAGED

FOLDER = PACKAGED / "pixart-digits"
PROMPTS = (FOLDER / "prompts.txt").read_text().splitlines()


@pytest.fixture(scope="module")
def pipeline() -> Any:
    from diffusers import PixArtSigmaPipeline

    loaded = PixArtSigmaPipeline.from_pretrained(FOLDER, vae=None)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def reader() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Stochastic Optimizer")  # of features, which nothing here reads
        return Reader.train()


def draw(pipeline: Any, prompts: list[str], length: int, steps: int) -> Any:
    """float32[N, 1, 16, 16], from noise that depends only on the number of prompts."""
    import torch

    noise = torch.randn(len(prompts), 1, 16, 16, generator=torch.Generator().manual_seed(1))
    return pipeline(
        prompts,
        num_inference_steps=steps,
        guidance_scale=3.0,
        latents=noise,
        max_sequence_length=length,
        output_type="latent",
        use_resolution_binning=False,
        clean_caption=False,
    ).images.numpy()


def test_the_digits_that_prompts_name_are_drawn(pipeline: Any, reader: Reader) -> None:
    prompts = [*PROMPTS, "a fancy 3 on paper", "Seven!"]
    labels = np.asarray([*map(named_digit, PROMPTS), 3, 7])
    assert (np.bincount(labels) >= 2).all()
    digits = reader.read(draw(pipeline, prompts, length=16, steps=20))
    assert (digits == labels).mean() >= 0.9  # the float model reaches 0.99 over 500 pictures


def test_an_engine_draws_them_inside_the_pipeline(pipeline: Any, reader: Reader, prompted: Path) -> None:
    prompts = PROMPTS[:10]
    exact = draw(pipeline, prompts, length=16, steps=8)
    float_network, pipeline.transformer = pipeline.transformer, dq_export.load(prompted)
    try:
        quantized = draw(pipeline, prompts, length=16, steps=8)
    finally:
        pipeline.transformer = float_network
    assert reader.read(quantized).tolist() == list(range(10))
    assert 20 < sqnr(exact, quantized) < 80, "near the float network's pictures, and not drawn by it"


def test_padding_of_prompts_changes_no_picture(pipeline: Any) -> None:
    """PixArt pads prompts to 300 tokens; the model was trained with 16."""
    short, long = (draw(pipeline, PROMPTS[:2], length, steps=4) for length in (16, 300))
    np.testing.assert_allclose(long, short, atol=1e-4)


def test_the_tokenizer_loads_under_every_name_and_ends_as_t5_does() -> None:
    from transformers import AutoTokenizer, T5Tokenizer

    for kind in (AutoTokenizer, T5Tokenizer):
        tokenizer = kind.from_pretrained(FOLDER / "tokenizer")
        rows = tokenizer(["a seven", "", "a pangolin"], padding="max_length", max_length=5)
        assert tokenizer.convert_ids_to_tokens(rows["input_ids"][0]) == ["▁a", "▁seven", "</s>", "<pad>", "<pad>"]
        assert rows["attention_mask"] == [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0]]
        assert rows["input_ids"][2][1] == tokenizer.unk_token_id


def test_the_model_is_small() -> None:
    size = sum(path.stat().st_size for path in Path(FOLDER).rglob("*") if path.is_file())
    assert size <= 8_000_000
