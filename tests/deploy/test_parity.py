"""Parity's numbers, and latency."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import feed_of, load_graph

from dq_export.deploy.backend import BackendError
from dq_export.deploy.latency import measure
from dq_export.deploy.onnxruntime.cpu import open_graph
from dq_export.deploy.parity import difference, pick_calls


def test_difference_is_the_plain_formulas() -> None:
    exact, actual = np.asarray([3.0, 4.0], dtype=np.float32), np.asarray([3.0, 4.5], dtype=np.float32)
    result = difference(exact, actual)
    assert result.sqnr == pytest.approx(20)  # 10 log10(25 / 0.25)
    assert result.max_error == 0.5
    assert result.cosine == pytest.approx(27 / (5 * np.hypot(3, 4.5)))
    assert difference(exact, exact).sqnr == 200


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_output_that_is_not_finite_is_the_worst(bad: float) -> None:
    result = difference(np.ones(2, dtype=np.float32), np.asarray([1, bad], dtype=np.float32))
    assert result.sqnr == -200
    assert result.max_error is None


def test_each_bin_is_compared() -> None:
    bins = np.asarray([3] * 40 + [2] + [1] * 5 + [0] * 54)
    chosen = pick_calls(bins, spaced=5)
    assert {int(bins[i]) for i in chosen} == {0, 1, 2, 3}
    assert chosen[0] == 0
    assert chosen[-1] == 99
    assert len(pick_calls(np.zeros(3, dtype=np.int64))) == 3


def test_the_batch_is_dynamic(tiny: object, tiny_onnx: Path, tmp_path: Path) -> None:
    engine = open_graph(tiny_onnx)
    for samples in (1, 3, 8):
        assert engine(feed_of(tiny, samples=samples)).shape[0] == samples  # type: ignore[arg-type]


def test_a_graph_that_the_runtime_refuses_is_an_error(tiny_onnx: Path, tmp_path: Path) -> None:
    graph = load_graph(tiny_onnx)
    next(iter(graph.graph)).op_type = "NoSuchOperator"
    ir.save(graph, tmp_path / "bad.onnx")
    with pytest.raises(BackendError, match=r"refuses .*bad.onnx.*NoSuchOperator"):
        open_graph(tmp_path / "bad.onnx")


def test_engines_are_timed_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    output = np.zeros(1, dtype=np.float32)
    clock = [0.0]
    monkeypatch.setattr("dq_export.deploy.latency.time.perf_counter", lambda: clock[0])
    seconds = {"a": iter([9, 9, 9, 3, 9, 1, 9, 2]), "b": iter([9, 9, 9, 5, 9, 5, 9, 4])}  # every second call is timed

    def engine(name: str) -> object:
        def call(feed: object) -> object:
            order.append(name)
            clock[0] += next(seconds[name]) / 1e3
            return output

        return call

    latencies = measure({"a": engine("a"), "b": engine("b")}, {}, rounds=3)  # type: ignore[dict-item]
    assert order == ["a", "a", "b", "b"] * 4  # a round of warm-up; before each timed call an untimed one
    assert (latencies["a"].minimum, latencies["a"].median) == pytest.approx((1, 2))
    assert (latencies["b"].minimum, latencies["b"].median) == pytest.approx((4, 5))
