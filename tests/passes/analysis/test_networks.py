"""Sites and folds of the architectures that people deploy, on small networks with random weights."""

from __future__ import annotations

import pytest
from folds import CASES, Folds, measure

FREE, VECTOR, TOKEN = "free", "vector", "token"


def checked(name: str) -> Folds:
    """What is found; folding random scalings and shifts everywhere changes the float output by its rounding alone."""
    result = measure(CASES[name])
    assert 0 < result.change < 1e-5
    return result


def test_sd3_with_dual_attention_leaves_the_second_linear_of_its_mlps() -> None:
    result = checked("sd3")
    assert result.gemms == {FREE: 20, TOKEN: 5}
    assert result.shared == 2, "the last block has no output for the text"
    token = [name for name, item in result.sites.items() if item.site.fold.kind == TOKEN and item.readers[0].axis < 0]
    assert all(name.endswith(".net.2") for name in token)
    parts = result.sites["transformer_blocks.0.attn2.to_q"].site.fold.parts
    assert [(part.name, part.rows) for part in parts] == [
        ("transformer_blocks.0.norm1.linear", (7 * 16, 8 * 16)),
        ("transformer_blocks.0.norm1.linear", (6 * 16, 7 * 16)),
    ]
    last = result.sites["transformer_blocks.2.attn.add_q_proj"].site.fold.parts
    assert [part.rows for part in last] == [(0, 16), (16, 32)], "AdaLayerNormContinuous has the scale first"


@pytest.mark.slow
def test_flux_shares_one_scaling_between_its_streams_and_leaves_what_is_behind_gelu() -> None:
    result = checked("flux")
    assert result.gemms == {FREE: 14, TOKEN: 6}
    assert result.shared == 2
    joint = result.sites["transformer_blocks.0.attn.to_out.0"].site.fold.parts
    assert [part.name for part in joint] == [f"transformer_blocks.0.attn.{name}" for name in ("add_v_proj", "to_v")]
    assert result.sites["transformer_blocks.0.attn.to_add_out"].site.shares == "transformer_blocks.0.attn.to_out.0"
    single = result.sites["single_transformer_blocks.0.proj_mlp"]
    assert len(single.site.linears) == 4, "the MLP and attention read one normalized stream"
    out = result.sites["single_transformer_blocks.0.proj_out"].site.fold.parts
    assert [(part.kind, part.channels) for part in out] == [("linear", (0, 32)), (TOKEN, (32, 160))]


@pytest.mark.slow
def test_pixart_folds_its_shared_modulation_with_one_vector_a_site() -> None:
    result = checked("pixart")
    assert result.gemms == {FREE: 7, VECTOR: 6, TOKEN: 6}
    text = result.sites["transformer_blocks.0.attn2.to_k"].site
    assert len(text.linears) == 6, "the keys and values of every block read one text"
    assert [part.name for part in text.fold.parts] == ["caption_projection.linear_2"]
    token = {
        name.split(".", 2)[2] for name, item in result.sites.items() if item.site.fold.kind == TOKEN and item.readers[0].axis < 0
    }
    assert token == {"attn2.to_q", "ff.net.2"}, "the residual stream, and what is behind GELU"


@pytest.mark.slow
def test_wan_folds_as_pixart_does_and_its_cross_attention_into_an_affine_norm() -> None:
    result = checked("wan")
    assert result.gemms == {FREE: 10, VECTOR: 6, TOKEN: 3}
    assert [part.kind for part in result.sites["blocks.0.attn2.to_q"].site.fold.parts] == ["norm"]


@pytest.mark.slow
def test_a_unet_folds_its_transformers_whole_and_leaves_convolutions_behind_silu() -> None:
    result = checked("sd15")
    assert result.gemms == {FREE: 24, TOKEN: 1}, "only the text itself is no one's result"
    assert result.convolutions == {FREE: 4, TOKEN: 29}
    feed_forward = result.sites["mid_block.attentions.0.transformer_blocks.0.ff.net.2"].site.fold
    assert [part.rows for part in feed_forward.parts] == [(0, 128)], "the linear half of GEGLU"
    assert not feed_forward.shifts
