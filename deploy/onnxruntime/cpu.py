"""ONNX Runtime on the CPU."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from dq_export.core.artifacts import CalibrationResult
from dq_export.core.documents import printable, shown
from dq_export.core.progress import Advance, unwatched
from dq_export.core.rule import Rule
from dq_export.core.scheme import PRESETS, Scheme
from dq_export.passes.base import GraphPass
from dq_export.passes.legalise.fuse_attention import FuseAttention
from dq_export.passes.legalise.integer_convolutions import IntegerConvolutions
from dq_export.passes.legalise.plain_group_norms import PlainGroupNorms
from dq_export.passes.legalise.raise_biases import RaiseBiases
from dq_export.passes.legalise.trim_text import TrimText
from dq_export.passes.legalise.unsign_codes import UnsignCodes
from dq_export.passes.pipeline import factoring_passes

from ..audit import Audit, audit_ort
from ..backend import Backend, BackendError, Built, Feed, Float32
from ..check.ort_unpacking import BYTES_IN_FLOAT, BYTES_SINCE
from ..lowerings import ANY_KERNEL, Lowering, Refusal, integer_gemm, unpacked_blocks
from ..packages import require_packages

PROFILED = 5
"""The number of calls in a profile."""
PROVIDERS = ["CPUExecutionProvider"]
OPTIMIZED = "optimized.onnx"
ELEMENTS = {"float": np.float32, "float16": np.float16, "double": np.float64, "int64": np.int64, "int32": np.int32}
"""Element types of inputs, by ONNX Runtime's names."""
ATTENTION_SINCE = (1, 24)
"""The first version that runs graphs of opset 23; earlier ones have no QuantizeLinear for them."""
SIGNED_CONVOLUTIONS_SINCE = (1, 24)
"""The first version whose ConvInteger takes int8 activations."""


@dataclass(frozen=True, eq=False)
class OrtEngine:
    """An onnxruntime.InferenceSession with one output.

    Args:
        memory: where it computes, as ONNX Runtime's device type, number, and PCI vendor id (-1: that of the type).
    """

    session: Any
    memory: tuple[str, int, int] = ("cpu", 0, -1)

    def misfit(self, feed: Feed) -> str:
        """Why the graph cannot take a feed, by names, element types and shapes; empty if it can."""
        types = {f"tensor({kind})": dtype for kind, dtype in ELEMENTS.items()}
        inputs = self.session.get_inputs()
        if set(feed) != {item.name for item in inputs}:
            return f"inputs {', '.join(map(shown, feed))}, expected {', '.join(item.name for item in inputs)}"
        sizes: dict[object, int] = {}
        for item in inputs:
            value = feed[item.name]
            fits = value.dtype == types.get(item.type) and value.ndim == len(item.shape)
            for name, size in zip(item.shape, value.shape, strict=False):
                # A name denotes the same size in every input.
                fits &= size == (name if isinstance(name, int) else sizes.setdefault(name, size))
            if not fits:
                return f"'{item.name}' is {value.dtype}{list(value.shape)}, expected {item.type} {item.shape}"
        return ""

    def runner(self, name: str) -> Any:
        """Polygraphy's runner of the session, not yet activated."""
        from polygraphy.backend.onnxrt import OnnxrtRunner

        return OnnxrtRunner(self.session, name=name)

    def __call__(self, feed: Feed) -> Float32:
        with _runs():
            result: Float32 = self.session.run(None, dict(feed))[0]
        return result

    def bound(self, feed: Feed) -> Callable[[], Float32]:
        """The call of one feed, whose inputs are copied to the engine's memory once, by ONNX Runtime's io-binding."""
        binding = self.session.io_binding()
        with _runs():
            for name, value in feed.items():
                placed = onnxruntime().OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value), *self.memory)
                binding.bind_ortvalue_input(name, placed)
            binding.bind_output(self.session.get_outputs()[0].name)
            binding.synchronize_inputs()

        def run() -> Float32:
            with _runs():
                self.session.run_with_iobinding(binding)
                output: Float32 = binding.copy_outputs_to_cpu()[0]
            return output

        return run


