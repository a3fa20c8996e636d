"""Work in a process of its own."""

from __future__ import annotations

from dq_export.deploy.child import Exit, run_child


def test_a_child_that_ends_before_it_reads_its_request_is_no_traceback() -> None:
    """The request is larger than a pipe holds, so that it cannot be written before the child is gone."""
    end = run_child("dq_export.deploy.no_such_module", "x" * 10**6, lambda answer: None)
    assert isinstance(end, Exit)
    assert end.status == 1
    assert "No module named dq_export.deploy.no_such_module" in end.reason
