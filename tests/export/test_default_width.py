"""What `--bits w4a8` means where nothing else is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import dq_export
from dq_export.core.recipe import Recipe
from dq_export.core.rule import Rule
from dq_export.families.reference import Reference
from dq_export.preparation import resolve

FIRST = r"^(transformer_blocks\.0)\."


@pytest.mark.parametrize(
    ("options", "granularity", "wide"),
    [
        ({}, "token", True),
        ({"rounding": "distill", "group_size": 32}, "token", True),
        ({"granularity": "tensor"}, "tensor", False),
        ({"granularity": "token"}, "token", False),
        ({"rules": [{"match": "", "action": "bits"}]}, "token", False),
        ({"tables": "t.safetensors"}, "tensor", False),
        ({"bits": "w8a8"}, "tensor", False),
    ],
)
def test_a_granularity_or_rules_of_the_user_are_kept(
    options: dict[str, Any], granularity: str, wide: bool, tiny: Reference
) -> None:
    recipe = resolve(Recipe.parse({"model": "m", "bits": "w4a8", **options}, "test"), (), tiny, None)
    assert recipe.rules is not None
    assert recipe.granularity == granularity
    assert any((rule.match, rule.action) == (FIRST, "w8a8") for rule in recipe.rules) == wide


def test_a_familys_own_exceptions_come_before_the_first_blocks(tiny: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    family_rule = Rule(match=r"\.ff\.", action="float", reason="the family's")
    monkeypatch.setattr(tiny, "rules", (family_rule, *tiny.rules))
    recipe = resolve(Recipe.parse({"model": "m", "bits": "w4a8"}, "test"), (), tiny, None)
    assert recipe.rules is not None
    assert [rule.action for rule in recipe.rules[:3]] == ["float", "w8a8", "bits"]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["dit-digits", "pixart-digits"])
def test_w4a8_keeps_20_db_of_every_call(model: str, tmp_path: Path) -> None:
    report = dq_export.export(model=model, bits="w4a8", parity_size=1, output_dir=tmp_path / "out")
    assert report.verdict is not None
    assert (report.verdict.outcome, report.verdict.min_sqnr) == ("passed", 20)
    assert report.audit is not None
    assert {gemm.wanted for gemm in report.audit.gemms if gemm.required} == {"w4a8", "w8a8"}
    assert report.audit.coverage == 1
