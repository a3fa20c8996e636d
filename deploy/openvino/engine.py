"""A network on OpenVINO's own runtime, for processors that ONNX Runtime's plugin does not support."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir

from dq_export.passes.names import origin
from dq_export.passes.sizes import unbatched_inputs

from ..backend import BackendError, Feed, Float32
from ..packages import require_packages


@dataclass(frozen=True, eq=False)
class OpenVinoEngine:
    """An openvino.InferRequest of a compiled network with one output."""

    request: Any

    def runner(self, name: str) -> Any:
        """A runner of the same request, not yet activated; polygraphy has no runner for OpenVINO."""
        from polygraphy.backend.base import BaseRunner
        from polygraphy.common import TensorMetadata

        request = self.request

        class OpenVinoRunner(BaseRunner):  # type: ignore[misc]  # polygraphy is untyped
            def get_input_metadata_impl(self) -> Any:
                metadata = TensorMetadata()
                for port in request.get_compiled_model().inputs:
                    shape = [size.get_length() if size.is_static else None for size in port.partial_shape]
                    metadata.add(port.any_name, dtype=port.element_type.to_dtype(), shape=shape)
                return metadata

            def infer_impl(self, feed_dict: Feed) -> dict[str, Float32]:
                return {port.any_name: value for port, value in request.infer(dict(feed_dict)).items()}

        return OpenVinoRunner(name=name)

    def __call__(self, feed: Feed) -> Float32:
        try:
            result: Float32 = self.request.infer(dict(feed))[0]
        except RuntimeError as error:
            raise BackendError(f"OpenVINO cannot run the graph on these inputs: {' '.join(str(error).split())}") from error
        return result

    def bound(self, feed: Feed) -> Callable[[], Float32]:
        """The call of one feed, which lies where the CPU reads it."""
        return partial(self, feed)

    def kernels(self) -> dict[str, list[str]]:
        """Node name -> [layer type, precision] of the kernel that runs it."""
        kernels_by_node: dict[str, list[str]] = {}
        for operation in self.request.get_compiled_model().get_runtime_model().get_ops():
            info = operation.get_rt_info()
            kind, precision, names = (info[key].value for key in ("layerType", "runtimePrecision", "originalLayersNames"))
            for name in names.split(","):
                # OpenVINO names a MatMul with integer inputs `<node>/DequantizationMultiply`.
                kernels_by_node.setdefault(origin(name), [kind, precision])
        return kernels_by_node


def openvino() -> Any:
    """The library.

    Raises:
        BackendError: it is not installed.
    """
    require_packages(["openvino"], "--provider openvino")
    import openvino as library

    return library


def load_engine(model: Path, config: Mapping[str, Any], batch: int | None) -> OpenVinoEngine:
    """Compile a graph for this processor.

    Args:
        config: OpenVINO's properties of the CPU device.
        batch: the first dimension of every input that has a batch; None leaves it open.

    Raises:
        BackendError: OpenVINO refuses the graph.
    """
    core = openvino().Core()
    try:
        network = core.read_model(model)
        if batch is not None:
            shared = unbatched_inputs(ir.load(model))
            network.reshape(
                {port.any_name: _sizes(port.partial_shape, -1 if port.any_name in shared else batch) for port in network.inputs}
            )
        return OpenVinoEngine(request=core.compile_model(network, "CPU", dict(config)).create_infer_request())
    except RuntimeError as error:
        raise BackendError(f"OpenVINO refuses {model}: {error}") from error


def _sizes(shape: Any, batch: int) -> list[int]:
    """A partial shape with a fixed batch; -1 is a size that stays open."""
    first, *rest = [-1 if size.is_dynamic else int(size.get_length()) for size in shape]
    return [batch if first < 0 else first, *rest]
