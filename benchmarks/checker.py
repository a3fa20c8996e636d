"""The static checker against ONNX Runtime and against the real TensorRT-RTX builder: one small graph a form, both verdicts.

    pip install -c constraints.txt ".[cpu,rtx]" && python benchmarks/checker.py [ort] [trt-rtx]
    pip install ".[gpu]" && python benchmarks/checker.py ort-cuda     on a machine with an NVIDIA GPU

The first command needs no GPU: TensorRT-RTX's verdict is read off the list of layers that its builder prints, ONNX Runtime's off
the graph that it optimised, and off the numbers that this graph gives beside those of the graph as it was.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from forms import FORMS, Form

from dq_export.deploy.check import Finding, check, read_model
from dq_export.deploy.onnxruntime.cpu import session_errors
from dq_export.deploy.tensorrt.builder import PlanRequest, serve
from dq_export.deploy.tensorrt.layers import Layer, kernel_of, read_layers

TARGETS = ("ort", "trt-rtx")
FLOAT = "float.onnx"
"""The form in float32."""
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
LOW = frozenset(
    {
        "MatMulIntegerToFloat", "MatMulInteger", "DynamicQuantizeMatMul", "QGemm", "MatMulNBits", "MatMulBnb4", "ConvInteger",
        "QAttention", "GatherBlockQuantized",
    }
)  # fmt: skip
"""Operators of ONNX Runtime on codes, beside those whose name starts with QLinear."""
OTHER_NUMBERS = 0.08
"""Root mean square of the difference / that of the result: above 8-bit rounding of a result or, by MatMulNBits, of x."""


def static_verdict(form: Form, target: str, path: Path) -> tuple[str, str]:
    """The checker's verdict on the file and its reason, for sm89 and sm120."""
    ir.save(form.model(target), path)
    findings = check(read_model(path), target, ("sm89", "sm120") if target == "trt-rtx" else ())  # type: ignore[arg-type]
    decisive = _decisive(findings)
    return (decisive.verdict, decisive.rule) if decisive else ("float", "nothing quantized")


def _decisive(findings: list[Finding]) -> Finding | None:
    """A refused one: nothing is built; else that of the operator which is called `gemm`; else the first."""
    rejection = next((item for item in findings if item.verdict == "rejected"), None)
    return rejection or next((item for item in findings if "gemm" in item.node), None) or next(iter(findings), None)


def rtx_verdict(path: Path) -> tuple[str, str]:
    """What TensorRT-RTX's builder does: refuses, or a GEMM in low precision or not; and its own words."""
    profiles: dict[str, Any] = {}
    for value in ir.load(path).graph.inputs:
        sizes = [tuple(dim if isinstance(dim, int) else batch for dim in value.shape or ()) for batch in (1, 2, 4)]
        if sizes[0] != sizes[1]:
            profiles[str(value.name)] = tuple(sizes)
    plan = str(path.with_name("plan"))
    answer = _built(PlanRequest(module="tensorrt_rtx", model=str(path), plan=plan, targets=("SM89", "SM120"), profiles=profiles))
    if "layers" not in answer:
        return "rejected", answer.get("error", "the builder crashed")
    layers = read_layers(answer["layers"])
    kernel, precision = kernel_of(layers, "gemm")
    if kernel == "not found":
        kernel, precision = _in_a_body(layers)
    return ("low precision" if precision else "float"), kernel


def _built(request: PlanRequest) -> dict[str, Any]:
    """The last message of the process that builds a plan: forked, for the library is loaded once then, and may crash."""
    import tensorrt_rtx  # noqa: F401

    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        try:
            with os.fdopen(writing, "w") as channel:
                serve(channel, json.dumps(asdict(request)))
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as channel:
        answers = channel.read().splitlines()
    os.waitpid(child, 0)
    return json.loads(answers[-1]) if answers else {}


def _in_a_body(layers: tuple[Layer, ...]) -> tuple[str, str]:
    """The best GEMM: those of a body are listed without their names."""
    layers_of_gemms = [layer for layer in layers if layer.multiplies]
    best = max(layers_of_gemms, key=lambda layer: bool(layer.precision), default=None)
    return (best.kind, best.precision) if best else ("not found", "")


def ort_verdict(path: Path) -> tuple[str, str]:
    """What ONNX Runtime does: refuses, computes other numbers than without optimisation, or the kernel of the GEMM."""
    return _ort(path, CPU, 0.0)


def ort_cuda_verdict(path: Path) -> tuple[str, str]:
    """The same for its CUDA provider. Its numbers are compared with those of the CPU without optimisation, and both round to
    float16: each may be as far from float32 as the CPU is."""
    import onnxruntime

    try:
        (narrow, _), (wide, _) = (_run(onnxruntime, item, None) for item in (path, path.with_name(FLOAT)))
    except session_errors():  # a form that the CPU refuses has no rounding to compare
        return _ort(path, CUDA, 0.0)
    return _ort(path, CUDA, 2 * _relative_difference(narrow, wide))


