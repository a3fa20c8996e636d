"""Measures cost and speed at full size, of DiT-XL/2, PixArt-Sigma-XL/2, UNets or larger networks. Each command prints one table.

    pip install -c constraints.txt ".[cpu,openvino,text]"
    python benchmarks/full_size.py cost       # time by stage and peak memory of one export, also with --rounding gptq
    python benchmarks/full_size.py flat       # memory and time of calibration at 2 and 16 pictures, 2 and 16 steps
    python benchmarks/full_size.py speed      # latency of several engines, timed in turn
    python benchmarks/full_size.py resume     # kill -9 at 20 random moments, then compare every byte

The model is made once in a folder (`--model`, default ./dit-xl), with `--pickle` in the hub's format, see `dit_xl.py`.
`--network` selects another: `pixart` at 512 pixels (see `pixart_xl.py`), `sd1.5` at 512 pixels and `sdxl` (see `unet_xl.py`),
`sd35-medium` and `flux-dev` at 512 pixels in bfloat16 (see `mmdit_xl.py`). `speed` loads each engine in a process of its own, one
at a time. If the folder has conditions.safetensors, the export uses them.
Exports are written to a temporary folder beside the model. `speed --peers static nncf` also quantizes with onnxruntime's
quantize_static and with NNCF (see `peers.py`), each in a process of its own. Every table names the machine.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from full_size_model import MADE_BY, feed_of, flags_of, model_folder, reference_of
from process_tree import run_measured
from result_table import ResultTable
from turns import time_in_turns

from dq_export.deploy.onnxruntime.cpu import open_graph

FLAGS = ("--calib-size", "1", "--steps", "4", "--parity-size", "1")
"""One picture in four forward passes."""
OUTPUTS = ("calibration.safetensors", "model.onnx", "model.onnx.data", "parity/inputs.json", "parity/outputs.json")
BASE = "ONNX Runtime fp32"
COLUMNS = ("one call of a picture, 2 threads", "median ms", "least ms", f"against {BASE}")
MODULES = {"static": "onnxruntime", "nncf": "nncf"}
"""The package of each peer."""


def export(model: Path, out: Path, *words: str) -> tuple[float, float, float]:
    """Run the command line. Return seconds, and the peak memory of all its processes and of the largest one in GB."""
    folders = ["--model", str(model), "-o", str(out), *flags_of(model)]
    command = [sys.executable, "-m", "dq_export", *words[:1], *folders, *words[1:]]
    return run_measured([word for word in command if word])


def cost(model: Path, temporary: Path, rounding: str) -> None:
    """Print time and memory of one export with default options, by stage, and the time of its forward passes in PyTorch."""
    seconds, peak, single = export(model, temporary / "out", "", *FLAGS, "--rounding", rounding)
    from dq_export.families.source import locate
    from dq_export.families.tensors import stored

    report = json.loads((temporary / "out" / "report.json").read_text())
    files = locate(str(model)).checkpoint.weights.files
    weights = sum(4 * math.prod(place.shape) for file in files for place in stored(file).values()) / 1e9
    stages = report["seconds"]
    forward = passes(model)
    print("| | seconds |\n|---|---|")
    print(f"| start, load, hash the outputs | {seconds - sum(stages.values()):.1f} |")
    for name, stage_seconds in stages.items():
        print(f"| {name} | {stage_seconds:.1f} |")
    print(f"| whole command | {seconds:.1f} |")
    print(f"| four forward passes of PyTorch alone | {forward:.1f} |")
    print(f"| **difference** | **{seconds - forward:.1f}** |")
    print("\n| one call of a picture | median ms |\n|---|---|")
    for name, engine in (report["latency"] or {"engines": {}})["engines"].items():
        print(f"| {name} | {engine['median_ms']:.0f} |")
    ratio = peak / weights
    print(f"\npeak of all processes together {peak:.2f} GB, {ratio:.2f}x the float32 weights; of the largest {single:.2f} GB")


def passes(model: Path) -> float:
    """Return the seconds of four forward passes."""
    reference = reference_of(model)
    feed = feed_of(reference)
    reference.forward(feed)
    start = time.monotonic()
    for _ in range(4):
        reference.forward(feed)
    return time.monotonic() - start


def flat(model: Path, temporary: Path) -> None:
    """Print memory and time of calibration alone. Memory must not grow, and time must grow linearly."""
    print("| pictures | steps | network calls | peak GB | seconds | seconds a call |\n|---|---|---|---|---|---|")
    for pictures, steps in ((2, 4), (16, 4), (1, 2), (1, 16)):
        out = temporary / f"{pictures}-{steps}"
        seconds, peak, _ = export(model, out, "calibrate", "--calib-size", str(pictures), "--steps", str(steps))
        calls = pictures * steps
        calibration = json.loads((out / "report.json").read_text())["seconds"]["calibrate"]
        print(f"| {pictures} | {steps} | {calls} | {peak:.2f} | {seconds:.1f} | {calibration / calls:.2f} |", flush=True)
        shutil.rmtree(out)


def speed(model: Path, temporary: Path, peers: list[str], path: Path | None) -> None:
    """Print the latency of one call of a picture, for all engines in turn."""
    cpu = temporary / "cpu"
    export(model, cpu, "build", *FLAGS)
    reference = reference_of(model)
    feed = feed_of(reference)
    for name in peers:
        quantize(name, cpu / "float", feed, temporary)
    batch = len(feed[reference.inputs[0].name])
    engines = {BASE: partial(open_graph, cpu / "float" / "model.onnx")}
    engines |= {f"PyTorch {dtype}": partial(open_torch, model, dtype) for dtype in ("fp32", "bf16")}
    engines |= {**onnxruntime_engines(temporary), **openvino_engines(model, temporary, batch)}
    times, table = time_in_turns(engines, feed), ResultTable(COLUMNS, path)
    for name, latency in times.items():
        table.add([name, f"{latency.median:.0f}", f"{latency.minimum:.0f}", f"{times[BASE].median / latency.median:.2f}x"])


def open_torch(model: Path, dtype: str) -> Callable[[Any], Any]:
    """Load the float network in PyTorch."""
    reference = reference_of(model)
    return reference.forward if dtype == "fp32" else reference.in_dtype(dtype)


def onnxruntime_engines(temporary: Path) -> dict[str, Callable[[], Any]]:
    """Return what loads the W8A8 engine, and quantize_static's, on ONNX Runtime."""
    graphs = {"dq-export W8A8, ONNX Runtime": "cpu", "onnxruntime quantize_static": "static"}
    paths = {name: temporary / folder / "model.onnx" for name, folder in graphs.items()}
    return {name: partial(open_graph, path) for name, path in paths.items() if path.exists()}


