"""Cost and speed at full size, of DiT-XL/2, PixArt-Sigma-XL/2, UNets or larger ones: each comparison is one command, one table.

    pip install -c constraints.txt ".[cpu,openvino]"
    python benchmarks/full_size.py cost       # time by stage and peak memory of one export, or of one with --rounding gptq
    python benchmarks/full_size.py flat       # memory and time of calibration at 2 and 16 pictures, 2 and 16 steps
    python benchmarks/full_size.py speed      # engines beside each other, interleaved in one process group
    python benchmarks/full_size.py resume     # kill -9 at 20 random moments, then compare every byte

The model is made once, in FOLDER (`--model`, default ./dit-xl), with `--pickle` as the hub has it: see `dit_xl.py`. With
`--network pixart` it is PixArt at 512 pixels (default ./pixart-xl): see `pixart_xl.py`; `sd1.5` at 512 pixels, `sdxl`: see
`unet_xl.py`; `sd35-medium`, `flux-dev` at 512 pixels and in bfloat16: see `mmdit_xl.py`. `speed` holds the engines of a
runtime at once; for the last three `cost` times ONNX Runtime's in turn. A folder with conditions.safetensors is exported with
them. Exports go to a temporary folder beside it. `speed --peers` also quantizes with onnxruntime's quantize_static, 13 GB of
memory and some minutes, and with NNCF where it is installed. Every table names the machine.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import resource
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

from process_tree import run_measured

CONDITIONS = "conditions.safetensors"
MADE_BY = {
    "dit": ("dit_xl.py",),
    "pixart": ("pixart_xl.py",),
    "sd35-medium": ("mmdit_xl.py", "--network", "sd35-medium"),
    "flux-dev": ("mmdit_xl.py", "--network", "flux-dev"),
    "sd1.5": ("unet_xl.py", "--network", "sd1.5"),
    "sdxl": ("unet_xl.py", "--network", "sdxl"),
}
SIDE = 512
"""Pixels along an axis of FLUX's pictures."""
FLAGS = ("--calib-size", "1", "--steps", "4", "--parity-size", "1")
"""Four forward passes: one picture."""
OUTPUTS = ("calibration.safetensors", "model.onnx", "model.onnx.data", "parity/inputs.json", "parity/outputs.json")


def model_folder(path: Path, network: str, layers: str, *, pickle: bool) -> Path:
    """The full-size checkpoint, made where it is not there."""
    if not path.exists():
        script, *words = MADE_BY[network]
        words += [*(["--layers", layers] if layers else []), *(["--pickle"] if pickle else [])]
        subprocess.run([sys.executable, Path(__file__).with_name(script), path, *words], check=True)
    return path


def flags_of(model: Path) -> list[str]:
    """For a network that draws prompts, and for one whose own pictures are larger than the others'."""
    flags = ["--conditions", str(model / CONDITIONS)] if (model / CONDITIONS).exists() else []
    return [*flags, *(["--sizes", f"{SIDE}x{SIDE}"] if _is_flux(model) else [])]


def _is_flux(model: Path) -> bool:
    classes = (json.loads(path.read_text()).get("_class_name") for path in model.glob("*/config.json"))
    return "FluxTransformer2DModel" in classes


def reference_of(model: Path) -> Any:
    """The float network, which knows what it draws."""
    from dq_export.core.condition_file import load_conditions
    from dq_export.families.source import load_reference

    reference: Any = load_reference(str(model))
    if _is_flux(model):
        reference.draw_at(SIDE, SIDE)
    if (model / CONDITIONS).exists():
        reference.conditions = load_conditions(model / CONDITIONS)
    return reference


def export(model: Path, out: Path, *words: str) -> tuple[float, float, float]:
    """Run the command line; seconds, and GB at the peak of all its processes and of the largest of them."""
    where = ["--model", str(model), "-o", str(out), *flags_of(model)]
    command = [sys.executable, "-m", "dq_export", *words[:1], *where, *words[1:]]
    return run_measured([word for word in command if word])


