"""Recipes: their values, and the errors for wrong ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dq_export.core.network import Linear
from dq_export.core.recipe import Recipe, RecipeError
from dq_export.core.rule import DEFAULT_RULES, Rule
from dq_export.core.scheme import scheme_of

LINEARS = {
    name: Linear(name=name, role=kind, width=64)  # type: ignore[arg-type]
    for name, kind in (("blocks.0.q", "gemm"), ("blocks.0.mod", "vector"), ("embed", "edge"))
}
GOOD = (
    Rule(match=r"\.q$", action="w8a8"),
    Rule(match="mod", action="weight-only", reason="rows"),
    Rule(match="", action="float"),
)


def recipe(*rules: Rule) -> Recipe:
    return Recipe(model="m").model_copy(update={"rules": rules})


@given(
    st.builds(
        Recipe,
        model=st.text("abc/", min_size=1),
        scaling=st.sampled_from(["auto", "none", "dilate", "smooth"]),
        bins=st.one_of(st.just("auto"), st.integers(1, 9)),
        alpha=st.floats(0, 1),
        shift=st.sampled_from([None, True, False]),
        rules=st.sampled_from([None, GOOD]),
    )
)
def test_yaml_reads_back_to_an_equal_recipe(tmp_path_factory: pytest.TempPathFactory, value: Recipe) -> None:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(value.dump())
    assert Recipe.load(path) == value


@given(
    st.builds(
        Recipe,
        model=st.sampled_from(["no", "1e3", "null", "a: b", "ünï/x", " ", "#"]),  # words that YAML takes for something else
        method=st.sampled_from(["minmax", "percentile", "mse"]),
        percentile=st.floats(50, 100, exclude_min=True),
        bins=st.sampled_from(["per-step", 1, 1000]),
        rho=st.floats(1, 64),
        calib_size=st.integers(1, 100_000),
        steps=st.integers(1, 1000),
        guidance_scale=st.none() | st.floats(1, 1000),
        seed=st.integers(0, 2**64 - 1),
        timesteps=st.sampled_from(["auto", "shared", "per-sample"]),
        min_coverage=st.floats(0, 1),
        min_sqnr=st.floats(-1000, 1000),
        rules=st.lists(
            st.builds(
                Rule,
                match=st.text(max_size=5).map(re.escape),
                action=st.sampled_from(["w8a8", "weight-only", "float"]),
                reason=st.text(max_size=5),
            ),
            max_size=3,
        ).map(tuple),
    )
)
def test_yaml_keeps_every_value_to_the_last_bit(value: Recipe) -> None:
    assert Recipe.parse(yaml.safe_load(value.dump()), "test") == value


NAMES = st.text("abq.0", min_size=1, max_size=4)


@given(st.lists(NAMES, min_size=1, max_size=4), NAMES)
def test_rules_decide_in_order(matches: list[str], linear: str) -> None:
    rules = [Rule(match=re.escape(match), action="float", reason=str(i)) for i, match in enumerate(matches)]
    named = Linear(name=linear, role="gemm", width=64)
    decided = recipe(*rules, Rule(action="float", reason="last")).decide(named)
    assert decided is not None
    assert decided.reason == next((str(i) for i, match in enumerate(matches) if match in linear), "last")


def test_the_first_matching_rule_decides() -> None:
    decided = recipe(Rule(match="q", action="float", reason="mine"), *GOOD).decide(LINEARS["blocks.0.q"])
    assert decided is not None
    assert decided.reason == "mine"
    assert recipe(*GOOD).assign(LINEARS)["blocks.0.mod"].action == "weight-only"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scalling": "auto"}, "unknown key 'scalling'. Did you mean 'scaling'"),
        (
            {"bits": "w8a9"},
            "bits = 'w8a9': expected 'w8a8', 'w8a16', 'w6a6', 'w4a8', 'w4a16', 'w4a4' or 'fp8'. Did you mean 'w8a8'",
        ),
        ({"scaling": "smoth"}, "Did you mean 'smooth'"),
        ({"bins": 0}, "bins = 0: a number of bins must be from 1 to 1000"),
        ({"alpha": 2}, "alpha = 2: Input should be less than or equal to 1"),
        ({"rules": [{"match": "x", "action": "w8a8", "reson": ""}]}, "Did you mean 'reason'"),
        ({"rules": [{"match": "(", "action": "w8a8"}]}, r"'\(' is not a regular expression"),
        ({"steps": 0}, "steps = 0"),
        ({"min_sqnr": float("nan")}, "min_sqnr = nan: Input should be a finite number"),  # no SQNR is below NaN
    ],
)
def test_a_wrong_key_or_value_is_named_with_the_nearest_valid_one(values: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.parse({"model": "m", **values}, "here")


LIMITS = {
    "group_size": (65536, 65537, "65536"),
    "percentile": (100.0, float("nan"), "finite"),
    "alpha": (1.0, float("nan"), "finite"),
    "rho": (64.0, float("nan"), "finite"),
    "bins": (1000, 1001, "from 1 to 1000"),
    "calib_size": (100_000, 10**8, "100000"),
    "parity_size": (1000, 10**6, "1000"),
    "steps": (1000, 1001, "1000"),
    "guidance_scale": (1000.0, float("inf"), "finite"),
    "seed": (2**64 - 1, 2**64, str(2**64 - 1)),
    "min_coverage": (1.0, float("nan"), "finite"),
    "min_sqnr": (-1000.0, -1001.0, "-1000"),
}
"""By option: the last value that is accepted, one beyond it, and the limit that the message names."""


@pytest.mark.parametrize("option", LIMITS)
def test_every_number_has_a_limit_that_the_message_names(option: str) -> None:
    good, bad, limit = LIMITS[option]
    assert getattr(Recipe.parse({"model": "m", option: good}, "here"), option) == good
    with pytest.raises(RecipeError, match=rf"^here: {option} = .*{limit}"):
        Recipe.parse({"model": "m", option: bad}, "here")


def test_all_violations_come_at_once() -> None:
    with pytest.raises(RecipeError) as error:
        Recipe.parse({"bits": "w3a3", "alpa": 1}, "here")
    assert len(str(error.value).splitlines()) == 3  # bits, alpa, and the missing model


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((Rule(match="nothing", action="float"), *GOOD), "'nothing' .float. matches none of 3 linears"),
        ((Rule(match="", action="float"),), "leave no linear to quantize"),
        ((Rule(match="mod|q", action="w8a8"), Rule(match="", action="float")), "'blocks.0.mod' works on one row"),
        ((*GOOD[:2], Rule(match="embed", action="w8a8")), "'embed' is an embedder"),
        (GOOD[:2], "no rule matches 'embed'"),
        (GOOD[:1], "no rule matches 'blocks.0.mod', 'embed'; add a last rule"),
        ((Rule(match="blocks.0.qq", action="float"), *GOOD), "Did you mean 'blocks.0.q'"),
        ((), "no rule matches 'blocks.0.q', 'blocks.0.mod', 'embed'; add"),
    ],
)
def test_rules_that_cannot_be_followed_are_errors(rules: tuple[Rule, ...], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(*rules).assign(LINEARS)


def test_all_rules_that_cannot_be_followed_come_at_once() -> None:
    several = (
        Rule(match="nothing", action="float"),
        Rule(match="neither", action="weight-only"),
        Rule(match="mod", action="w8a8"),
    )
    edges = {f"other.{i}": Linear(name=f"other.{i}", role="edge", width=64) for i in range(5)}
    with pytest.raises(RecipeError) as error:
        recipe(*several).assign({**LINEARS, **edges})
    unmatched, wrong_rule, uncovered, modulation = str(error.value).splitlines()
    assert "'nothing' (float) matches none of 8" in unmatched
    assert "'neither' (weight-only) matches none" in wrong_rule
    assert "no rule matches 'blocks.0.q', 'embed', 'other.0' and 4 more" in uncovered
    assert "'blocks.0.mod' works on one row" in modulation


@pytest.mark.parametrize(
    ("text", "message"), [("- 1", "expected a mapping"), ("a: [", "not readable as YAML"), (None, "no such file")]
)
def test_unreadable_files_are_errors(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "r.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        Recipe.load(path)


def of_width(width: int) -> dict[str, Linear]:
    return {name: Linear(name=name, role=linear.role, width=width) for name, linear in LINEARS.items()}


def test_weight_only_without_blocks_that_divide_the_width_has_a_scale_for_each_channel() -> None:
    rule = recipe(*GOOD).assign(of_width(36))["blocks.0.mod"]
    assert (rule.scheme.block_size(36), rule.group_size) == (0, 0)
    assert rule.reason == "rows; no block of 16 to 128 divides its 36 inputs: one scale for each channel"
    assert recipe(*GOOD).assign(of_width(48))["blocks.0.mod"].scheme.block_size(48) == 16
    rules = (GOOD[0], Rule(match="mod", action="weight-only", group_size=16), GOOD[2])
    with pytest.raises(RecipeError, match=r"'blocks.0.mod' to weight-only: its 36 inputs are not divided by 16; "):
        recipe(*rules).assign(of_width(36))


@pytest.mark.parametrize(
    ("bits", "options", "remedy"),
    [
        ("w4a8", {}, "group_size 0 gives each output channel one scale"),
        ("w4a4", {}, "group_size 0 gives each output channel one scale"),
        ("w4a8", {"group_size": 64}, "group_size 0 gives each output channel one scale"),
        ("w4a16", {}, "choose bits w8a8"),
        ("w8a16", {}, "choose bits w8a8"),
        ("w8a8", {"granularity": "token-group"}, "choose granularity token"),
        ("w4a8", {"granularity": "token-group"}, "choose granularity token with group_size 0"),
    ],
)
def test_bits_whose_blocks_the_width_does_not_allow_are_refused_with_the_remedy(
    bits: str, options: dict[str, Any], remedy: str
) -> None:
    rules = (Rule(match=r"\.q$", action=bits), *GOOD[1:])  # type: ignore[arg-type]
    request = Recipe.parse({"model": "m", "bits": bits, **options}, "here").model_copy(update={"rules": rules})
    with pytest.raises(RecipeError, match=rf"^'blocks.0.q' to {bits}: its 36 inputs are not divided by .*; {remedy}, or leave"):
        request.assign(of_width(36))
    followed: dict[str, Any] = {"group_size": 0} if "group_size" in remedy else {"group_size": None}
    if "granularity" in remedy:
        followed["granularity"] = "token"
    result = recipe(*GOOD) if "w8a8" in remedy else request.model_copy(update=followed)
    assert result.assign(of_width(36))["blocks.0.q"].scheme.block_size(36) == 0


def test_a_rule_with_the_action_bits_takes_the_recipes_own() -> None:
    rules = (Rule(match=r"\.q$", action="bits", granularity="token"), *GOOD[1:])
    request = Recipe.parse({"model": "m", "bits": "w4a8", "group_size": 32}, "here").model_copy(update={"rules": rules})
    rule = request.assign(LINEARS)["blocks.0.q"]
    assert (rule.action, rule.scheme) == ("w4a8", scheme_of("w4a8", "token", 32))
    assert Recipe.parse(yaml.safe_load(request.dump()), "here") == request  # the file keeps the word


def test_an_unknown_key_beside_the_rules_is_compared_with_the_recipes_own() -> None:
    with pytest.raises(RecipeError, match=r"unknown key 'ruless'\. Did you mean 'rules'"):
        Recipe.parse({"model": "m", "ruless": []}, "here")


def test_default_rules_decide_by_role_and_may_match_nothing() -> None:
    assigned = recipe(*DEFAULT_RULES).assign(LINEARS)
    assert [rule.action for rule in assigned.values()] == ["w8a8", "weight-only", "float"]
    assert all(rule.reason for name, rule in assigned.items() if name != "blocks.0.q")
    text = Linear(name="text.k", role="static", width=64)
    assert recipe(*DEFAULT_RULES).assign({**LINEARS, "text.k": text})["text.k"].action == "w8a8"
    first = recipe(Rule(match=r"^text", role="static", action="float", reason="mine"), *DEFAULT_RULES)
    assert first.assign({"text.k": text, **LINEARS})["text.k"].reason == "mine"
    with pytest.raises(RecipeError, match=r"rule 'role static .text' .float. matches none of 3 linears"):
        first.assign(LINEARS)


def test_an_unknown_role_is_named() -> None:
    with pytest.raises(RecipeError, match=r"rules.0.role = 'gem': expected .* or 'static'. Did you mean 'gemm'"):
        Recipe.parse({"model": "m", "rules": [{"role": "gem", "action": "bits"}]}, "here")
