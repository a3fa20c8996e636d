"""The possible values of a text encoder's config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from .config_values import Values


class EncoderValues(Values):
    """Keys that all have. Those that decide the network are here and in the subclasses; files hold more."""

    vocab_size: int = Field(ge=1, le=1 << 20)

    @property
    def positions(self) -> int | None:
        """The length that every text is cut or filled to; None where the pipeline decides."""
        return None


class T5Values(EncoderValues):
    """Of `T5Config`."""

    d_model: int = Field(ge=1, le=1 << 16)
    d_kv: int = Field(ge=1, le=1 << 16)
    d_ff: int = Field(ge=1, le=1 << 20)
    num_layers: int = Field(ge=1, le=256)
    num_heads: int = Field(ge=1, le=4096)
    relative_attention_num_buckets: int = Field(32, ge=2, le=4096)
    relative_attention_max_distance: int = Field(128, ge=2, le=1 << 20)
    layer_norm_epsilon: float = Field(1e-6, gt=0, le=1)
    feed_forward_proj: Literal["relu", "gated-gelu"] = "relu"


class ClipValues(EncoderValues):
    """Of `CLIPTextConfig`."""

    hidden_size: int = Field(512, ge=1, le=1 << 16)
    intermediate_size: int = Field(2048, ge=1, le=1 << 20)
    projection_dim: int = Field(512, ge=1, le=1 << 16)
    num_hidden_layers: int = Field(12, ge=1, le=256)
    num_attention_heads: int = Field(8, ge=1, le=4096)
    max_position_embeddings: int = Field(77, ge=1, le=4096)
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    layer_norm_eps: float = Field(1e-5, gt=0, le=1)
    eos_token_id: int = Field(49407, ge=0, le=1 << 20)

    @property
    def positions(self) -> int | None:
        """See `EncoderValues.positions`."""
        return self.max_position_embeddings

    @model_validator(mode="after")
    def _heads_fit(self) -> ClipValues:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size}: expected a multiple of num_attention_heads {self.num_attention_heads}"
            )
        return self


class RotationValues(Values):
    """Of `rope_parameters`."""

    rope_theta: float = Field(default=10_000.0, ge=1, le=1e9)
    rope_type: Literal["default"] = "default"


class Qwen3Values(EncoderValues):
    """Of `Qwen3Config`."""

    hidden_size: int = Field(4096, ge=1, le=1 << 16)
    intermediate_size: int = Field(22_016, ge=1, le=1 << 20)
    num_hidden_layers: int = Field(32, ge=27, le=256)  # FLUX.2's pipeline reads what the 27th gives
    num_attention_heads: int = Field(32, ge=1, le=4096)
    num_key_value_heads: int = Field(32, ge=1, le=4096)
    head_dim: int = Field(128, ge=2, le=1 << 16, multiple_of=2)
    hidden_act: Literal["silu"] = "silu"
    rms_norm_eps: float = Field(1e-6, gt=0, le=1)
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    use_sliding_window: Literal[False] = False
    rope_scaling: None = Field(default=None, exclude=True)
    rope_parameters: RotationValues = Field(default_factory=RotationValues)

    @model_validator(mode="before")
    @classmethod
    def _parameters_of_rotations(cls, config: Any) -> Any:
        """Older files have the base of the rotations alone."""
        if isinstance(config, Mapping) and config.get("rope_parameters") is None and "rope_theta" in config:
            return {**config, "rope_parameters": {"rope_theta": config["rope_theta"]}}
        return config

    @model_validator(mode="after")
    def _groups_fit(self) -> Qwen3Values:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads}: expected a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        return self


ENCODERS: Mapping[str, type[EncoderValues]] = {
    "T5EncoderModel": T5Values,
    "CLIPTextModel": ClipValues,
    "CLIPTextModelWithProjection": ClipValues,
    "Qwen3ForCausalLM": Qwen3Values,
}
"""By class of transformers."""