def cost(model: Path, temporary: Path, rounding: str) -> None:
    """One export with all its defaults, by stage, and the bare forward passes beside it."""
    seconds, peak, single = export(model, temporary / "out", "", *FLAGS, "--rounding", rounding)
    from dq_export.families.source import locate
    from dq_export.families.tensors import stored

    report = json.loads((temporary / "out" / "report.json").read_text())
    files = locate(str(model)).checkpoint.weights.files
    weights = sum(4 * math.prod(place.shape) for file in files for place in stored(file).values()) / 1e9
    stages = report["seconds"]
    forward = passes(model)
    print("| | seconds |\n|---|---|")
    print(f"| start, load, hash what was written | {seconds - sum(stages.values()):.1f} |")
    for name, spent in stages.items():
        print(f"| {name} | {spent:.1f} |")
    print(f"| whole command | {seconds:.1f} |")
    print(f"| of it four bare forward passes of PyTorch | {forward:.1f} |")
    print(f"| **above the bare forward passes** | **{seconds - forward:.1f}** |")
    print("\n| one call of a picture | median ms |\n|---|---|")
    for name, engine in (report["latency"] or {"engines": {}})["engines"].items():
        print(f"| {name} | {engine['median_ms']:.0f} |")
    ratio = peak / weights
    print(f"\npeak of all processes together {peak:.2f} GB, {ratio:.2f}x the float32 weights; of the largest {single:.2f} GB")


def passes(model: Path) -> float:
    """Seconds of four forward passes."""
    reference = reference_of(model)
    feed = feed_of(reference)
    reference.forward(feed)
    start = time.monotonic()
    for _ in range(4):
        reference.forward(feed)
    return time.monotonic() - start


def feed_of(reference: Any) -> dict[str, Any]:
    """The first network call of a picture: with its condition, and without where guidance needs that."""
    import numpy as np

    class Seen(Exception):
        pass

    def first(feed: dict[str, Any]) -> Any:
        raise Seen(feed)

    try:
        reference.draw(first, reference.noise(1, 0), np.asarray([1]), steps=4, guidance=reference.guidance)
    except Seen as seen:
        feed: dict[str, Any] = seen.args[0]
    return feed


def flat(model: Path, temporary: Path) -> None:
    """Calibration alone: memory must not grow, time must grow linearly."""
    print("| pictures | steps | network calls | peak GB | seconds | seconds a call |\n|---|---|---|---|---|---|")
    for pictures, steps in ((2, 4), (16, 4), (1, 2), (1, 16)):
        out = temporary / f"{pictures}-{steps}"
        seconds, peak, _ = export(model, out, "calibrate", "--calib-size", str(pictures), "--steps", str(steps))
        calls = pictures * steps
        spent = json.loads((out / "report.json").read_text())["seconds"]["calibrate"]
        print(f"| {pictures} | {steps} | {calls} | {peak:.2f} | {seconds:.1f} | {spent / calls:.2f} |", flush=True)
        shutil.rmtree(out)


def speed(model: Path, temporary: Path, *, peers: bool) -> None:
    """Latency of one call of a picture, each runtime's engines in turn, each warm."""
    from dq_export.deploy.latency import Latency, measure
    from dq_export.deploy.onnxruntime.cpu import open_graph

    cpu = temporary / "cpu"
    export(model, cpu, "build", *FLAGS)
    reference = reference_of(model)
    feed = feed_of(reference)
    first: dict[str, Callable[[], Any]] = {
        "PyTorch fp32": lambda: reference.forward,
        "PyTorch bf16": lambda: reference.in_dtype("bf16"),
        "ONNX Runtime fp32": lambda: open_graph(cpu / "float" / "model.onnx"),
        "dq-export W8A8, ONNX Runtime CPU": lambda: open_graph(cpu / "model.onnx"),
    }
    if peers:
        first["onnxruntime quantize_static"] = partial(open_graph, quantize_static(cpu / "float" / "model.onnx", feed, temporary))
    taken: dict[str, Latency] = {}
    for makers in (first, openvino_engines(model, temporary, len(feed[reference.inputs[0].name]))):
        # One runtime's engines at a time: a UNet's do not all fit.
        taken |= measure({name: make() for name, make in makers.items()}, feed)
    if peers and find_spec("nncf"):
        taken |= measure({"NNCF, OpenVINO": nncf(cpu / "float" / "model.onnx", feed, temporary)}, feed)
    base = taken["ONNX Runtime fp32"].median
    print("| one call of a picture, 2 threads | median ms | least ms | against ONNX Runtime fp32 |\n|---|---|---|---|")
    for name, latency in taken.items():
        print(f"| {name} | {latency.median:.0f} | {latency.least:.0f} | {base / latency.median:.2f}x |")


def openvino_engines(model: Path, temporary: Path, batch: int) -> dict[str, Callable[[], Any]]:
    """The float network and ours on OpenVINO, with the rest in both types; none where the library is missing."""
    from dq_export.deploy.backend import BackendError, Built
    from dq_export.deploy.openvino.backend import OpenVino

    try:
        OpenVino().require()
    except BackendError as error:
        print(f"without OpenVINO: {error}")
        return {}
    cpu, other = temporary / "cpu", temporary / "openvino"
    shutil.copytree(cpu, other)
    export(model, other, "build", *FLAGS, "--overwrite", "--provider", "openvino", "--dtype", "bf16")

    def load(dtype: str, folder: Path) -> Any:
        return OpenVino(dtype).load(Built(model=folder / "model.onnx", folder=folder / "engine"), batch=batch)

    graphs = {"OpenVINO": cpu / "float", "dq-export W8A8, OpenVINO, rest": other}
    return {f"{name} {dtype}": partial(load, dtype, graph) for dtype in ("fp32", "bf16") for name, graph in graphs.items()}