def _ort(path: Path, provider: str, rounding: float) -> tuple[str, str]:
    """The verdict; a kernel of another provider does not count as low precision.

    Args:
        rounding: by how much the numbers may differ beyond `OTHER_NUMBERS`.
    """
    import onnxruntime

    optimized = path.with_name("optimized.onnx")
    try:
        fast, providers = _run(onnxruntime, path, optimized, provider)
    except session_errors() as error:
        return "rejected", str(error).splitlines()[0]
    nodes = [node for graph in ir.load(optimized).graphs() for node in graph]
    elsewhere = {node for node in nodes if providers.get(str(node.name), providers.get(node.op_type, provider)) != provider}
    low = [node for node in nodes if _named(node) and _is_low(node) and node not in elsewhere]
    kernel = " ".join(node.op_type + (" (CPU)" if node in elsewhere else "") for node in nodes)
    try:
        exact, _ = _run(onnxruntime, path, None)
    except session_errors():  # no kernel for the graph as it is
        exact = fast
    difference = _relative_difference(fast, exact)
    if not difference < OTHER_NUMBERS + rounding and np.isfinite(exact).all():
        return "rejected", f"other numbers: {difference:.3f} of the result ({kernel})"
    return ("low precision" if low else "float"), kernel


def _relative_difference(result: np.ndarray, exact: np.ndarray) -> float:
    return float(np.sqrt(np.square(result - exact).mean() / max(np.square(exact).mean(), 1e-12)))


def _run(onnxruntime: Any, path: Path, optimized: Path | None, provider: str = CPU) -> tuple[np.ndarray, dict[str, str]]:
    """(the result, the provider of every node by its name)."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    if optimized is None:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    else:
        options.optimized_model_filepath = str(optimized)
    session = onnxruntime.InferenceSession(str(path), options, providers=list(dict.fromkeys([provider, CPU])))
    assert session.get_providers()[0] == provider, f"{provider} cannot be loaded here"
    random, feed = np.random.default_rng(1), {}
    kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
    for value in session.get_inputs():
        shape = [dim if isinstance(dim, int) else 2 for dim in value.shape]
        feed[value.name] = (random.normal(0, 1, shape) if value.name == "x" else np.zeros(shape)).astype(kinds[value.type])
    assignments = [(node, part.ep_name) for part in session.get_provider_graph_assignment_info() for node in part.get_nodes()]
    # By operator, too: a change of layout writes nodes anew, without their names.
    providers = {node.op_type: name for node, name in assignments} | {node.name: name for node, name in assignments}
    return session.run(None, feed)[0].astype(np.float64), providers


def _named(node: ir.Node) -> bool:
    return "gemm" in str(node.name) or node.op_type in ("MatMulNBits", "DynamicQuantizeMatMul")


def _is_low(node: ir.Node) -> bool:
    first = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    moves = node.name == "gemm" and first is not None and first.op_type == "QuantizeLinear" and node.op_type != "DequantizeLinear"
    return node.op_type in LOW or node.op_type.startswith("QLinear") or moves


REAL = {"ort": ort_verdict, "ort-cuda": ort_cuda_verdict, "trt-rtx": rtx_verdict}


def compare(form: Form, target: str, folder: Path) -> tuple[str, str, str]:
    """The checker's verdict, the runtime's, and what is wrong about it; empty where nothing is."""
    path = folder / "form.onnx"
    verdict, rule = static_verdict(form, target, path)
    if target == "ort-cuda":
        ir.save(form.model("ort"), folder / FLOAT)
    real, words = REAL[target](path)
    trap = form.trap and target == "trt-rtx"
    right = verdict == "rejected" if trap else verdict == real
    return verdict, f"{real}, with other numbers" if trap else real, "" if right else f"**wrong**: {rule}; {words[:200]}"


def table(target: str) -> int:
    """Print a target's table; the number of wrong verdicts."""
    forms, wrong = [form for form in FORMS if target.startswith(form.only)], 0
    print(f"\n| form | checker | {target} | |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for form in forms:
            verdict, real, note = compare(form, target, Path(folder))
            wrong += bool(note)
            print(f"| {form.name} | {verdict} | {real} | {note} |", flush=True)
    print(f"{target}: {len(forms)} forms, {wrong} wrong verdicts")
    return wrong


def main() -> None:
    """The tables that need no GPU, or those of the targets that the command line names."""
    wrong = [table(target) for target in sys.argv[1:] or TARGETS]
    sys.exit(any(wrong))


if __name__ == "__main__":
    main()
