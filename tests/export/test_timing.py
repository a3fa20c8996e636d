"""Engines timed in processes of their own, beside the float graph on their own runtime."""

from __future__ import annotations

import importlib.util
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import feed_of

import dq_export
from dq_export.deploy.backend import Built
from dq_export.families.float_graph import load
from dq_export.finished import bench_again
from dq_export.timing import ROUNDS, Timed, time_engines

ORT = ("ort", "cpu", "fp32")
RTX = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt_rtx")
OPENVINO = pytest.mark.skipif(importlib.util.find_spec("onnxruntime_ep_openvino") is None, reason="needs OpenVINO")


def engine(name: str, model: Path, **more: Any) -> Timed:
    return Timed(**{"name": name, "model": str(model), "runs_on": ORT, "batch": 2, **more})


def children(process: int) -> list[int]:
    children: list[int] = []
    for task in Path(f"/proc/{process}/task").glob("*"):
        try:
            children += map(int, (task / "children").read_text().split())
        except OSError:
            continue
    return children


def helpers() -> list[int]:
    """The processes that time engines for this one."""
    actual = []
    for child in children(os.getpid()):
        try:
            if b"dq_export.timing" in Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0"):
                actual.append(child)
        except OSError:
            continue
    return actual


@contextmanager
def watched() -> Iterator[list[frozenset[int]]]:
    """Records which of the processes that load engines lived at the same time."""
    masks: list[frozenset[int]] = []
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(0.002):
            masks.append(frozenset(turn for helper in helpers() for turn in children(helper)))

    thread = threading.Thread(target=look)
    thread.start()
    yield masks
    stop.set()
    thread.join()


def test_one_engine_is_in_memory_at_a_time_each_turn_in_a_process_of_its_own(tiny: Any, tiny_onnx: Path) -> None:
    ticks: list[tuple[int, int]] = []
    with watched() as masks:
        timings = time_engines(
            [engine("a", tiny_onnx, profile=True), engine("b", tiny_onnx)],
            feed_of(tiny, samples=2),
            lambda done, total: ticks.append((done, total)),
        )
    assert max(map(len, masks)) == 1
    assert len(frozenset().union(*masks)) == 2 * ROUNDS
    assert ticks == [(number, 2 * ROUNDS) for number in range(1, 2 * ROUNDS + 1)]
    for timing in timings.values():
        assert len(timing.milliseconds) >= 3 * ROUNDS
        assert 0 < min(timing.milliseconds) <= timing.median
        assert timing.memory_mb > 0
    assert "MatMul" in timings["a"].profile
    assert timings["b"].profile == {}
    assert helpers() == []


@pytest.mark.slow
def test_pytorch_is_timed_as_well_and_a_missing_checkpoint_says_why(tiny: Any, tiny_folder: Path, tmp_path: Path) -> None:
    engines = [
        engine("fp32", tiny_folder, runs_on=("torch", None, "fp32")),
        engine("bf16", tiny_folder, runs_on=("torch", None, "bf16")),
        engine("gone", tmp_path / "gone", runs_on=("torch", None, "fp32")),
    ]
    timings = time_engines(engines, feed_of(tiny, samples=2), rounds=1)
    assert timings["fp32"].median > 0
    assert timings["bf16"].median > 0
    assert "no such model or folder" in timings["gone"].error


