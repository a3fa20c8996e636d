"""Recipes: what is asked for, and how a wrong request is answered."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dq_export.calibration.denoiser import Linear
from dq_export.calibration.recipe import Recipe, RecipeError, Rule

LINEARS = {
    name: Linear(name=name, kind=kind)  # type: ignore[arg-type]
    for name, kind in (("blocks.0.q", "gemm"), ("blocks.0.mod", "modulation"), ("embed", "edge"))
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


def test_the_first_matching_rule_decides() -> None:
    value = recipe(Rule(match="q", action="float", reason="mine"), *GOOD, Rule(match="q", action="w8a8"))
    assert value.decide("blocks.0.q").reason == "mine"
    assert recipe(*GOOD).assign(LINEARS)["blocks.0.mod"].action == "weight-only"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scalling": "auto"}, "unknown key 'scalling'. Did you mean 'scaling'"),
        ({"bits": "w8a9"}, "bits = 'w8a9': expected 'w8a8'. Did you mean 'w8a8'"),
        ({"scaling": "smoth"}, "Did you mean 'smooth'"),
        ({"bins": 0}, "bins = 0: a number of bins must be at least 1"),
        ({"alpha": 2}, "alpha = 2: Input should be less than or equal to 1"),
        ({"rules": [{"match": "x", "action": "w8a8", "reson": ""}]}, "Did you mean 'reason'"),
        ({"rules": [{"match": "(", "action": "w8a8"}]}, r"'\(' is not a regular expression"),
        ({"steps": 0}, "steps = 0"),
    ],
)
def test_a_wrong_key_or_value_is_named_with_the_nearest_valid_one(values: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.parse({"model": "m", **values}, "here")


def test_all_violations_come_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse({"bits": "w3a3", "alpa": 1}, "here")
    assert len(str(caught.value).splitlines()) == 3  # bits, alpa, and the missing model


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((Rule(match="nothing", action="float"), *GOOD), "'nothing' .float. matches none of 3 linears"),
        ((Rule(match="", action="float"),), "leave no linear to quantize"),
        ((Rule(match="mod|q", action="w8a8"), Rule(match="", action="float")), "'blocks.0.mod' works on one row"),
        ((*GOOD[:2], Rule(match="embed", action="w8a8")), "'embed' is an embedder"),
        (GOOD[:2], "no rule matches 'embed'"),
    ],
)
def test_rules_that_cannot_be_followed_are_errors(rules: tuple[Rule, ...], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(*rules).assign(LINEARS)


@pytest.mark.parametrize(
    ("text", "message"), [("- 1", "expected a mapping"), ("a: [", "not readable as YAML"), (None, "no such file")]
)
def test_unreadable_files_are_errors(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "r.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        Recipe.load(path)
