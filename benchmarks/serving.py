"""Compares shared calls of the denoiser with one request at a time, on one real tritonserver.

    python benchmarks/serving.py [--model pixart-digits] [--seconds 20] [--json FILE]
    python benchmarks/serving.py --model pixart-digits --first 5 [--json FILE]

Exports `dit-digits`, or the small model that draws prompts. Starts a server with its repository and with a copy of the pipeline
that draws one picture at a time. Requests pictures of 10, 20, 30 and 50 steps from both in turn: at saturation (32 clients that
send the next request at once), and as Poisson arrivals at 0.5 and 0.9 of the rate that one picture at a time reached. Requests
that the server refuses because 64 others wait are counted. Then sends 1,000 bad requests beside good ones.

With `--first` it starts the server so many times instead, and measures the time until its first picture. `--json` writes a result
file for `benchmarks/measured.py`.
"""

from __future__ import annotations

import argparse
import queue
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import server
from result_table import ResultTable
from serving_requests import ask, memory, tensors

STEPS = (10, 20, 30, 50)
CLIENTS = 32
BUSY = "StatusCode.UNAVAILABLE"
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MODELS = ("dit-digits", "pixart-digits")
SINGLE = {1: "one-at-a-time", 2: "one-at-a-time-guided"}
"""The model that draws one picture at a time, by the rows of a picture."""
LOADS = (
    "load",
    "pictures",
    "one at a time: requests a second, median s",
    "shared: requests a second, median s",
    "rows of a call",
)
STARTS = ("model", "models ready, s: median of {count} starts", "first picture, s: median, slowest", "memory then, MB")
"""Columns of the tables."""


@dataclass(frozen=True)
class Load:
    """One load on one model: answers per second, seconds of an answer, mean rows of a denoiser call, and refused requests."""

    model: str
    load: str
    requests: float
    median: float
    p95: float
    rows: float
    refused: int

    @property
    def figures(self) -> str:
        """What the table says of the load."""
        text = f"{self.requests:.1f}, {self.median:.2f}"
        return f"{text} ({self.refused} requests refused)" if self.refused else text


def digit(network: str, number: int) -> dict[str, Any]:
    """Return the inputs that ask for a picture of a digit."""
    return {"prompt": [f"a {DIGITS[number % 10]}"]} if network == "pixart-digits" else {"class_labels": [number % 10]}


class Clients:
    """Sends requests, and keeps the seconds of each."""

    def __init__(self, address: str, guidance: float, network: str) -> None:
        import tritonclient.grpc as grpc

        self.network = network
        self.grpc, self.client, self.guidance = grpc, grpc.InferenceServerClient(address), guidance
        self.answers: queue.Queue[float | Exception] = queue.Queue()

    def ask(self, model: str, index: int) -> None:
        """Send one request. Its answer is put into `answers`."""
        start = time.monotonic()
        steps = STEPS[index % len(STEPS)]
        condition = digit(self.network, index)
        inputs = tensors(**condition, seed=index, num_inference_steps=steps, guidance_scale=self.guidance)

        def answer(result: Any, error: Any) -> None:
            self.answers.put(error or time.monotonic() - start)

        self.client.async_infer(model, inputs, answer, outputs=[self.grpc.InferRequestedOutput("images")])

    def answered(self) -> float | None:
        """Return the seconds of the next answer, or None if the server had too many requests. Raise any other error."""
        from tritonclient.utils import InferenceServerException

        item = self.answers.get(timeout=120)
        if isinstance(item, InferenceServerException) and item.status() == BUSY:
            return None
        if isinstance(item, Exception):
            raise item
        return item

    def rows(self) -> tuple[int, int]:
        """Return the denoiser's numbers of rows and of calls."""
        (stats,) = self.client.get_inference_statistics("denoiser").model_stats
        return stats.inference_count, stats.execution_count

    def saturate(self, model: str, seconds: float) -> Load:
        """Load a model with CLIENTS clients that send the next request after each answer."""
        before, start, index = self.rows(), time.monotonic(), 0
        seconds_of: list[float | None] = []
        for _ in range(CLIENTS):
            self.ask(model, index)
            index += 1
        while time.monotonic() - start < seconds:
            seconds_of.append(self.answered())
            self.ask(model, index)
            index += 1
        rate = len(seconds_of) / (time.monotonic() - start)
        for _ in range(CLIENTS):
            self.answered()
        return self._load(model, f"{CLIENTS} clients", rate, seconds_of, before)

    def arrive(self, model: str, seconds: float, rate: float) -> Load:
        """Load a model with Poisson arrivals of `rate` per second, at the same moments for every model."""
        before, moments, index = self.rows(), random.Random(1), 0
        start = due = time.monotonic()
        while due - start < seconds:
            time.sleep(max(0.0, due - time.monotonic()))
            self.ask(model, index)
            index += 1
            due += moments.expovariate(rate)
        seconds_of = [self.answered() for _ in range(index)]
        return self._load(model, f"{rate:.1f} a second", index / (time.monotonic() - start), seconds_of, before)

    def _load(self, model: str, load: str, rate: float, seconds_of: list[float | None], before: tuple[int, int]) -> Load:
        rows, calls = (b - a for a, b in zip(before, self.rows(), strict=True))
        ordered = sorted(seconds for seconds in seconds_of if seconds is not None)
        refused, median, high = seconds_of.count(None), statistics.median(ordered), ordered[int(0.95 * len(ordered))]
        return Load(model, load, rate * len(ordered) / len(seconds_of), median, high, rows / calls, refused)


