"""The recipe: every choice of an export, as one validated, printable object."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from .denoiser import Linear
from .qtypes import FP8, INT4, INT8, QuantType

Bits = Literal["w8a8", "fp8", "w4a16"]
Action = Literal["w8a8", "fp8", "w4a16", "weight-only", "float"]
ACTIVATION_TYPES: dict[str, QuantType] = {"w8a8": INT8, "fp8": FP8}
"""By action: what the input is quantized to; the others leave it float."""
WEIGHT_TYPES: dict[str, QuantType] = {"w8a8": INT8, "fp8": FP8, "w4a16": INT4, "weight-only": INT8}


class RecipeError(Exception):
    """A recipe, or an option that becomes part of one, asks for something that does not exist or cannot be done."""


def nearest(word: str, valid: list[str]) -> str:
    """` Did you mean 'x'?` for a misspelt word, or nothing if no valid word is near."""
    close = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


class Rule(BaseModel):
    """What happens to the linears whose module name `match` finds (`re.search`). The first rule that matches decides.

    Actions: `w8a8`: int8 weights (a scale per output channel) and int8 activations, integer GEMM; `fp8`: the same in
    float8 E4M3; `w4a16`: int4 weights in blocks along the input, unpacked inside a float GEMM; `weight-only`: int8 weights
    in blocks; `float`: left alone.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    match: str
    action: Action
    reason: str = ""

    @property
    def activation(self) -> QuantType | None:
        """What the input is quantized to, if at all."""
        return ACTIVATION_TYPES.get(self.action)

    @property
    def weight(self) -> QuantType | None:
        """What the weight is quantized to, if at all."""
        return WEIGHT_TYPES.get(self.action)

    @field_validator("match")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"'{value}' is not a regular expression: {error}") from error
        return value


