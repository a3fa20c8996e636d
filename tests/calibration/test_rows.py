"""Rows that stand for all rows of a site."""

from __future__ import annotations

import numpy as np
import pytest

from dq_export.calibration.collect.rows import spread


@pytest.mark.parametrize("width", [8, 16, 32, 64])
@pytest.mark.parametrize("samples", [1, 2, 3, 4, 8, 16])
def test_every_column_of_pictures_and_every_sample_is_found_evenly(width: int, samples: int) -> None:
    count = samples * width * width
    chosen = spread(count, 256).numpy()
    assert len(chosen) == min(count, 256)
    assert (np.diff(chosen) > 0).all()
    assert 0 <= chosen[0] <= chosen[-1] < count
    columns = np.bincount(chosen % width, minlength=width)
    lines = np.bincount(chosen // width % width, minlength=width)
    assert max(columns.max(), lines.max()) <= 1.6 * len(chosen) / width + 2
    assert min(columns.min(), lines.min()) >= 0.4 * len(chosen) / width - 1
    assert len(set(chosen // (width * width))) == samples


def test_few_rows_are_all_used() -> None:
    assert spread(5, 256).tolist() == [0, 1, 2, 3, 4]
    assert spread(0, 256).tolist() == []
