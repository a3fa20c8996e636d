"""A plan that runs: its outputs, and inputs that it does not take."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dq_export.deploy.backend import BackendError
from dq_export.deploy.tensorrt import backend, runner
from dq_export.deploy.tensorrt.backend import TensorRtRtx
from dq_export.deploy.tensorrt.runner import PlanEngine, load_plan


class Buffer:
    """Answers as polygraphy's runner does, which needs a GPU: every call writes to the same memory."""

    def __init__(self) -> None:
        self.memory = np.zeros(2, dtype=np.float32)

    def infer(self, feed: Any, **options: Any) -> dict[str, Any]:
        from polygraphy.exception import PolygraphyException

        if feed["x"].shape != (2,):
            raise PolygraphyException(f"For input: x, failed to set shape to:\n {feed['x'].shape}")
        self.memory += feed["x"]
        return {"sample": self.memory}


def test_outputs_of_a_plan_stay_and_inputs_of_other_sizes_are_refused_in_one_line() -> None:
    plan = PlanEngine(engine=None)
    plan.__dict__["_active"] = Buffer()
    first, second = (plan({"x": np.ones(2, dtype=np.float32)}) for _ in range(2))
    assert (first.tolist(), second.tolist()) == ([1, 1], [2, 2])
    with pytest.raises(
        BackendError, match=r"^the plan cannot run on these inputs \(.* to: \(3,\)\); it takes only the sizes .* set$"
    ):
        plan({"x": np.ones(3, dtype=np.float32)})


@pytest.mark.parametrize(
    ("gpu", "runs", "remedy"),
    [
        ("sm89", True, ""),
        ("sm121", True, ""),
        ("sm86", False, "--target sm86"),
        ("sm90", False, "--format trt, for TensorRT-RTX does not run there"),
    ],
)
def test_an_export_leaves_out_what_this_gpu_cannot_run(
    gpu: str, runs: bool, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on an H200, which TensorRT-RTX refuses: the plan is built and audited, and not run."""
    for module in (backend, runner):
        monkeypatch.setattr(module, "compute_capability", lambda: gpu)
    targets = ("sm89", "sm120")
    assert TensorRtRtx(targets=targets).runs == runs
    if not runs:
        with pytest.raises(BackendError, match=f"^the plan is for sm89, sm120, this GPU is {gpu}; build it with {remedy}$"):
            load_plan(b"", targets, rtx=True)
