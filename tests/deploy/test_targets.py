"""Recipes that TensorRT or a target does not run, refused before any work."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

import dq_export
from dq_export.core.recipe import Recipe, RecipeError
from dq_export.deploy.backends import backend_of

RTX = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt_rtx")


@RTX
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "sm90"}, "--target 'sm90': TensorRT-RTX builds for sm75, sm80, sm86, sm89, sm120, sm121"),
        (
            {"target": "sm86", "bits": "fp8"},
            "on TensorRT-RTX: fp8 needs --target sm89 or later, found sm86; the nearest is w8a8",
        ),
        ({"target": "sm75", "dtype": "bf16"}, "--dtype bf16 needs --target sm80 or later, found sm75"),
        ({"target": "sm80", "attention": "fp8"}, "--attention fp8 needs --target sm89 or later, found sm80"),
        (
            {"format": "ort", "attention": "fp8"},
            "ort does not run --attention fp8; trt, trt-rtx, tensorrt, tensorrt-rtx do",
        ),
        ({"provider": "cpu"}, "--format trt-rtx does not run --provider cpu; it runs"),
    ],
)
def test_impossible_plans_are_an_error_before_anything_is_done(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        backend_of(Recipe.parse({"model": "m", "format": "trt-rtx", **options}, "test"))
    assert message in str(error.value)


@RTX
@pytest.mark.parametrize(("action", "first"), [("fp8", "sm89"), ("w4a16", "sm80")])
def test_a_target_must_have_the_element_types_of_the_rules_not_of_bits(action: str, first: str, tiny: Any) -> None:
    """The rules of a recipe decide, if it has any: not its bits, and not a rule that matches nothing."""
    lowest = {"sm89": "sm80", "sm80": "sm75"}[first]
    edges, one = {"match": "emb|norm|proj_out|pos_embed", "action": "float"}, {"match": r"0\.attn1\.to_q", "action": action}
    quantized = {"match": "", "action": "w8a8"}

    def require(*rules: dict[str, Any], target: str = lowest, bits: str = "w8a8") -> None:
        recipe = Recipe.parse({"model": "m", "format": "trt-rtx", "target": target, "bits": bits, "rules": rules}, "test")
        backend = backend_of(recipe)
        assert backend is not None
        backend.require_schemes(rule.scheme for rule in recipe.assign(tiny.linears).values())

    with pytest.raises(RecipeError, match=f"{action} needs --target {first} or later, found {lowest}; the nearest is w.a8"):
        require(edges, one, quantized)
    require(edges, one, quantized, target=first)
    require(edges, {"match": r"0\.attn1", "action": "float"}, one, quantized)
    require(edges, quantized, bits=action)


@RTX
def test_a_rule_that_a_target_does_not_run_is_refused_before_any_work(tiny_folder: Path, tmp_path: Path) -> None:
    rules = [
        {"match": r"0\.attn1\.to_q", "action": "fp8"},
        {"match": "attn1|ff", "action": "bits"},
        {"match": "", "action": "float"},
    ]
    with pytest.raises(RecipeError, match="fp8 needs --target sm89 or later, found sm80; the nearest is w8a8"):
        dq_export.build(model=str(tiny_folder), output_dir=tmp_path / "out", format="trt-rtx", target="sm80,sm120", rules=rules)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "idle"),
    [
        ({"provider": "openvino"}, "--provider openvino"),
        ({"dtype": "fp16"}, "--dtype fp16"),
        ({"attention": "fp8"}, "--attention fp8"),
        ({"provider": "cuda", "dtype": "fp16"}, "--provider cuda --dtype fp16"),
    ],
)
def test_options_of_engines_beside_the_graph_alone_are_an_error(options: dict[str, Any], idle: str) -> None:
    """The graph would be the same without them, and its user would believe otherwise."""
    with pytest.raises(RecipeError, match=f"^--format onnx builds no engine, .* leave out {idle}$"):
        backend_of(Recipe.parse({"model": "m", "format": "onnx", **options}, "test"))
    assert backend_of(Recipe.parse({"model": "m", "format": "onnx", "dtype": "fp32"}, "test")) is None


def test_bits_that_a_format_does_not_run_are_an_error() -> None:
    with pytest.raises(
        RecipeError,
        match=r"fp8 .* on ONNX Runtime's CPU provider: no CPU kernel takes float8; --format trt has one",
    ):
        backend_of(Recipe.parse({"model": "m", "bits": "fp8"}, "test"))
