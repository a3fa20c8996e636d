"""The recipe: every choice of an export, as one validated, printable object."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from .documents import DocumentError, read_yaml, shown, shown_path
from .network import Linear
from .plugins import OneOf
from .prompts import fault
from .qtypes import QuantType
from .rule import Rule, misplaced, unfit, unmatched
from .scheme import ATTENTION_TYPES, PRESETS, Attention, Bits, Granularity, Scheme, scheme_of
from .violations import violations
from .widths import PLAIN, WIDTHS, Rounding, Width


class RecipeError(Exception):
    """A recipe, or an option that becomes part of one, asks for something that does not exist or cannot be done."""


FORMATS = OneOf("backends", ("onnx", "ort", "trt", "trt-rtx"))
METHODS = OneOf("methods", ("minmax", "percentile", "mse"))
SIZE = "[1-9][0-9]{0,4}x[1-9][0-9]{0,4}"

PLANS: dict[tuple[str, str | None], Literal["trt", "trt-rtx"]] = {
    ("trt", None): "trt",
    ("trt-rtx", None): "trt-rtx",
    ("ort", "tensorrt"): "trt",
    ("ort", "tensorrt-rtx"): "trt-rtx",
}
"""The library whose plan is the engine, by format and provider."""


class Recipe(BaseModel):
    """All options of an export, resolved. Unknown keys are errors. Saved as `recipe.yaml` beside what it made."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(min_length=1, max_length=4096, description="family name, hub id or local folder")
    revision: str | None = Field(
        default=None, max_length=256, description="branch, tag or commit of a hub id; null: the default branch"
    )
    variant: str | None = Field(
        default=None, max_length=64, description="the weights' variant, as fp16; null: none, or the only one"
    )
    lora: tuple[str, ...] | None = Field(
        default=None, min_length=1, max_length=100, description="FILE[:SCALE], fused before calibration; repeatable"
    )
    lora_sha256: tuple[str, ...] | None = Field(default=None, description="digest of each file of lora; null: any")
    prompts: tuple[str, ...] | None = Field(
        default=None, description="prompts to draw, one per line; null: the model's prompts.txt, or dq-export's own"
    )
    conditions: str | None = Field(
        default=None, min_length=1, max_length=4096, description="safetensors with encoded prompts, in place of --prompts"
    )
    conditions_sha256: str | None = Field(
        default=None, pattern="^[0-9a-f]{64}$", description="digest of the file of conditions; null: any"
    )
    format: Annotated[str, AfterValidator(FORMATS)] = Field("ort", description="what to build; onnx: only the graph")
    provider: Literal["cpu", "openvino", "cuda", "tensorrt", "tensorrt-rtx"] | None = Field(
        default=None, description="for format ort: what runs the engine; null: cpu"
    )
    dtype: Literal["fp32", "fp16", "bf16"] | None = Field(
        default=None, description="type of everything that is not quantized; null: the format's"
    )
    target: str = Field("sm89,sm120", description="for plans of TensorRT-RTX: the GPUs that the plan is for")
    min_shapes: str = Field("", description="for plans: the least shapes, in trtexec's syntax: a batch of 1")
    opt_shapes: str = Field("", description="the shapes at which the plan is fastest: a batch of 2")
    max_shapes: str = Field("", description="the greatest shapes: a batch of 16")
    bits: Bits = Field("w8a8", description="bits of weights and activations")
    granularity: Granularity | None = Field(
        default=None,
        description="activation scales: tensor (by timestep), token, token-group; null: tensor, for w4a8 token",
    )
    group_size: int | None = Field(
        default=None, ge=0, le=65536, description="inputs that share a weight scale; 0: all; null: by bits"
    )
    channel_bits: int | None = Field(
        default=None, ge=3, le=7, description="for bits w8a8: mean bits of weights, more for channels with outliers; null: 8"
    )
    attention: Attention = Field("float", description="type of attention's two matmuls; fp8 for plans of TensorRT")
    method: Annotated[str, AfterValidator(METHODS)] = Field("minmax", description="how a scale follows from the values seen")
    rounding: Rounding | None = Field(
        default=None,
        description="weights: to nearest, with least error, by GPTQ, or GPTQ and then training; null: rtn, for w4a8 gptq",
    )
    bias_correction: bool = Field(False, description="move each bias by the mean output error over calibration")
    percentile: float = Field(
        99.99, gt=50, le=100, allow_inf_nan=False, description="for method percentile: the percentile of |x|, per timestep"
    )
    bins: Literal["auto", "per-step"] | int = Field("auto", description="timestep bins of a scale table; 1 is static")
    scaling: Literal["auto", "none", "dilate", "smooth", "balance", "equalize"] = Field("auto", description="equivalent scaling")
    alpha: float = Field(0.5, ge=0, le=1, allow_inf_nan=False, description="for scaling smooth")
    rho: float = Field(
        1.0, ge=1, le=64, allow_inf_nan=False, description="for scaling dilate: how much a weight row's range may grow"
    )
    shift: bool | None = Field(default=None, description="per-channel shift; null: where scaling auto measures a gain, else none")
    tables: str | None = Field(
        default=None, min_length=1, max_length=4096, description="safetensors of scales and weights that are trained already"
    )
    tables_sha256: str | None = Field(
        default=None, pattern="^[0-9a-f]{64}$", description="digest of the file of tables; null: any"
    )
    distill_iterations: int = Field(150, ge=1, le=100_000, description="for rounding distill: training steps per block")
    distill_batch: int = Field(16, ge=1, le=1024, description="samples per training step, each with its own timestep")
    distill_pictures: int = Field(64, ge=1, le=100_000, description="for rounding distill: pictures sampled for training")
    distill_samples: int = Field(1600, ge=8, le=1_000_000, description="training samples, from those pictures' network calls")
    distill_rate: float = Field(0.02, gt=0, le=1, allow_inf_nan=False, description="rate of weights, in steps of their codes")
    distill_scale_rate: float = Field(
        0.07, gt=0, le=1, allow_inf_nan=False, description="rate of activation scales, in codes at the end of their range"
    )
    distill_bias_rate: float = Field(
        0.15, gt=0, le=1, allow_inf_nan=False, description="rate of biases, in steps of their weights' codes"
    )
    finish: int = Field(
        0, ge=0, le=100_000, description="for rounding distill: steps that train all scales and biases by the network's output"
    )
    calib_size: int = Field(16, ge=1, le=100_000, description="pictures sampled for calibration")
    calibration: Literal["uniform", "progressive"] = Field("uniform", description="inputs of the float or the quantized network")
    steps: int = Field(50, ge=1, le=1000, description="sampler steps per picture")
    parity_size: int = Field(10, ge=1, le=1000, description="pictures drawn with PyTorch and the engine to compare them")
    guidance_scale: float | None = Field(
        default=None, ge=1, le=1000, allow_inf_nan=False, description="classifier-free guidance; null: the model's default"
    )
    sizes: str | None = Field(
        default=None,
        max_length=200,
        pattern=f"^{SIZE}(,{SIZE})*$",
        description="HEIGHTxWIDTH in pixels, or several: 512x512,1024x768; null: the model's own",
    )
    seed: int = Field(0, ge=0, le=2**64 - 1, description="seed of noise and conditions")
    timesteps: Literal["auto", "shared", "per-sample"] = Field("auto", description="one timestep per batch, or one per sample")
    triton: bool = Field(False, description="also write a Triton model repository")
    text_encoder_bits: Literal[8] | None = Field(
        default=None, description="for triton: bits of the text encoders' weights, in blocks: 8; null: float"
    )
    layout: Literal["plain", "diffusers"] = Field(
        "plain", description="diffusers: also write the folder that optimum's ORTDiffusionPipeline loads"
    )
    min_coverage: float = Field(
        0.95, ge=0, le=1, allow_inf_nan=False, description="share of the quantized GEMMs' FLOPs that must be integer"
    )
    min_sqnr: float = Field(
        20.0, ge=-1000, le=1000, allow_inf_nan=False, description="dB that every network call's output must keep"
    )
    metric_weights: str | None = Field(
        default=None,
        min_length=1,
        max_length=4096,
        description="folder with the weights of LPIPS, of a CLIP, or both, to judge how pictures look",
    )
    max_lpips: float = Field(
        0.10, ge=0, le=100, allow_inf_nan=False, description="for metric-weights: LPIPS that the pictures may have on average"
    )
    rules: tuple[Rule, ...] | None = Field(default=None, description="first match wins; null: the family's")

    @property
    def plan(self) -> Literal["trt", "trt-rtx"] | None:
        """The library whose plan is the engine, as a format of its own or within ONNX Runtime; None if it is no plan."""
        return PLANS.get((self.format, self.provider))

    @property
    def attention_type(self) -> QuantType | None:
        """The codes of the operands of attention's matmuls; None: they stay float."""
        return ATTENTION_TYPES[self.attention]

    @property
    def first_rounding(self) -> str:
        """How weights are rounded before anything is trained."""
        return "gptq" if self.rounding == "distill" else self.rounding or PLAIN.rounding

    @property
    def width(self) -> Width:
        """The defaults of its bits. A file of tables decides its own."""
        return PLAIN if self.tables is not None else WIDTHS.get(self.bits, PLAIN)

    def settled(self) -> Recipe:
        """With the rounding of its width where it names none."""
        return self.model_copy(update={"rounding": self.rounding or self.width.rounding})

    @property
    def scheme(self) -> Scheme:
        """What `bits`, `granularity` and `group_size` name, which rules with the action `bits` give their linears.

        Raises:
            RecipeError: no kernel can exist for the three together; see `Scheme`.
        """
        try:
            return scheme_of(self.bits, self.granularity, self.group_size)
        except ValueError as error:
            raise RecipeError(str(error)) from error

    @property
    def pixels(self) -> tuple[tuple[int, int], ...]:
        """Height and width of each of `sizes`, each once; none where pictures have the model's own."""
        texts = dict.fromkeys(self.sizes.split(",")) if self.sizes else ()
        return tuple((int(height), int(width)) for height, _, width in (text.partition("x") for text in texts))

    @field_validator("prompts")
    @classmethod
    def _plain(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and (reason := fault(value)):
            raise ValueError(reason)
        return value

    @field_validator("bins")
    @classmethod
    def _positive(cls, value: str | int) -> str | int:
        if isinstance(value, int) and not 1 <= value <= 1000:
            raise ValueError("a number of bins must be from 1 to 1000")
        return value

    @staticmethod
    def parse(values: Mapping[str, Any], source: str) -> Recipe:
        """Validate a mapping.

        Raises:
            RecipeError: all violations at once, each with the key, what was found and the nearest valid name.
        """
        try:
            return Recipe.model_validate(dict(values))
        except ValidationError as error:
            fields = {"": list(Recipe.model_fields), "rules": list(Rule.model_fields)}
            raise RecipeError(violations(error, source, fields)) from error

    @staticmethod
    def read(path: Path) -> dict[str, Any]:
        """The mapping in a YAML file, not validated.

        Raises:
            RecipeError: no such file, not YAML, or no mapping.
        """
        try:
            values = read_yaml(path)
        except DocumentError as error:
            raise RecipeError(f"recipe {error}") from error
        if not isinstance(values, dict):
            raise RecipeError(f"recipe {shown_path(path)}: expected a mapping of options, found {type(values).__name__}")
        wrong = next((key for key in values if not isinstance(key, str)), None)
        if wrong is not None:
            raise RecipeError(f"recipe {shown_path(path)}: key {shown(wrong)} is not an option")
        return values

    @staticmethod
    def load(path: Path) -> Recipe:
        """Read a YAML recipe.

        Raises:
            RecipeError: see `read` and `parse`.
        """
        return Recipe.parse(Recipe.read(path), f"recipe {path}")

    def dump(self) -> str:
        """YAML that `load` reads back to an equal recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def decide(self, linear: Linear) -> Rule | None:
        """The first rule that matches a linear; None: none does."""
        return next((rule for rule in self.rules or () if rule.matches(linear)), None)

    def assign(self, linears: Mapping[str, Linear]) -> dict[str, Rule]:
        """The deciding rule of every linear.

        Raises:
            RecipeError: a rule that matches no linear at all, a linear that no rule matches, an action that a linear cannot
                have, or nothing left to quantize; all of them in one message.
        """
        matched = {name: rule for name, linear in linears.items() if (rule := self.decide(linear)) is not None}
        decided = {name: self.complete(rule).placed(linears[name], rule) for name, rule in matched.items()}
        wrong = [*unmatched(self.rules or (), linears), *misplaced(decided, linears), *unfit(decided, linears)]
        if wrong:
            raise RecipeError("\n".join(wrong))
        fitted = {name: rule.fitted(linears[name].width) for name, rule in decided.items()}
        if reason := self._unusable([rule.scheme for rule in fitted.values()]):
            raise RecipeError(reason)
        return fitted

    def complete(self, rule: Rule) -> Rule:
        """The rule with the recipe's bits, granularity and group size where it has none of its own."""
        action = self.bits if rule.action == "bits" else rule.action
        preset = scheme_of(action)
        if not preset.low_precision:
            return rule
        size = self.group_size if rule.group_size is None else rule.group_size
        granularity = None if preset.activation is None else rule.granularity or self.granularity
        return rule.model_copy(update={"action": action, "granularity": granularity, "group_size": size})

    def _unusable(self, schemes: list[Scheme]) -> str:
        """Why the schemes of all linears together cannot be; empty if they can."""
        weights = [scheme.weight for scheme in schemes if scheme.weight is not None]
        if self.rounding == "distill" and (self.bias_correction or self.calibration == "progressive"):
            option = "--bias-correction" if self.bias_correction else "--calibration progressive"
            return f"rounding distill with {option}: training decides that itself, and better; leave {option} out"
        if self.channel_bits is not None and self.bits != "w8a8":
            return f"channel_bits with bits {self.bits}: the widths are mixed inside 8-bit codes; take bits w8a8"
        if self.channel_bits is not None and not any(scheme.mixes_widths for scheme in schemes):
            return "channel_bits: no linear has 8-bit weights with a scale for each channel; take granularity tensor or token"
        if self.channel_bits is not None and self.rounding == "distill":
            return "channel_bits with rounding distill: training knows one width a weight; take rounding gptq"
        if self.first_rounding == "gptq" and any(weight.qtype.is_float for weight in weights):
            return f"fp8 with rounding {self.rounding}: float8 codes are rounded to nearest; use rounding rtn or mse"
        if not any(scheme.low_precision for scheme in schemes):
            names = ", ".join(name for name, preset in PRESETS.items() if preset.low_precision)
            return f"the rules leave no linear to quantize to {names}; exclude less"
        return ""
