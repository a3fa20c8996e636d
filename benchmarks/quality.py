"""Measures every recipe and other quantizers on dit-digits and its hard copy, for the table in docs/measured.md.

    pip install ".[cpu,openvino,metrics]" && python benchmarks/quality.py [--recipes NAME ...] [--models plain hard]
    python benchmarks/quality.py --models text  pixart-digits; needs the extra `text`
    python benchmarks/quality.py --models FOLDER    another model of digits, such as that of `examples/train_sd3_digits.py`
    python benchmarks/quality.py --peers        also onnxruntime's quantize_static, nvidia-modelopt and NNCF

Each row is a real engine. It has the SQNR in dB of a network call against PyTorch, mean and worst over a guided trajectory; the
SQNR of ten pictures from the same noise; the share of digits that are read as requested; the Frechet distance from real digits;
megabytes on disk; the speed against the float graph on ONNX Runtime, timed in turn; and the share of the quantized FLOPs in low
precision. Peers are installed into their own virtual environments below --peers-folder. `--json` writes a result file for
`benchmarks/measured.py`.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from digits import conditions_and_digits, conditions_of, draw_in_parts, load_model
from figures import Figures
from reading import Reader
from result_table import ResultTable

from dq_export.core.recipe import Recipe
from dq_export.deploy.backend import BackendError
from dq_export.deploy.latency import measure
from dq_export.deploy.onnxruntime.cpu import OrtEngine, open_graph, session_errors
from dq_export.deploy.parity import difference
from dq_export.families.reference import Float32, Reference
from dq_export.families.source import MODELS, PACKAGED
from dq_export.pipeline import run
from dq_export.stages.recording import Recording, draw
from dq_export.stages.verify import save_pictures

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from hard_copy import harden_folder

NONE, GPTQ, TOKEN, TENSOR = {"scaling": "none"}, {"rounding": "gptq"}, {"granularity": "token"}, {"granularity": "tensor"}
NEAREST = {"rounding": "rtn"}
GROUP = {"granularity": "token-group", "group_size": 64}
RECIPES: dict[str, dict[str, Any]] = {
    "w8a8 static, no scaling": {**NONE, "bins": 1},
    "w8a8 static, auto": {"bins": 1},
    "w8a8 per timestep, no scaling": NONE,
    "w8a8 per timestep, dilate": {"scaling": "dilate"},
    "w8a8 per timestep, smooth": {"scaling": "smooth"},
    "w8a8 per timestep, balance (PTQ4DiT)": {"scaling": "balance"},
    "w8a8 per timestep, equalize (AWEQ)": {"scaling": "equalize", "bias_correction": True},
    "w8a8 per timestep, auto": {},
    "w8a8 per timestep, auto, progressive": {"calibration": "progressive"},
    "w8a8 per timestep, auto, gptq": GPTQ,
    "w8a8 per token, no scaling": {**NONE, **TOKEN},
    "w8a8 per token, auto": TOKEN,
    "w8a8 per token, auto, gptq": {**TOKEN, **GPTQ},
    "w8a8 token and group of 64 (Q-DiT)": {**NONE, **GROUP},
    "w6a6 per timestep, auto": {"bits": "w6a6"},
    "w6a6 per token, auto, gptq": {"bits": "w6a6", **TOKEN, **GPTQ},
    "w4a8 token and group of 64, no scaling (Q-DiT)": {"bits": "w4a8", **NONE, **GROUP, **NEAREST},
    "w4a8 token and group of 64, auto, gptq": {"bits": "w4a8", **GROUP, **GPTQ},
    "w4a8": {"bits": "w4a8"},
    "w4a8 per timestep, auto": {"bits": "w4a8", **TENSOR, **NEAREST},
    "w4a8 per timestep, auto, gptq": {"bits": "w4a8", **TENSOR, **GPTQ},
    "w4a8 per token, auto": {"bits": "w4a8", **TOKEN, **NEAREST},
    "w4a8 per token, auto, mse": {"bits": "w4a8", **TOKEN, "rounding": "mse"},
    "w4a8 per token, auto, gptq": {"bits": "w4a8", **TOKEN, **GPTQ},
    "w4a16 no scaling": {"bits": "w4a16", **NONE},
    "w4a16 auto, gptq": {"bits": "w4a16", **GPTQ},
    "w8a16 auto": {"bits": "w8a16"},
    "w4a4 per timestep, auto, gptq": {"bits": "w4a4", **GPTQ},
    "w4a4 per timestep, auto, gptq, progressive": {"bits": "w4a4", **GPTQ, "calibration": "progressive"},
    "w4a4 per token, auto, gptq": {"bits": "w4a4", **TOKEN, **GPTQ},
}
PEERS = {
    "static": ("onnxruntime quantize_static", ["onnxruntime==1.31.1", "onnx==1.23.2", "sympy"]),
    "modelopt": ("nvidia-modelopt ONNX int8, max", ["torch==2.13.0", "nvidia-modelopt[onnx]==0.47.0"]),
    "nncf": ("NNCF, transformer preset, OpenVINO", ["nncf==3.4.0", "openvino==2026.4.1", "onnx==1.23.2"]),
}
COLUMNS = (
    "model", "recipe", "SQNR of a call, dB", "worst", "of pictures", "digits read", "Frechet distance", "MB", "speed",
    "low precision",
)  # fmt: skip


class Bench:
    """Measures the engines of one model."""

    def __init__(self, name: str, model: str, temporary: Path, options: argparse.Namespace, reader: Reader) -> None:
        self.name, self.model, self.temporary, self.reader, self.count = name, model, temporary, reader, options.count
        self.steps, self.keep = options.steps, options.keep
        self.reference: Reference = load_model(model)
        self.guidance = 1.0 if self.reference.guided_by == "nothing" else MODELS.get(model, ("", 2.0))[1]

    def recipe(self, options: Mapping[str, Any]) -> Recipe:
        """Return a recipe of the model."""
        conditions = conditions_of(self.model)
        draws: dict[str, Any] = {} if conditions is None else {"conditions": str(conditions)}
        draws |= {"model": self.model, "guidance_scale": self.guidance, "min_sqnr": -200}
        return Recipe.parse({**draws, **options}, "benchmark")

    def export(self, label: str, options: Mapping[str, Any]) -> Figures:
        """Export with a recipe and measure its engine."""
        out = self.temporary / self.name / label
        report = run(self.recipe(options), out)
        assert report
        assert report.parity
        assert report.latency
        assert report.size
        assert report.audit
        worst = report.worst_call("engine")
        assert worst
        read, distance = self.digits(open_graph(out / "model.onnx"), label)
        return Figures(
            sqnr=report.mean_sqnr("engine"), worst=worst.sqnr, pictures=report.parity.trajectories[0].sqnr, read=read,
            distance=distance, size=report.size.engine_bytes, speed=report.latency.ratio, coverage=report.audit.coverage,
        )  # fmt: skip

    def peer(self, key: str, folder: Path) -> Figures | str:
        """Quantize the same float graph with a peer and measure its engine. Return the error if it fails."""
        label, packages = PEERS[key]
        out = self.temporary / self.name / label
        source = self.temporary / self.name / "float"
        if not source.exists():
            run(self.recipe({"parity_size": 8}), self.temporary / self.name / "whole", until="verify")
            shutil.copytree(self.temporary / self.name / "whole" / "float", source)  # a copy: peers refuse hard links
            np.savez(source / "feeds.npz", **self.calls())
        out.mkdir(parents=True)
        target = out / ("model.xml" if key == "nncf" else "model.onnx")
        python = _environment(folder / key, packages)
        command = [
            python,
            str(Path(__file__).with_name("peers.py")),
            key,
            *map(str, (source / "model.onnx", source / "feeds.npz", target)),
        ]
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        if process.returncode:
            return f"failed: {process.stderr.strip().splitlines()[-1][:200]}"
        recording = Recording.load(self.temporary / self.name / "whole" / "parity")
        recipe = Recipe.load(self.temporary / self.name / "whole" / "recipe.yaml")
        try:
            engine = _openvino(target) if key == "nncf" else _session(target)
            calls = [difference(y, engine(feed)).sqnr for feed, y in zip(recording.feeds, recording.outputs, strict=True)]
            pictures = difference(recording.pictures, draw(self.reference, engine, recipe)).sqnr
            read, distance = self.digits(engine, label)
            small = {name: np.asarray(value)[:2] for name, value in recording.feeds[0].items()}
            times = measure({"float": open_graph(source / "model.onnx"), "peer": engine}, small)
        except (BackendError, RuntimeError, ValueError, *session_errors()) as error:
            return f"does not run: {str(error).splitlines()[0][:200]}"
        size = sum(path.stat().st_size for path in out.iterdir() if path.name != "fixed.onnx")
        speed = times["float"].median / times["peer"].median
        return Figures(float(np.mean(calls)), min(calls), pictures, read, distance, size, speed, coverage=float("nan"))

    def calls(self) -> dict[str, Any]:
        """Return the peers' calibration data: every second call of the 16 pictures that dq-export's calibration samples."""
        feeds: list[Any] = []

        def record(feed: Any) -> Float32:
            feeds.append(feed)
            return self.reference.forward(feed)

        for start in (0, 8):
            conditions = np.arange(start, start + 8) % len(self.reference.conditions)
            self.reference.draw(record, self.reference.noise(8, start), conditions, steps=50, guidance=self.guidance)
        return {name: np.stack([feed[name] for feed in feeds[::2]]) for name in feeds[0]}

    def digits(self, engine: Callable[[Any], Float32], label: str) -> tuple[float, float]:
        """Return the share of digits that are read as requested, and the distance of all from real ones."""
        conditions, digits = conditions_and_digits(self.reference, self.count)
        pictures = draw_in_parts(self.reference, engine, conditions, steps=self.steps, guidance=self.guidance, seed=4242)
        if self.keep:
            self.keep.mkdir(parents=True, exist_ok=True)
            save_pictures(self.keep / f"{self.name} {label.replace('/', ' ')}.png", [pictures[:20]])
        return float((self.reader.read(pictures) == digits).mean()), self.reader.distance(pictures)


def _environment(folder: Path, packages: list[str]) -> str:
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        for package in packages:  # in order: the first may fix the version of a dependency of the next
            subprocess.run([python, "-m", "pip", "install", "-q", package], check=True)
    return str(python)


def _session(path: Path) -> Callable[[Any], Float32]:
    import onnxruntime

    # ONNX Runtime 1.31 fuses a quantized MatMul and its Add into a Gemm that it then refuses.
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"], disabled_optimizers=["MatMulAddFusion"])
    engine, fixed = OrtEngine(session), session.get_inputs()[0].shape[0]

    def call(feed: Any) -> Float32:
        size = len(feed["hidden_states"])
        if not isinstance(fixed, int) or size == fixed:
            return engine(feed)
        pad = {
            name: np.resize(value, (fixed, *np.shape(value)[1:])) if len(value) == size else value for name, value in feed.items()
        }
        return engine(pad)[:size]

    return call


def _openvino(path: Path) -> Callable[[Any], Float32]:
    import openvino

    network = openvino.Core().compile_model(path, "CPU")

    def call(feed: Any) -> Float32:
        output: Float32 = np.array(network(dict(feed))[0])  # the output is a view of memory that the next call overwrites
        return output

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES), help="words that a recipe's name must begin with")
    parser.add_argument("--models", nargs="*", default=["plain", "hard"], help="plain, hard, text, or folders")
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), help="without a name: all of them")
    parser.add_argument("--peers-folder", type=Path, default=Path("peers"))
    parser.add_argument("--count", type=int, default=200, help="digits to draw for reading and distance")
    parser.add_argument("--steps", type=int, default=25, help="sampler steps of those digits")
    parser.add_argument("--keep", type=Path, help="folder for a strip of twenty digits of every row")
    parser.add_argument("--json", type=Path, help="also write the table there")
    options = parser.parse_args()
    reader = Reader.train()
    table = ResultTable(COLUMNS, options.json)
    with tempfile.TemporaryDirectory() as temporary:
        models = {"plain": "dit-digits", "hard": str(Path(temporary) / "model"), "text": "pixart-digits"}
        harden_folder(PACKAGED / "dit-digits", Path(models["hard"]))
        for name in options.models:
            model = models.get(name, name)
            bench = Bench(Path(name).name, model, Path(temporary), options, reader)
            read, distance = bench.digits(bench.reference.forward, "PyTorch")
            table.add([bench.name, "PyTorch float32", "", "", "", f"{read:.1%}", f"{distance:.3f}", "", "", ""])
            for label, recipe in RECIPES.items():
                if any(label.startswith(word) for word in options.recipes):
                    table.add([bench.name, label, *cells(bench.export(label, recipe))])
            for key in PEERS if options.peers == [] else options.peers or ():
                result = bench.peer(key, options.peers_folder)
                if isinstance(result, Figures):
                    table.add([bench.name, PEERS[key][0], *cells(result)])
                else:
                    print(f"{bench.name}, {PEERS[key][0]}: {result}", flush=True)


def cells(figures: Figures) -> list[str]:
    """Return the cells behind the names of model and recipe."""
    digits = [f"{figures.read:.1%}", f"{figures.distance:.3f}"]
    return [*figures.decibels(), *digits, figures.megabytes(), f"{figures.speed:.2f}x", figures.low_precision()]


if __name__ == "__main__":
    main()
