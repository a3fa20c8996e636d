"""Codes that stay on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dq_export.core.artifacts import CalibrationError, CalibrationResult
from dq_export.core.stored_codes import load_without_codes


def test_codes_are_read_from_the_file_when_they_are_used(tmp_path: Path) -> None:
    codes = {name: np.full((2, 3), value, dtype=np.int8) for name, value in (("a", 1), ("b.c", -7))}
    scales = {name: np.ones(2, dtype=np.float32) for name in (*codes, "d")}
    path = tmp_path / "calibration.safetensors"
    CalibrationResult(sites={}, weight_scale=scales, codes=codes, provenance={}).save(path)
    loaded = load_without_codes(path)
    assert sorted(loaded.codes) == ["a", "b.c"]
    assert len(loaded.codes) == 2
    assert loaded.codes.get("d") is None
    np.testing.assert_array_equal(loaded.codes["b.c"], codes["b.c"])
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    path.unlink()
    with pytest.raises(CalibrationError, match=r"calibration\.safetensors: no such file"):
        loaded.codes["a"]