def nncf(model: Path, feed: dict[str, Any], temporary: Path) -> Callable[[Any], Any]:
    """NNCF's quantization of the float graph, on OpenVINO; 4 samples."""
    import openvino
    from peers import nncf as quantize

    start = time.monotonic()
    quantize(model, [feed] * 4, temporary / "nncf.xml")
    print(f"NNCF with 4 samples: {time.monotonic() - start:.0f} s, {peak():.1f} GB at the peak of this process")
    network = openvino.Core().compile_model(temporary / "nncf.xml", "CPU")
    return lambda feed: network(dict(feed))[0]


def quantize_static(model: Path, feed: dict[str, Any], temporary: Path) -> Path:
    """onnxruntime's own static quantization of the float graph: MatMul, Gemm and Conv, per channel, U8S8, MinMax, 4 samples."""
    import onnx
    from peers import static

    folder = temporary / "peer"
    folder.mkdir()
    shutil.copytree(model.parent, folder / "float")  # a copy: onnx refuses weights that are a hard link
    start = time.monotonic()
    target = folder / "model.onnx"
    static(folder / "float" / model.name, [feed] * 4, target, large=True)
    print(f"quantize_static with 4 samples: {time.monotonic() - start:.0f} s, {peak():.1f} GB at the peak of this process")
    assert onnx.load(target, load_external_data=False).graph.node
    return target


def peak() -> float:
    """GB that this process took at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def resume(model: Path, temporary: Path, *, kills: int) -> None:
    """kill -9 at random moments, then run to the end: every output must equal an undisturbed run's."""
    from dq_export.ledger import file_digest

    out = temporary / "whole"
    seconds, _, _ = export(model, out, "", *FLAGS, "--max-memory", "4.5")
    whole = {name: file_digest(out / name) for name in OUTPUTS}
    shutil.rmtree(out)
    out, moment = temporary / "killed", random.Random(0)
    where = ["--model", str(model), "-o", str(out), *flags_of(model)]
    command = [sys.executable, "-m", "dq_export", *where, *FLAGS, "--max-memory", "4.5"]
    hit: list[str] = []
    # Of a run that goes on from what it finds, later moments lie in later stages.
    for turn in range(kills):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        time.sleep(moment.uniform(4, max(seconds * (turn + 1) / kills, 20)))
        process.send_signal(signal.SIGKILL)
        _, output = process.communicate()
        lines = [line.split()[0] for line in output.splitlines() if line.split()]
        hit.append(lines[-1] if lines and process.returncode < 0 else "finished")
        print(f"kill {turn + 1} in {hit[-1]}", flush=True)
    last = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=True)
    kept = [line.split()[0] for line in last.stderr.splitlines() if "kept from an earlier run" in line]
    equal = {name: file_digest(out / name) == whole[name] for name in OUTPUTS}
    print(f"killed {kills} times, in {', '.join(sorted(set(hit)))}; the last run kept {', '.join(kept) or 'nothing'}")
    different = [name for name, same in equal.items() if not same]
    print(f"outputs equal to an undisturbed run's: {len(equal) - len(different)} of {len(equal)}; different: {different}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("table", choices=("cost", "flat", "speed", "resume"))
    parser.add_argument("--network", choices=tuple(MADE_BY), default="dit")
    parser.add_argument("--model", type=Path, help="default: the network's name with -xl behind it")
    parser.add_argument("--layers", default="", help="fewer for a quick look; of flux-dev N,M")
    parser.add_argument("--pickle", action="store_true", help="make the model as the hub has it: a .bin, an old configuration")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--rounding", default="rtn", help="of the weights, for cost")
    parser.add_argument("--kills", type=int, default=20)
    options = parser.parse_args()
    place = options.model or Path(f"{options.network}-xl")
    model = model_folder(place, options.network, options.layers, pickle=options.pickle)
    name = next(line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line)
    print(f"{name}, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory(dir=model.parent) as temporary:
        folder = Path(temporary)
        if options.table == "speed":
            speed(model, folder, peers=options.peers)
        elif options.table == "resume":
            resume(model, folder, kills=options.kills)
        elif options.table == "cost":
            cost(model, folder, options.rounding)
        else:
            flat(model, folder)


if __name__ == "__main__":
    main()
