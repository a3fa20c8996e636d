"""How far a server's text encoder is from PyTorch's, and which exports have one to quantize."""

from __future__ import annotations

import numpy as np
import pytest

from dq_export.core.recipe import Recipe, RecipeError
from dq_export.families.dit import DIT
from dq_export.families.pixart import PIXART
from dq_export.stages.text_encoder import distance
from dq_export.stages.triton import require_encoder_bits


def rows(states: list[float], pooled: float, mask: list[float] | None) -> dict[str, np.ndarray]:
    result = {"encoder_hidden_states": np.array([[[value, value] for value in states]], dtype=np.float32)}
    result["pooled_projections"] = np.array([[pooled]], dtype=np.float32)
    if mask is not None:
        result["encoder_attention_mask"] = np.array([mask], dtype=np.float32)
    return result


@pytest.mark.parametrize(
    ("states", "pooled", "mask", "expected"),
    [
        ([1.1, 1.0], 1.0, None, 23.01),  # 10 log10(4 / 0.02)
        ([1.0, 1.1], 1.0, [1.0, 1.0], 23.01),
        ([1.0, 9.0], 1.0, [1.0, 0.0], 200.0),  # a token that the mask hides
        ([1.1, 9.0], 1.0, [1.0, 0.0], 20.0),
        ([1.0, 1.0], 1.5, [1.0, 1.0], 6.02),  # the farthest condition
        ([1.0, float("nan")], 1.0, None, -200.0),
    ],
)
def test_the_farthest_condition_counts_without_hidden_tokens(
    states: list[float], pooled: float, mask: list[float] | None, expected: float
) -> None:
    actual = distance(rows([1.0, 1.0], 1.0, mask), rows(states, pooled, mask))
    assert actual == pytest.approx(expected, abs=0.01)


def test_bits_of_text_encoders_without_a_server_or_an_encoder_are_refused() -> None:
    bits = {"model": "m", "text_encoder_bits": 8}
    with pytest.raises(RecipeError, match=r"^--text-encoder-bits 8: of the text encoders that --triton writes; pass --triton"):
        require_encoder_bits(Recipe.parse(bits, "test"), PIXART)
    with pytest.raises(RecipeError, match=r"^--text-encoder-bits 8: this network draws no prompts"):
        require_encoder_bits(Recipe.parse({**bits, "triton": True}, "test"), DIT)
    require_encoder_bits(Recipe.parse({**bits, "triton": True}, "test"), PIXART)
    with pytest.raises(RecipeError, match=r"text_encoder_bits = 4: expected 8"):
        Recipe.parse({**bits, "text_encoder_bits": 4}, "test")
