"""What calibration decided, as data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dq_export.core.artifacts import CalibrationError, CalibrationResult, SitePlan
from dq_export.core.folds import Fold, Part
from dq_export.core.network import InputSite
from dq_export.core.scales import ScaleTable, TimestepBins

SCALE = Part(kind="linear", name="m", rows=(3, 6), channels=(0, 3), plus=1.0)
SHIFT = Part(kind="linear", name="m", rows=(0, 3), channels=(0, 3), shift=True)
ONES, ZEROS = np.ones(3, dtype=np.float32), np.zeros(3, dtype=np.float32)
PATCHES = {"in_scale": np.arange(1, 7, dtype=np.float32), "in_shift": ZEROS.repeat(2)}
"""Two elements of each channel, with scales of their own."""


def plan(name: str = "a", edges: tuple[float, ...] = (), **changes: Any) -> SitePlan:
    table = ScaleTable(scale=np.arange(1, len(edges) + 2, dtype=np.float32), bins=TimestepBins(edges=edges))
    site = InputSite(name=name, linears=(name, "b"), fold=Fold(parts=(SCALE, SHIFT), shifts=True))
    values = {"site": site, "method": "none", "in_scale": ONES, "in_shift": ZEROS, "activation": table}
    return SitePlan(**{**values, **changes})


def result(*plans: SitePlan) -> CalibrationResult:
    return CalibrationResult(
        sites={item.site.name: item for item in plans},
        weight_scale={"b": np.asarray([0.5], dtype=np.float32), "x.y": np.asarray([[1, 2], [3, 4]], dtype=np.float32)},
        provenance={"seed": "3", "model": "Zoë"},
    )


def test_a_result_reads_back_with_its_errors_weights_and_provenance(tmp_path: Path) -> None:
    saved = result(
        plan("z", error=0.25, method="smooth(0.5)+shift", alternatives={"none": 0.5, "smooth(0.5)+shift": 0.25}),
        plan("a", (1.5, 7.0)),
    )
    saved.save(tmp_path / "c")
    loaded = CalibrationResult.load(tmp_path / "c")
    assert list(loaded.sites) == ["z", "a"], "execution order, not the alphabet's"
    assert (loaded.sites["z"].method, loaded.sites["z"].error) == ("smooth(0.5)+shift", 0.25)
    assert loaded.sites["z"].alternatives == {"none": 0.5, "smooth(0.5)+shift": 0.25}
    assert loaded.sites["a"].alternatives == {}
    assert np.isnan(loaded.sites["a"].error), "not measured stays not measured"
    assert loaded.sites["a"].site == saved.sites["a"].site
    assert loaded.sites["a"].activation == saved.sites["a"].activation
    assert loaded.provenance == saved.provenance
    assert set(loaded.weight_scale) == set(saved.weight_scale)
    for name, scale in saved.weight_scale.items():
        np.testing.assert_array_equal(loaded.weight_scale[name], scale)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("cut") / "c"
    result(plan()).save(path)
    return path, path.read_bytes()


@given(st.floats(0, 1, exclude_max=True))
@settings(max_examples=50)
def test_a_file_cut_anywhere_is_an_error(whole: tuple[Path, bytes], share: float) -> None:
    path, content = whole
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CalibrationError, match=r"not a readable calibration file .*delete it and calibrate again"):
        CalibrationResult.load(path)


def test_a_missing_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"nowhere\.safetensors: not a readable"):
        CalibrationResult.load(tmp_path / "nowhere.safetensors")


def test_the_bins_of_a_result_refine_those_of_every_site() -> None:
    assert result(plan("a", (1.0, 5.0)), plan("c", (2.0, 5.0)), plan("d")).bins().edges == (1.0, 2.0, 5.0)
    assert len(result(plan()).bins()) == 1


@pytest.mark.parametrize(
    ("changes", "scaled"),
    [({}, False), ({"in_scale": ONES * 2}, True), ({"in_shift": ONES}, True), ({"in_shift": -ZEROS}, False)],
)
def test_a_plan_knows_whether_it_scales(changes: dict[str, Any], scaled: bool) -> None:
    assert plan(**changes).scaled is scaled


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_scale": ZEROS}, "in_scale must be > 0"),
        ({"in_scale": -ONES}, "in_scale must be > 0"),
        ({"in_scale": ONES[:2]}, "as long as in_shift"),
        ({"in_scale": ONES * np.float32("inf")}, "in_scale must be finite"),
        ({"in_shift": ONES * np.float32("nan")}, "in_shift must be finite"),
        ({"in_scale": ONES.astype(np.float64)}, r"in_scale must be finite float32\[K\]"),
        ({"in_scale": ONES[None]}, r"in_scale must be finite float32\[K\]"),
        (PATCHES, "in_scale must be equal for all elements of a channel's patch"),
    ],
)
def test_a_plan_that_cannot_be_folded_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^a: .*{message}"):
        plan(**changes)
