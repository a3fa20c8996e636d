"""Data objects: scales, bins, element types."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dq_export.core.qtypes import QUANT_TYPES
from dq_export.core.scales import ScaleTable, TimestepBins

EDGES = st.lists(st.integers(0, 1000), unique=True, max_size=8).map(
    lambda e: TimestepBins(edges=tuple(float(x) for x in sorted(e)))
)


@given(EDGES, st.integers(-5, 1005))
def test_a_timestep_lies_in_its_half_open_bin(bins: TimestepBins, timestep: int) -> None:
    index = int(bins.index(timestep))
    bounds = (-np.inf, *bins.edges, np.inf)
    assert bounds[index] <= timestep < bounds[index + 1]


@given(EDGES, EDGES, st.integers(-5, 1005))
@settings(max_examples=50)
def test_resampling_to_a_union_changes_no_scale(one: TimestepBins, two: TimestepBins, timestep: int) -> None:
    table = ScaleTable(scale=np.arange(1, len(one) + 1, dtype=np.float32), bins=one)
    finer = table.resample(one.union(two))
    assert finer.at(timestep) == table.at(timestep)
    assert set(one.edges) | set(two.edges) == set(finer.bins.edges)


@given(EDGES)
def test_a_bins_representative_lies_in_it(bins: TimestepBins) -> None:
    assert bins.index(np.asarray(bins.representatives())).tolist() == list(range(len(bins)))


@given(EDGES, EDGES, EDGES)
def test_union_is_that_of_sets(one: TimestepBins, two: TimestepBins, three: TimestepBins) -> None:
    assert one.union(two) == two.union(one)
    assert one.union(two).union(three) == one.union(two.union(three))
    assert one.union(one) == one == one.union(TimestepBins())
    for coarse in (one, two):  # refines: timesteps of one fine bin share their coarse bin
        fine = one.union(two)
        timesteps = np.arange(-1, 1002) + 0.5
        pairs = set(zip(fine.index(timesteps).tolist(), coarse.index(timesteps).tolist(), strict=True))
        assert len(pairs) == len({f for f, _ in pairs})


def test_resampling_to_coarser_bins_is_refused() -> None:
    table = ScaleTable(scale=np.ones(2, dtype=np.float32), bins=TimestepBins(edges=(5.0,)))
    with pytest.raises(ValueError, match=r"missing edges \[5.0\]"):
        table.resample(TimestepBins())


@pytest.mark.parametrize("edges", [(2.0, 1.0), (1.0, 1.0), (float("nan"),), (float("inf"),)])
def test_bad_edges_are_refused(edges: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="edges must"):
        TimestepBins(edges=edges)


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf])
def test_bad_scales_are_refused(scale: float) -> None:
    with pytest.raises(ValueError, match="finite and > 0"):
        ScaleTable(scale=np.asarray([scale], dtype=np.float32))


def test_a_table_has_a_scale_for_each_bin() -> None:
    with pytest.raises(ValueError, match=r"float32\[1\]"):
        ScaleTable(scale=np.ones(2, dtype=np.float32))


def test_tables_are_equal_by_content_and_cannot_be_written() -> None:
    one, two = (ScaleTable(scale=np.ones(1, dtype=np.float32)) for _ in range(2))
    assert one == two
    assert hash(one) == hash(two)
    with pytest.raises(ValueError, match="read-only"):
        one.scale[0] = 2


def test_codes_are_symmetric_about_the_zero_point() -> None:
    for qtype in QUANT_TYPES:
        largest = 448 if qtype.mantissa else 2 ** (qtype.bits - 1) - 1
        assert qtype.qmax - qtype.zero_point == qtype.zero_point - qtype.qmin == largest
