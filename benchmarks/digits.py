"""How many drawn digits are read as the digit that was asked for: the float model and its engines, from the same noise.

    pip install ".[cpu,metrics]" && python benchmarks/digits.py [OUT ...]

Each OUT is an export of dit-digits; without any, one is made with default options. The reader is a support vector
machine on scikit-learn's real 8x8 digits, trained on three quarters of them; its accuracy on the rest is printed too.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
from reading import Reader

import dq_export
from dq_export.deploy.onnxruntime.cpu import open_graph
from dq_export.families.source import load_reference
from dq_export.stages.verify import save_pictures

Float32 = npt.NDArray[np.float32]
BATCH = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", nargs="*", type=Path)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=77)
    parser.add_argument("--pictures", type=Path, help="also save the first 20 of each as PNG")
    options = parser.parse_args()
    reader = Reader.train()
    print(f"reader: {reader.accuracy:.1%} of held-out real digits")
    with tempfile.TemporaryDirectory() as temporary:
        folders = options.out or [Path(temporary) / "out"]
        if not options.out:
            dq_export.export(model="dit-digits", output_dir=folders[0])
        reference = load_reference("dit-digits")
        networks = {"PyTorch float": reference.forward} | {str(path): open_graph(path / "model.onnx") for path in folders}
        drawn: dict[str, list[Float32]] = {name: [] for name in networks}
        labels = np.arange(options.count, dtype=np.int64) % 10
        for start in range(0, options.count, BATCH):
            part = labels[start : start + BATCH]
            noise = reference.noise(len(part), options.seed + start)
            for name, network in networks.items():
                drawn[name].append(reference.draw(network, noise, part, steps=options.steps, guidance=reference.guidance))
            print(f"drawn {start + len(part)}/{options.count}", flush=True)
        for name, pictures in drawn.items():
            right = reader.read(np.concatenate(pictures)) == labels
            print(f"{name}: {right.sum()}/{options.count} read as asked for ({right.mean():.1%})")
        if options.pictures:
            save_pictures(options.pictures, [pictures[0][:20] for pictures in drawn.values()])


if __name__ == "__main__":
    main()