def openvino_engines(model: Path, temporary: Path, batch: int) -> dict[str, Callable[[], Any]]:
    """Return what loads the float network, the W8A8 engine and NNCF's on OpenVINO, by float types; none without the library."""
    from dq_export.deploy.backend import BackendError
    from dq_export.deploy.openvino.backend import OpenVino

    try:
        OpenVino().require()
    except BackendError as error:
        print(f"without OpenVINO: {error}")
        return {}
    cpu, copy = temporary / "cpu", temporary / "openvino"
    shutil.copytree(cpu, copy)
    export(model, copy, "build", *FLAGS, "--overwrite", "--provider", "openvino", "--dtype", "bf16")
    graphs = {
        "OpenVINO": partial(open_openvino, cpu / "float", batch),
        "dq-export W8A8, OpenVINO, rest": partial(open_openvino, copy, batch),
    }
    if (peer := temporary / "nncf" / "model.xml").exists():
        graphs["NNCF, OpenVINO, rest"] = partial(open_nncf, peer, batch)
    return {f"{name} {dtype}": partial(load, dtype) for dtype in ("fp32", "bf16") for name, load in graphs.items()}


def open_openvino(folder: Path, batch: int, dtype: str) -> Any:
    """Load a graph on OpenVINO as dq-export does."""
    from dq_export.deploy.backend import Built
    from dq_export.deploy.openvino.backend import OpenVino

    return OpenVino(dtype).load(Built(model=folder / "model.onnx", folder=folder / "engine"), batch=batch)


def open_nncf(path: Path, batch: int, dtype: str) -> Callable[[Any], Any]:
    """Load a model of NNCF on OpenVINO for a fixed batch, as dq-export's own engine is loaded."""
    import openvino

    core = openvino.Core()
    network = core.read_model(path)
    shapes = {port.any_name: port.partial_shape for port in network.inputs}
    for shape in shapes.values():
        if len(shape) > 1 and shape[0].is_dynamic:
            shape[0] = batch
    network.reshape(shapes)
    compiled = core.compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[dtype]})
    return lambda feed: compiled(dict(feed))[0]