class Recipe(BaseModel):
    """All options of an export, resolved. Unknown keys are errors. Saved as `recipe.yaml` beside what it made."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(description="family name, hub id or local folder")
    format: Literal["onnx", "ort", "trt", "trt-rtx"] = Field("ort", description="what to build")
    provider: Literal["cpu", "openvino"] | None = Field(None, description="for format ort: what runs the engine; null: cpu")
    dtype: Literal["fp32", "fp16", "bf16"] | None = Field(None, description="of what is not quantized; null: the format's")
    target: str = Field("sm89,sm120", description="for format trt-rtx: the GPUs that the plan is for")
    min_shapes: str = Field("", description="for trt and trt-rtx, as trtexec takes them: the least batch is 1")
    opt_shapes: str = Field("", description="the shapes to be fastest at: a batch of 2")
    max_shapes: str = Field("", description="the greatest: a batch of 16")
    bits: Bits = Field("w8a8", description="bits of weights and activations")
    attention: Literal["float", "fp8"] = Field("float", description="its two matmuls; fp8 for trt and trt-rtx")
    method: Literal["minmax", "percentile", "mse"] = Field("minmax", description="how a scale follows from the values seen")
    percentile: float = Field(99.99, gt=50, le=100, description="for method percentile: of |x|, per timestep")
    bins: Literal["auto", "per-step"] | int = Field("auto", description="timestep bins of a scale table; 1 is static")
    scaling: Literal["auto", "none", "dilate", "smooth"] = Field("auto", description="equivalent scaling")
    alpha: float = Field(0.5, ge=0, le=1, description="for scaling smooth")
    rho: float = Field(1.0, ge=1, le=64, description="for scaling dilate: how much a weight row's range may grow")
    shift: bool | None = Field(None, description="per-channel shift; null: where scaling auto measures a gain, else none")
    calib_size: int = Field(16, ge=1, description="pictures sampled for calibration")
    steps: int = Field(50, ge=1, le=1000, description="sampler steps a picture")
    parity_size: int = Field(10, ge=1, description="pictures drawn with PyTorch and the engine to compare them")
    guidance_scale: float | None = Field(None, ge=1, description="classifier-free guidance; null: the model's default")
    seed: int = Field(0, ge=0)
    timesteps: Literal["auto", "shared", "per-sample"] = Field("auto", description="one timestep a batch, or one a sample")
    min_coverage: float = Field(0.95, ge=0, le=1, description="share of the quantized GEMMs' FLOPs that must be integer")
    min_sqnr: float = Field(20.0, allow_inf_nan=False, description="dB that every network call's output must keep")
    rules: tuple[Rule, ...] | None = Field(None, description="first match wins; null: the family's")

    @field_validator("bins")
    @classmethod
    def _positive(cls, value: str | int) -> str | int:
        if isinstance(value, int) and value < 1:
            raise ValueError("a number of bins must be at least 1")
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
            raise RecipeError("\n".join(_explain(item, source) for item in error.errors())) from error

    @staticmethod
    def read(path: Path) -> dict[str, Any]:
        """The mapping in a YAML file, not validated.

        Raises:
            RecipeError: no such file, not YAML, or no mapping.
        """
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise RecipeError(f"recipe {path}: no such file") from error
        except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
            raise RecipeError(f"recipe {path}: not readable as YAML ({error})") from error
        if not isinstance(values, dict):
            raise RecipeError(f"recipe {path}: expected a mapping of options, found {type(values).__name__}")
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

    def decide(self, linear: str) -> Rule:
        """The deciding rule for a linear.

        Raises:
            RecipeError: no rule matches.
        """
        for rule in self.rules or ():
            if re.search(rule.match, linear):
                return rule
        raise RecipeError(f"no rule matches '{linear}'; add a last rule such as {{match: '', action: float}}")

    def assign(self, linears: Mapping[str, Linear]) -> dict[str, Rule]:
        """The deciding rule of every linear.

        Raises:
            RecipeError: a rule that matches no linear at all, a linear that no rule matches, an action that a linear cannot
                have, or nothing left to quantize; all of them in one message.
        """
        wrong = []
        for rule in self.rules or ():
            if not any(re.search(rule.match, name) for name in linears):
                example = next(iter(linears))
                hint = nearest(rule.match, list(linears)) or f" Names look like '{example}'."
                wrong.append(f"rule '{rule.match}' ({rule.action}) matches none of {len(linears)} linears.{hint}")
        left = [name for name in linears if not any(re.search(rule.match, name) for rule in self.rules or ())]
        if left:
            names = ", ".join(f"'{name}'" for name in left[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
            wrong.append(f"no rule matches {names}; add a last rule such as {{match: '', action: float}}")
        decided = {name: self.decide(name) for name in linears if name not in left}
        for name, rule in decided.items():
            kind = linears[name].kind
            if rule.activation and kind == "modulation":
                wrong.append(
                    f"'{name}' works on one row per sample, where {rule.action.upper()} runs in float; use weight-only or float"
                )
            if rule.action != "float" and kind == "edge":
                wrong.append(f"'{name}' is an embedder or a final projection and stays float; set its action to float")
        if not wrong and not any(rule.action in get_args(Bits) for rule in decided.values()):
            wrong.append(f"the rules leave no linear to quantize to {', '.join(get_args(Bits))}; exclude less")
        if wrong:
            raise RecipeError("\n".join(wrong))
        return decided


def _explain(item: Any, source: str) -> str:
    where = ".".join(str(part) for part in item["loc"] if not str(part).startswith(("literal[", "int")))
    found = item.get("input")
    if item["type"] == "extra_forbidden":
        fields = list(Rule.model_fields) if where.startswith("rules") else list(Recipe.model_fields)
        return f"{source}: unknown key '{where}'.{nearest(where.split('.')[-1], fields)} Valid: {', '.join(fields)}"
    if item["type"] == "literal_error":
        expected = item["ctx"]["expected"]
        hint = nearest(str(found), re.findall("'([^']+)'", expected))
        return f"{source}: {where} = {found!r}: expected {expected}.{hint}"
    if item["type"] == "missing":
        return f"{source}: '{where}' is missing"
    return f"{source}: {where} = {found!r}: {item['msg'].removeprefix('Value error, ')}"
