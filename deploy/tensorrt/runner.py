"""Run a plan on the NVIDIA GPU of this machine, through polygraphy."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from dq_export.core.documents import printable

from ..backend import BackendError, Feed, Float32
from ..check.rules_nvidia import TARGETS


@dataclass(frozen=True, eq=False)
class PlanEngine:
    """A plan on the GPU.

    Args:
        engine: the library's ICudaEngine.
    """

    engine: Any

    def runner(self, name: str) -> Any:
        """Polygraphy's runner of the plan, not yet activated."""
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
                f"the plan cannot run on these inputs ({reason}); it takes only the sizes that it was built for, which "
                "--min-shapes, --opt-shapes and --max-shapes set"
            ) from error
        # Copied because polygraphy writes the next call's output to the same memory, and multistep samplers keep outputs.
        result: Float32
        (result,) = (output.copy() for output in outputs.values())
        return result

    def bound(self, feed: Feed) -> Callable[[], Float32]:
        """The call of one feed, whose inputs are copied to the GPU once."""
        from polygraphy.cuda import DeviceArray

        placed: dict[str, Any] = {}
        for name, value in feed.items():
            array = np.ascontiguousarray(value)
            placed[name] = DeviceArray(shape=array.shape, dtype=array.dtype).copy_from(array)
        return partial(self, placed)


def load_plan(plan: bytes, targets: tuple[str, ...], *, rtx: bool) -> PlanEngine:
    """Load a plan.

    Args:
        targets: compute capabilities that it was built for; empty for this machine's GPU.
        rtx: whether it is a plan of TensorRT-RTX and not of TensorRT.

    Raises:
        BackendError: there is no NVIDIA GPU, or the plan is for other GPUs.
    """
    capability = compute_capability()
    if not capability:
        raise BackendError("a plan runs on an NVIDIA GPU, and this machine shows none")
    require_target(targets, capability)
    from polygraphy import config

    config.USE_TENSORRT_RTX = rtx  # read when its backend is first imported
    from polygraphy.backend.trt import EngineFromBytes

    return PlanEngine(engine=EngineFromBytes(plan)())


def compute_capability() -> str:
    """The compute capability of the first GPU, such as `sm89`; empty if the driver shows none.

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


def require_target(targets: tuple[str, ...], capability: str) -> None:
    """Check that a plan for `targets` runs on a GPU.

    Raises:
        BackendError: it does not; the message says what to build.
    """
    if not runs_on(targets, capability):
        other = f"--target {capability}" if capability in TARGETS else "--format trt, for TensorRT-RTX does not run there"
        raise BackendError(f"the plan is for {', '.join(targets)}, this GPU is {capability}; build it with {other}")


def runs_on(targets: tuple[str, ...], capability: str) -> bool:
    """Whether a plan for `targets` runs on a GPU: a target has the GPU's major version and no later minor version.

    Args:
        targets: empty for the GPU of this machine.
    """
    return not targets or any(target[:-1] == capability[:-1] and target <= capability for target in targets)