@contextmanager
def _runs() -> Iterator[None]:
    """Calls of a session.

    Raises:
        BackendError: ONNX Runtime does not take the inputs.
    """
    try:
        yield
    except session_errors() as error:
        raise BackendError(f"ONNX Runtime cannot run the graph on these inputs: {' '.join(str(error).split())}") from error


@dataclass(frozen=True)
class Ort(Backend):
    """ONNX Runtime's CPU provider.

    A build writes the optimised graph as `optimized.onnx` for the audit; sessions load the graph itself.
    """

    name: ClassVar[str] = "ort"
    provider: ClassVar[str | None] = "cpu"
    title: ClassVar[str] = "ONNX Runtime's CPU provider"
    triton: ClassVar[str] = "onnxruntime"

    def require(self) -> None:
        """Check that the library is installed."""
        require_packages(["onnxruntime"], "--format ort")

    def supports(self, scheme: Scheme) -> Lowering | Refusal:
        """The kernel that runs a scheme, or the reason that there is none; in the installed version, or the newest if none is."""
        weight, codes = scheme.weight, scheme.graph_type
        if weight is None or not scheme.low_precision:
            return ANY_KERNEL
        if weight.qtype.is_float:
            return Refusal("no CPU kernel takes float8; --format trt has one", PRESETS["w8a8"])
        if codes is not None:
            return integer_gemm(scheme, "MatMulIntegerToFloat")
        if weight.qtype.bits == 8 and importlib.util.find_spec("onnxruntime") and version() < BYTES_SINCE:
            reason = f"{BYTES_IN_FLOAT}; {onnxruntime().__version__} is installed"
            return Refusal(reason, PRESETS["w8a8" if scheme.activation else "w4a16"])
        return unpacked_blocks(scheme, ", which rounds its input to 8 bits a block")

    def legalise(self, *, shared: bool, result: CalibrationResult) -> tuple[GraphPass, ...]:
        """Direct form if the batch shares one timestep, factored form if each sample has its own; uint8 codes in both,
        except for convolutions of codes. Biases stay valid for a fixed batch, texts lose their padding, and normalizations of
        groups run on an existing kernel.

        Attention becomes one operator if the installed library has it. Otherwise the graph has opset 21, which versions
        since 1.19 run on the same integer kernels (measured: 1.19, 1.22, 1.23, 1.24, 1.31).
        """
        attention = (FuseAttention(),) if version() >= ATTENTION_SINCE else ()
        unsigned = UnsignCodes(convolutions=version() < SIGNED_CONVOLUTIONS_SINCE)
        codes = (*factoring_passes(result, shared=shared), IntegerConvolutions(), unsigned)
        return (*codes, TrimText(), *attention, RaiseBiases(), PlainGroupNorms())

    def build(self, model: Path, folder: Path, progress: Advance = unwatched) -> Built:
        """Create the session once, and write the graph that it will run to `folder`.

        Raises:
            BackendError: ONNX Runtime is missing or refuses the graph.
            OSError: no space is left, which ONNX Runtime itself reports as a bad graph.
        """
        folder.mkdir(parents=True, exist_ok=True)
        options = session_options(optimize=True)
        options.optimized_model_filepath = str(folder / OPTIMIZED)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{OPTIMIZED}.data")
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        try:
            session = self._session(model, options)
        except BackendError as error:
            if shutil.disk_usage(folder).free < sum(path.stat().st_size for path in model.parent.glob(f"{model.name}*")):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
            raise
        ort = onnxruntime()
        (folder / f"{OPTIMIZED}.data").unlink(missing_ok=True)  # the audit reads the graph; sessions load model.onnx
        description = {"onnxruntime": ort.__version__, "providers": session.get_providers(), "model": model.name}
        (folder / "session.json").write_text(json.dumps(description, indent=2) + "\n")
        return Built(model=model, folder=folder)

    def load(self, built: Built, *, batch: int | None = None) -> OrtEngine:
        """A session of the graph. It takes any batch: in measurements a fixed batch was not faster."""
        return open_graph(built.model)

    def _session(self, model: Path, options: Any) -> Any:
        """A session of the graph on the provider.

        Raises:
            BackendError: ONNX Runtime refuses it.
        """
        return new_session(model, options)

    def profile(self, built: Built, feed: Feed) -> dict[str, float]:
        """Milliseconds by operator, from ONNX Runtime's own profile of a few calls."""
        with tempfile.TemporaryDirectory() as folder:
            options = session_options(optimize=True)
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / "profile")
            session = self._session(built.model, options)
            for _ in range(PROFILED):
                session.run(None, dict(feed))
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        kernels = [event for event in events if event["cat"] == "Node" and event["name"].endswith("_kernel_time")]
        length = len(kernels) // PROFILED
        calls = []
        for start in range(0, len(kernels), length):
            milliseconds: dict[str, float] = {}
            for event in kernels[start : start + length]:
                operator = event["args"]["op_name"]
                milliseconds[operator] = milliseconds.get(operator, 0.0) + event["dur"] / 1e3
            calls.append(milliseconds)
        return {name: statistics.median(call.get(name, 0.0) for call in calls) for name in calls[0]}

    def audit(self, built: Built, assigned: Mapping[str, Rule]) -> Audit:
        """Audit the graph that ONNX Runtime optimised.

        Raises:
            BackendError: the optimised graph is missing or damaged.
        """
        from google.protobuf.message import DecodeError

        try:
            return audit_ort(built.model, built.folder / OPTIMIZED, assigned)
        except (DecodeError, OSError) as error:
            reason = printable(str(error))
            raise BackendError(f"{built.folder / OPTIMIZED}: not a readable graph ({reason}); build the engine again") from error


