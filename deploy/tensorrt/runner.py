"""Running a plan on the NVIDIA GPU of this machine, through polygraphy."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dq_export.core.documents import printable

from ..backend import BackendError, Feed, Float32


@dataclass(frozen=True, eq=False)
class PlanEngine:
    """A plan on the GPU.

    Args:
        engine: the library's ICudaEngine.
    """

    engine: Any

    def runner(self, name: str) -> Any:
        """Polygraphy's runner of the plan, not activated."""
        from polygraphy.backend.trt import TrtRunner

        return TrtRunner(self.engine, name=name)

    @cached_property
    def _active(self) -> Any:
        runner = self.runner("plan")
        runner.activate()
        return runner

    def __call__(self, feed: Feed) -> Float32:
        from polygraphy.exception import PolygraphyException

        try:
            outputs: dict[str, Float32] = self._active.infer(dict(feed), check_inputs=False, copy_outputs_to_host=True)
        except PolygraphyException as error:
            reason = printable(" ".join(str(error).split()))
            raise BackendError(
                f"the plan cannot run on these inputs ({reason}); it takes the sizes that it was built for, which --min-shapes, "
                "--opt-shapes and --max-shapes name"
            ) from error
        # A copy: polygraphy writes the next call's output to the same memory, and samplers of several steps keep outputs.
        result: Float32
        (result,) = (output.copy() for output in outputs.values())
        return result


def load_plan(plan: bytes, targets: tuple[str, ...], *, rtx: bool) -> PlanEngine:
    """Load a plan.

    Args:
        targets: compute capabilities that it was built for; empty: the GPU at hand was.
        rtx: TensorRT-RTX's plan, not TensorRT's.

    Raises:
        BackendError: no NVIDIA GPU, or one that the plan is not for.
    """
    found = compute_capability()
    if not found:
        raise BackendError("a plan runs on an NVIDIA GPU, and this machine shows none")
    if targets and not any(_runs_on(target, found) for target in targets):
        raise BackendError(f"the plan is for {', '.join(targets)}, this GPU is {found}; build it with --target {found}")
    from polygraphy import config

    config.USE_TENSORRT_RTX = rtx  # read when its backend is first imported
    from polygraphy.backend.trt import EngineFromBytes

    return PlanEngine(engine=EngineFromBytes(plan)())


def compute_capability() -> str:
    """`sm89` and the like, of the first GPU; empty where the driver shows none.

    Source: CUDA driver API, cuDeviceGetAttribute, attributes 75 and 76.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ""
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return ""
    if driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device) or driver.cuDeviceGetAttribute(
        ctypes.byref(minor), 76, device
    ):
        return ""
    return f"sm{major.value}{minor.value}"


def _runs_on(target: str, found: str) -> bool:
    """A plan for one minor version runs on later ones of the same major version."""
    return target[:-1] == found[:-1] and target <= found
