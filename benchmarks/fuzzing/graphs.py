"""Mutates ONNX files for `dq-export check`: their structure, their external data, their bytes."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

from .cases import Case, Format
from .graph_changes import CHANGES
from .values import mutate_bytes, mutate_path

TARGETS = ("trt", "trt-rtx", "ort")


def graph(rng: random.Random, materials: Path, work: Path, guard: Path) -> Case:
    """Mutate one of the checker's forms, or an exported graph."""
    import onnx

    sources = sorted((materials / "graphs").glob("form*.onnx"))
    large = rng.random() < 0.15
    source = materials / "graphs" / rng.choice(("qdq", "float")) / "model.onnx" if large else rng.choice(sources)
    file = work / "m" / "model.onnx"
    if large:
        shutil.copytree(source.parent, file.parent)
    else:
        file.parent.mkdir()
        shutil.copyfile(source, file)
    words = ["check", "m/model.onnx", "--target", rng.choice(TARGETS), *rng.choice(((), ("--json",)))]
    kind = rng.random()
    if kind < 0.04:
        other = rng.choice(sorted(file.parent.iterdir()))
        return Case(words, mutate_path(rng, other, guard), writes=())
    if kind < 0.24:
        other = rng.choice(sorted(file.parent.iterdir()))
        data, mutation = mutate_bytes(rng, other.read_bytes(), rng.choice((None, 300)))
        other.write_bytes(data)
        return Case(words, mutation, writes=())
    model = onnx.load(file, load_external_data=False)
    mutation = "; ".join(rng.choice(CHANGES)(rng, model) for _ in range(rng.choice((1, 1, 1, 2, 3))))
    if "loop" in mutation:
        (file.parent / "loop").symlink_to("loop")
    if "fifo" in mutation:
        os.mkfifo(file.parent / "fifo")
    file.write_bytes(model.SerializeToString())
    return Case(words, f"{source.stem}: {mutation}"[:300], writes=())


FORMATS = (Format("ONNX for check", 20, graph, accepts=(0, 3)),)