ORT = Ort()


def open_graph(model: Path, *, optimize: bool = True, prepack: bool = True) -> OrtEngine:
    """A session of any graph on the CPU.

    Args:
        optimize: False runs the graph node by node as written.
        prepack: False uses the weights directly from the file, neither transposed nor packed, and frees the memory after each
            call, which is good for a few calls only. The usual arena grows to twice the memory of a call.

    Raises:
        BackendError: ONNX Runtime is missing or refuses the graph.
    """
    options = session_options(optimize=optimize)
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    return OrtEngine(session=new_session(model, options, without=() if prepack else ("ConstantFolding",)))


def onnxruntime() -> Any:
    """The library.

    Raises:
        BackendError: it is not installed.
    """
    require_packages(["onnxruntime"], "building and verifying")
    import onnxruntime as library

    return library


def version() -> tuple[int, ...]:
    """The installed library's major and minor version."""
    return tuple(int(part) for part in onnxruntime().__version__.split(".")[:2])


def session_options(*, optimize: bool) -> Any:
    """Options of a quiet session, with or without its graph optimizations."""
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4  # an error's text is in the exception that it raises
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    return options


def new_session(model: Path, options: Any, *, without: tuple[str, ...] = (), providers: Sequence[str] = PROVIDERS) -> Any:
    """An onnxruntime.InferenceSession.

    Args:
        without: names of graph optimizations that are left out.
        providers: the first that takes a node runs it.

    Raises:
        BackendError: ONNX Runtime refuses the graph.
    """
    ort = onnxruntime()
    try:
        return ort.InferenceSession(str(model), options, providers=list(providers), disabled_optimizers=list(without))
    except session_errors() as error:
        raise BackendError(f"ONNX Runtime {ort.__version__} refuses {model}: {error}") from error


def session_errors() -> tuple[type[Exception], ...]:
    """onnxruntime's own exceptions, which have no common base class; and those that it raises for bad inputs: ValueError, and
    RuntimeError from io-binding."""
    state = onnxruntime().capi.onnxruntime_pybind11_state
    names = ("Fail", "InvalidGraph", "InvalidArgument", "InvalidProtobuf", "NoSuchFile", "NotImplemented", "RuntimeException")
    return (ValueError, RuntimeError, *(getattr(state, name) for name in names))
