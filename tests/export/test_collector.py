"""The garbage collector passes over what a run keeps, and over nothing after it."""

from __future__ import annotations

import gc
import weakref

import pytest

from dq_export.collector import collect_everything, collector_paused, collector_spared


class Cycle:
    """An object that only the collector frees."""

    def __init__(self) -> None:
        self.cycle = self


@pytest.fixture(autouse=True)
def _nothing_is_passed_over() -> None:
    assert gc.get_freeze_count() == 0


def test_older_objects_are_skipped_until_everything_is_collected() -> None:
    old = Cycle()
    reference = weakref.ref(old)
    with collector_spared():
        del old
        gc.collect()
        assert reference() is not None
        collect_everything()
        assert reference() is None
        assert gc.get_freeze_count() > 0
    assert gc.get_freeze_count() == 0


def test_after_an_error_it_collects_again() -> None:
    with pytest.raises(ValueError, match="stop"), collector_spared():
        raise ValueError("stop")
    assert gc.get_freeze_count() == 0
    with pytest.raises(ValueError, match="stop"), collector_paused():
        raise ValueError("stop")
    assert gc.isenabled()


def test_a_paused_collector_frees_nothing_by_itself() -> None:
    with collector_paused():
        assert not gc.isenabled()
    assert gc.isenabled()