def single(repository: Path, rows: int) -> None:
    """Add a copy of the pipeline that draws one picture of `rows` rows at a time, with one call after the other."""
    name = SINGLE[rows]
    shutil.copytree(repository / "pipeline", repository / name)
    path = repository / name / "config.pbtxt"
    text = path.read_text().replace('name: "pipeline"', f'name: "{name}"')
    text, count = re.subn(r"max_batch_size: \d+", "max_batch_size: 1", text)
    assert count == 1
    for key, value in (("max_rows", rows), ("denoiser_calls", 1)):
        text, count = re.subn(rf'(key: "{key}"\s+value {{\s+string_value: )"\d+"', rf'\1"{value}"', text)
        assert count == 1
    path.write_text(text)


def bad_requests(running: server.Server, count: int, network: str) -> tuple[float, float]:
    """Send bad requests, which must fail, beside good ones. Return the memory of the server before and after in MB."""
    import tritonclient.grpc as grpc
    from tritonclient.utils import InferenceServerException

    client = grpc.InferenceServerClient(running.grpc)
    condition = digit(network, 1)
    (key,) = condition
    bad: tuple[dict[str, Any], ...] = (
        {"class_labels": [10]}, {"prompt": ["a " * 300]}, {"prompt": [b"\xff"]}, {key: condition[key] * 9},
        {**condition, "scheduler": b"x"}, {**condition, "num_inference_steps": 0}, {**condition, "num_inference_steps": 100_000},
        {**condition, "latents": np.full((1, 1, 16, 16), np.nan)},
    )  # fmt: skip
    stop, good = threading.Event(), []

    def go_on() -> None:
        exact = ask(client, **digit(network, 5), seed=5)["latents"]
        while not stop.is_set():
            good.append(np.array_equal(ask(client, **digit(network, 5), seed=5)["latents"], exact))

    def refuse(number: int) -> None:
        for index in range(number):
            try:
                ask(client, **bad[index % len(bad)])
            except InferenceServerException:
                continue
            raise SystemExit("a bad request was answered")

    thread = threading.Thread(target=go_on)
    thread.start()
    refuse(300)
    before = memory(running.process.pid)
    refuse(count)
    after = memory(running.process.pid)
    stop.set()
    thread.join()
    if not all(good):
        raise SystemExit(f"{good.count(False)} of {len(good)} good requests got other bytes than alone")
    print(f"{count} bad requests, each refused; {len(good)} good ones meanwhile, all with the bytes of one alone")
    return before, after