def test_pytorch_is_not_timed_on_the_processor_beside_an_engine_on_a_gpu(tiny: Any, tiny_folder: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("PyTorch has a GPU here")
    on_gpu = engine("torch", tiny_folder, runs_on=("torch", None, "fp32"), device="cuda")
    error = time_engines([on_gpu], feed_of(tiny, samples=2), rounds=1)["torch"].error
    assert error == f"PyTorch {torch.__version__} sees 0 CUDA devices; install a CUDA build of PyTorch to time it on the GPU"


def test_the_runtimes_refusal_reaches_the_user(tiny: Any, tiny_onnx: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"no graph")
    feed = feed_of(tiny, samples=2)
    timings = time_engines([engine("bad", tmp_path / "bad.onnx"), engine("good", tiny_onnx)], feed, rounds=1)
    assert f"refuses {tmp_path / 'bad.onnx'}" in timings["bad"].error
    assert timings["good"].median > 0
    wrong = {**feed, "hidden_states": feed["hidden_states"][:, :, :4]}
    timings = time_engines([engine("good", tiny_onnx)], wrong, rounds=1)
    assert "cannot run the graph on these inputs: " in timings["good"].error
    assert "\n" not in timings["good"].error


def test_a_process_that_is_killed_is_named(tiny: Any, tiny_onnx: Path) -> None:
    """As the kernel does where memory runs out."""

    def kill() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            for turn in [turn for helper in helpers() for turn in children(helper)]:
                os.kill(turn, signal.SIGKILL)
                return

    killer = threading.Thread(target=kill)
    killer.start()
    timings = time_engines([engine("a", tiny_onnx), engine("b", tiny_onnx)], feed_of(tiny, samples=2), rounds=1)
    killer.join()
    assert timings["a"].error == f"the process that times {tiny_onnx} was killed, most likely for lack of memory"
    assert timings["b"].median > 0


def test_nothing_is_imported_from_the_folder_that_a_command_runs_in(
    tiny: Any, tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("json", "numpy", "onnxruntime"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('run from a foreign folder')")
    monkeypatch.chdir(tmp_path)
    assert time_engines([engine("a", tiny_onnx)], feed_of(tiny, samples=2), rounds=1)["a"].median > 0


@OPENVINO
@pytest.mark.slow
def test_the_baseline_of_openvino_is_the_float_graph_on_openvino(tiny_folder: Path, tmp_path: Path) -> None:
    report = dq_export.export(
        model=str(tiny_folder), output_dir=tmp_path, provider="openvino", steps=4, calib_size=2, parity_size=1, min_sqnr=10
    )
    assert report.latency.baseline == "the float graph on OpenVINO in fp32"
    latency = bench_again(tmp_path, lambda done, total: None)
    assert set(latency.engines) == {"torch fp32", "torch bf16", "float", "engine"}
    assert any(name.startswith("FullyConnected") for name in latency.profile["float"]), "OpenVINO's own name"
    assert latency.baseline in (tmp_path / "report.html").read_text()


@OPENVINO
def test_one_unguided_picture_is_timed_as_a_call_of_one_row(tiny_folder: Path, tmp_path: Path) -> None:
    report = dq_export.export(
        model=str(tiny_folder), output_dir=tmp_path, provider="openvino", steps=4, calib_size=2, parity_size=1,
        guidance_scale=1.0, min_sqnr=10,
    )  # fmt: skip
    assert report.latency.batch == 1


@RTX
def test_the_baseline_of_a_plan_is_a_plan_of_the_float_graph(tiny_onnx_per_sample: Path, tmp_path: Path) -> None:
    from dq_export.deploy.backends import BACKENDS

    backend = next(b for b in BACKENDS if (b.name, b.dtype) == ("trt-rtx", "fp16"))
    built = backend.baseline(tiny_onnx_per_sample, load, tmp_path / "float")  # whose weights are a hard link
    assert built == Built(model=tmp_path / "float" / "model.onnx", folder=tmp_path / "float" / "engine")
    assert (tmp_path / "float" / "engine" / "model.plan").stat().st_size > 10_000
    layers = (tmp_path / "float" / "engine" / "layers.txt").read_text()
    assert "Half" in layers
    assert "Int8" not in layers


@RTX
def test_a_search_by_latency_builds_the_plans_that_it_will_load(tmp_path: Path) -> None:
    """What runs them needs a GPU; they are built without one."""
    import numpy as np

    from dq_export.deploy.backends import BACKENDS
    from dq_export.search.kernel_times import build_linear
    from dq_export.search.space import CHOICES

    backend = next(b for b in BACKENDS if (b.name, b.dtype) == ("trt-rtx", "fp16"))
    weight = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    for number, scheme in enumerate((CHOICES[0], CHOICES[2], CHOICES[3])):
        built = build_linear(backend, weight, 32, scheme, tmp_path / str(number))
        assert (built.folder / "model.plan").exists()
        assert ("Int8" in (built.folder / "layers.txt").read_text()) == scheme.low_precision