def quantize(peer: str, source: Path, feed: dict[str, Any], temporary: Path) -> None:
    """Quantize the float graph with a peer and 4 samples, in a process whose memory is measured."""
    folder = temporary / peer
    folder.mkdir()
    shutil.copytree(source, folder / "float")  # a copy: onnx refuses weights that are a hard link
    feeds: dict[str, Any] = {name: np.stack([value] * 4) for name, value in feed.items()}
    np.savez(folder / "feeds.npz", **feeds)
    target = folder / ("model.xml" if peer == "nncf" else "model.onnx")
    files = (folder / "float" / "model.onnx", folder / "feeds.npz", target)
    seconds, peak, _ = run_measured([sys.executable, str(Path(__file__).with_name("peers.py")), peer, *map(str, files)])
    print(f"{peer} with 4 samples: {seconds:.0f} s, {peak:.1f} GB at the peak", flush=True)
    shutil.rmtree(folder / "float")


def resume(model: Path, temporary: Path, *, kills: int) -> None:
    """Kill an export at random moments, then run it to the end. Every output must equal that of an undisturbed run."""
    from dq_export.core.digest import file_digest

    out = temporary / "whole"
    seconds, _, _ = export(model, out, "", *FLAGS, "--max-memory", "4.5")
    expected = {name: file_digest(out / name) for name in OUTPUTS}
    shutil.rmtree(out)
    out, moment = temporary / "killed", random.Random(0)
    folders = ["--model", str(model), "-o", str(out), *flags_of(model)]
    command = [sys.executable, "-m", "dq_export", *folders, *FLAGS, "--max-memory", "4.5"]
    stages: list[str] = []
    # Each run continues the one before, so later moments are in later stages.
    for turn in range(kills):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        time.sleep(moment.uniform(4, max(seconds * (turn + 1) / kills, 20)))
        process.send_signal(signal.SIGKILL)
        _, output = process.communicate()
        lines = [line.split()[0] for line in output.splitlines() if line.split()]
        stages.append(lines[-1] if lines and process.returncode < 0 else "finished")
        print(f"kill {turn + 1} in {stages[-1]}", flush=True)
    last = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=True)
    reused = [line.split()[0] for line in last.stderr.splitlines() if "kept from an earlier run" in line]
    equal = {name: file_digest(out / name) == expected[name] for name in OUTPUTS}
    print(f"killed {kills} times, in {', '.join(sorted(set(stages)))}; the last run kept {', '.join(reused) or 'nothing'}")
    different = [name for name, is_equal in equal.items() if not is_equal]
    print(f"outputs equal to an undisturbed run's: {len(equal) - len(different)} of {len(equal)}; different: {different}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("table", choices=("cost", "flat", "speed", "resume"))
    parser.add_argument("--network", choices=tuple(MADE_BY), default="dit")
    parser.add_argument("--model", type=Path, help="default: the network's name followed by -xl")
    parser.add_argument("--layers", default="", help="fewer layers for a quick look; N,M for flux-dev")
    parser.add_argument("--pickle", action="store_true", help="make the model with a .bin and an old configuration")
    parser.add_argument("--peers", nargs="+", choices=("static", "nncf"), default=[], help="other quantizers, for speed")
    parser.add_argument("--rounding", default="rtn", help="rounding of the weights, for cost")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--json", type=Path, help="also write the table there, for speed")
    options = parser.parse_args()
    for peer in options.peers:
        if find_spec(MODULES[peer]) is None:
            parser.error(f"--peers {peer}: {MODULES[peer]} is not installed here; see peers.py")
    place = options.model or Path(f"{options.network}-xl")
    model = model_folder(place, options.network, options.layers, pickle=options.pickle)
    name = next(line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line)
    print(f"{name}, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory(dir=model.parent) as temporary:
        folder = Path(temporary)
        if options.table == "speed":
            speed(model, folder, options.peers, options.json)
        elif options.table == "resume":
            resume(model, folder, kills=options.kills)
        elif options.table == "cost":
            cost(model, folder, options.rounding)
        else:
            flat(model, folder)


if __name__ == "__main__":
    main()