def main() -> None:
    """Export, serve, load, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default=MODELS[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="of each load (default 20)")
    parser.add_argument("--rounds", type=int, default=3, help="of both models in turn (default 3)")
    parser.add_argument("--first", type=int, default=0, help="measure the first picture of so many starts instead")
    parser.add_argument("--json", type=Path, help="also write the table there")
    options = parser.parse_args()
    if server.missing():
        raise SystemExit(server.missing())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, "-m", "dq_export", "--model", options.model, "--triton", "-q", "-o", str(folder / "out")]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        if options.first:
            row = first_pictures(folder, options.model, options.first)
            ResultTable([text.format(count=options.first) for text in STARTS], options.json).add(row)
            return
        for rows in SINGLE:
            single(folder / "out" / "triton", rows)
        with server.serving(folder / "out" / "triton", folder, wait="ready") as running:
            results = [row for guidance in (2.0, 1.0) for row in loads(running, guidance, options)]
            before, after = bad_requests(running, 1000, options.model)
    print(f"memory of the server's processes: {before:.1f} -> {after:.1f} MB")
    table = ResultTable(LOADS, options.json)
    for row in side_by_side(results):
        table.add(row)


def first_pictures(folder: Path, network: str, count: int) -> list[str]:
    """Start the server `count` times, each until its first picture, and return the row of the table."""
    import tritonclient.grpc as grpc

    ready, first, memories = [], [], []
    for number in range(count):
        place = folder / str(number)
        place.mkdir()
        with server.serving(folder / "out" / "triton", place, wait="ready") as running:
            ready.append(time.monotonic() - running.started)
            ask(grpc.InferenceServerClient(running.grpc), **digit(network, 7), seed=7)
            first.append(time.monotonic() - running.started)
            memories.append(memory(running.process.pid))
        print(f"start {number + 1}: ready after {ready[-1]:.1f} s, first picture after {first[-1]:.1f} s", flush=True)
    times = f"{statistics.median(first):.1f}, {max(first):.1f}"
    return [network, f"{statistics.median(ready):.1f}", times, f"{statistics.median(memories):.0f}"]


def side_by_side(results: Sequence[tuple[float, Load]]) -> list[list[str]]:
    """Return the table's rows: a load on one picture at a time beside the same load on shared calls."""
    rows = []
    for guidance in dict.fromkeys(guidance for guidance, _ in results):
        by_load: dict[str, list[Load]] = {}
        for _, load in (item for item in results if item[0] == guidance):
            by_load.setdefault(load.load, []).append(load)
        for name, pair in by_load.items():
            alone, shared = sorted(pair, key=lambda load: load.model == "pipeline")
            pictures = "guided (two rows a picture)" if guidance > 1 else "unguided (one row)"
            figures = [load.figures for load in (alone, shared)]
            rows.append([name, pictures, *figures, f"{shared.rows:.1f}"])
    return rows


def loads(running: server.Server, guidance: float, options: argparse.Namespace) -> list[tuple[float, Load]]:
    """Run all loads with one guidance scale, models in turn, and print the rows of the median rounds."""
    asker, results, seconds = Clients(running.grpc, guidance, options.model), [], options.seconds
    asker.saturate("pipeline", 2.0)
    alone = SINGLE[2 if guidance > 1 else 1]
    full: dict[str, list[Load]] = {model: [] for model in (alone, "pipeline")}
    for _ in range(options.rounds):
        for model, rows in full.items():
            rows.append(asker.saturate(model, seconds))
    middle = {model: sorted(rows, key=lambda row: row.requests)[len(rows) // 2] for model, rows in full.items()}
    results += list(middle.values())
    for share in (0.5, 0.9):
        results += [asker.arrive(model, seconds, share * middle[alone].requests) for model in full]
    print(f"\nguidance {guidance:g}: {'two rows' if guidance > 1 else 'a row'} a picture")
    print("| load | model | requests a second, median s | 95 % s | rows of a call |\n|---|---|---|---|---|")
    for row in results:
        print(f"| {row.load} | {row.model} | {row.figures} | {row.p95:.2f} | {row.rows:.1f} |")
    single_load, shared = middle[alone], middle["pipeline"]
    rate, speed = shared.requests / single_load.requests, single_load.median / shared.median
    print(f"at saturation {rate:.2f} times the requests, {speed:.2f} times as soon")
    return [(guidance, row) for row in results]


if __name__ == "__main__":
    main()
