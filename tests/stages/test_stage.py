"""Each stage declares everything on which its outputs depend."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from dq_export.core.recipe import Recipe
from dq_export.ledger import Ledger
from dq_export.pipeline import STAGES
from dq_export.stages.calibrate import Calibrated

DECIDES_NOTHING_BY_ITSELF = {
    "model": "the digest of the checkpoint",
    "revision": "the digest of the checkpoint",
    "variant": "the digest of the checkpoint, and the decoder",
    "lora": "the digest of the checkpoint that it is fused into",
    "lora_sha256": "the digest of the checkpoint that it is fused into",
    "conditions": "the digest of its file",
    "tables": "the digest of its file",
    "rounding": "what calibration rounds by, and whether the stage that trains runs",
    "rules": "what they decide for each linear",
    "bits": "what the rules decide",
    "granularity": "what the rules decide",
    "group_size": "what the rules decide",
    "min_coverage": "the verdict alone, which no stage keeps",
    "min_sqnr": "the verdict alone",
    "max_lpips": "the verdict alone",
    "metric_weights": "the digests of its files",
    "triton": "whether its stage runs",
    "layout": "whether its stage runs",
}
"""Fields of a recipe that no stage has to declare, and through what they act."""


def test_each_field_of_a_recipe_decides_a_stage() -> None:
    declared = {field for stage in STAGES for field in stage.fields}
    assert declared <= set(Recipe.model_fields)
    assert set(Recipe.model_fields) - declared <= DECIDES_NOTHING_BY_ITSELF.keys()


def test_a_stage_needs_only_stages_before_it() -> None:
    for number, stage in enumerate(STAGES):
        assert set(stage.needs) <= set(STAGES[:number]), stage.name


@pytest.mark.parametrize("edges", [(2.0, 1.0), (1.0, float("nan")), (1.0, 1.0)])
def test_bins_that_the_ledger_describes_badly_are_no_result(edges: tuple[float, ...], tmp_path: Path) -> None:
    with pytest.raises(ValidationError):
        Calibrated(edges=edges)
    assert Calibrated(edges=(1.0, 2.0)).bins.index([0.5, 1.5, 2.5]).tolist() == [0, 1, 2]


def test_a_calibration_comes_back_from_the_ledger_as_it_was(tmp_path: Path) -> None:
    result = Calibrated(edges=(0.1, 500.0), timesteps=(1.0, 999.0), sqnr={"a": [30.1, None]})
    results = [Ledger(tmp_path).stage("s", Calibrated, {}, (), lambda target: result) for _ in range(2)]
    assert results == [(result, True), (result, False)]
