"""Exports random valid models with random options, each in its own process. Every pair of values is in some run.

    pip install -c constraints.txt ".[cpu,openvino,rtx,triton]" && python benchmarks/sweep.py --runs 300 --seed 0

Each run must end in one of these ways, or the sweep fails:

    refused     with one error before the float graph, the first stage that takes time
    audited     100 % of the quantized GEMMs in low precision, every network call above the limit for its bits
    graph       --format onnx builds no engine; every network call of the graph above that limit
    status 3    an engine that runs partly in float; each such GEMM is named with its reason
    status 4    an engine too far from PyTorch, with a float graph that is near; the limit and the worst call are named

Every sixth run is repeated; its graph and its calibration must have the same bytes.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzzing import fork_server
from fuzzing.choices import MODELS, OPTIONS, fits, save_model, words
from fuzzing.fork_server import GIB, Limits, Outcome, command, serve
from fuzzing.judge import traceback_kind
from fuzzing.pairs import Pairs

GOOD = ("refused", "audited", "graph", "status 3", "status 4")
FAULTS = ("refused late", "in float", "float graph", "traceback", "hang", "memory", "crash", "unequal")
LIMITS = Limits(seconds=240, memory=2 * GIB, address_space=64 * GIB)
BATCH = 16
"""Runs between two checks of the covered pairs, so that the choices depend on the seed, and not on the order of endings."""
TWICE = 6
FLOAT_GRAPH = 60.0
"""The lowest SQNR in dB of a float graph that is near PyTorch."""
OUTPUTS = ("model.onnx", "model.onnx.data", "calibration.safetensors")


@dataclass
class Sweep:
    """The endings of all runs."""

    endings: Counter[str] = field(default_factory=Counter)
    reasons: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    worst: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    repeats: int = 0
    seconds: float = 0.0
    pairs: str = ""

    @property
    def faults(self) -> int:
        """The number of runs that ended in a fault."""
        return sum(self.endings[name] for name in FAULTS)


def attempt(choice: dict[str, Any], root: Path) -> None:
    """Write the model and export it in this process."""
    work = root / "work"
    work.mkdir()
    os.chdir(work)
    save_model(choice, work / "model")
    print("exporting", file=sys.stderr, flush=True)
    command([*words(choice), "-o", "out"])


def judge(root: Path, outcome: Outcome) -> tuple[str, str]:
    """Return the ending of a run, one of `GOOD` or `FAULTS`, and the reason."""
    text = outcome.stderr
    error = next((line for line in text.splitlines() if line.lower().startswith("error")), "")
    in_float = any(line.startswith("float ") for line in text.splitlines())
    if "exporting" not in text.splitlines():
        raise RuntimeError(f"{root.name}: the model could not be made: {text[-2000:]}")
    if outcome.stopped:
        return ("hang" if outcome.stopped == "time" else "memory"), f"{outcome.seconds:.0f} s, {outcome.memory / 1e6:.0f} MB"
    if "Traceback (most recent call last)" in text:
        return "traceback", traceback_kind(text)
    if outcome.status < 0 or outcome.status > 128:
        return "crash", f"status {outcome.status}"
    if outcome.status in (1, 2, 5):
        return ("refused late" if in_float else "refused"), error
    report = json.loads((root / "work" / "out" / "report.json").read_text())
    near = min(call["sqnr"] for call in report["parity"]["calls"] if call["stage"] == "float-onnx")
    if near < FLOAT_GRAPH:
        return "float graph", f"{near:.0f} dB from PyTorch"
    if outcome.status in (3, 4):
        return f"status {outcome.status}", error
    if report["audit"] is None:
        return "graph", ""
    return ("audited" if report["audit"]["coverage"] == 1 else "in float"), f"{report['audit']['coverage']:.3f}"


def run(runs: int, seed: int, folder: Path, workers: int = 2, keep: Path | None = None) -> Sweep:
    """Make `runs` runs in an empty folder."""
    pairs, sweep, start = Pairs({**MODELS, **OPTIONS}, seed, fits), Sweep(), time.monotonic()
    prepare(folder)
    for first in range(0, runs, BATCH):
        batch = {index: pairs.next() for index in range(first, min(first + BATCH, runs))}
        endings: dict[str, tuple[str, str]] = {}
        for root, outcome in serve(_jobs(batch, pairs, folder), workers=workers, limits=LIMITS):
            endings[root.name] = judge(root, outcome)
        for index, indices in batch.items():
            root = folder / f"{index}"
            ending, reason = _ending(root, endings, sweep)
            sweep.endings[ending] += 1
            choice = pairs.values(indices)
            kind = re.sub(r"-?\d[\d.]*", "N", reason)
            sweep.reasons[ending if ending in ("audited", "graph") else f"{ending}: {kind}"].append(f"run {index}")
            _note(root, choice["bits"], ending, sweep)
            (pairs.refused if ending == "refused" else pairs.passed)(indices)
            if keep and ending in FAULTS:
                shutil.copytree(root, keep / root.name, dirs_exist_ok=True, symlinks=True)
                (keep / root.name / "choice.txt").write_text(f"{ending}: {reason}\n{choice}\n{' '.join(words(choice))}\n")
            for old in (root, root.with_name(f"{root.name}-again")):
                shutil.rmtree(old, ignore_errors=True)
    sweep.seconds = time.monotonic() - start
    sweep.pairs = f"{pairs.total - len(pairs.open)} of {pairs.total} pairs covered or found to be refused"
    return sweep


def prepare(folder: Path) -> None:
    """Import everything that an export imports."""
    quiet = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
    os.environ.update(quiet, MKL_CBWR="AUTO,STRICT", TOKENIZERS_PARALLELISM="false")
    plain = {name: values[0] for name, values in {**MODELS, **OPTIONS}.items()}
    save_model(plain, folder / "plain")
    export = ["--model", str(folder / "plain"), "--steps", "1", "--calib-size", "1", "--parity-size", "1", "--triton"]
    fork_server.preload([*export, "--min-sqnr", "0", "-o", str(folder / "first")], folder / "imports")


def _jobs(batch: dict[int, dict[str, int]], pairs: Pairs, folder: Path) -> Iterator[tuple[Path, Callable[[], None]]]:
    for index, indices in batch.items():
        for name in (f"{index}", f"{index}-again") if index % TWICE == 0 else (f"{index}",):
            root = folder / name
            root.mkdir()
            yield root, functools.partial(attempt, pairs.values(indices), root)


def _ending(root: Path, endings: dict[str, tuple[str, str]], sweep: Sweep) -> tuple[str, str]:
    """Return the ending of a run; `unequal` if its repetition differs."""
    repetition = root.with_name(f"{root.name}-again")
    first, second = endings[root.name], endings.get(repetition.name)
    if second is None or first[0] not in ("audited", "graph", "status 3", "status 4"):
        return first
    sweep.repeats += 1
    names = [name for name in OUTPUTS if (root / "work" / "out" / name).exists()]
    for name in names:
        if (root / "work" / "out" / name).read_bytes() != (repetition / "work" / "out" / name).read_bytes():
            return "unequal", name
    return first if first[0] == second[0] else ("unequal", f"{first} and {second}")


def _note(root: Path, bits: str, ending: str, sweep: Sweep) -> None:
    if ending in ("audited", "graph"):
        calls = json.loads((root / "work" / "out" / "report.json").read_text())["parity"]["calls"]
        last = calls[-1]["stage"]
        sweep.worst[bits].append(min(call["sqnr"] for call in calls if call["stage"] == last))


def show(sweep: Sweep) -> None:
    """Print the tables."""
    total = sweep.endings.total()
    print("| ended | runs |\n|---|---|")
    for name in (*GOOD, *FAULTS):
        print(f"| {name}{' (a fault)' if name in FAULTS else ''} | {sweep.endings[name]} |")
    print(f"| all | {total} |\n\n{sweep.repeats} runs were repeated; {sweep.pairs}; {sweep.seconds:.0f} s\n")
    print("| bits | audited or graph | worst call of each run: lowest dB | median | highest |\n|---|---|---|---|---|")
    for bits, values in sorted(sweep.worst.items()):
        values.sort()
        print(f"| {bits} | {len(values)} | {values[0]:.1f} | {values[len(values) // 2]:.1f} | {values[-1]:.1f} |")
    print()
    for reason, runs in sorted(sweep.reasons.items(), key=lambda item: (item[0].split(":")[0] not in FAULTS, -len(item[1]))):
        print(f"{len(runs):4}  {reason[:400]}  [{', '.join(runs[:3])}]")


def main() -> None:
    """Sweep, print, and fail on any fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="folder for the runs with faults")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sweep = run(options.runs, options.seed, Path(folder), options.workers, options.keep)
    show(sweep)
    sys.exit(bool(sweep.faults))


if __name__ == "__main__":
    main()
