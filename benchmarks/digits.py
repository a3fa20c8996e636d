"""How many drawn digits are read as the digit that was asked for: the float model and its engines, from the same noise.

    pip install ".[cpu,metrics,text]" && python benchmarks/digits.py [--model pixart-digits] [OUT ...]

Each OUT is an export of the model; without any, one is made with default options. The reader is a support vector
machine on scikit-learn's real 8x8 digits, trained on three quarters of them; its accuracy on the rest is printed too.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
from reading import Reader, named_digit

import dq_export
from dq_export.core.condition_file import load_conditions
from dq_export.core.recipe import Recipe
from dq_export.deploy.onnxruntime.cpu import open_graph
from dq_export.families.reference import Reference
from dq_export.families.source import load, pin
from dq_export.stages.verify import save_pictures

Float32 = npt.NDArray[np.float32]
BATCH = 50


def conditions_of(model: str) -> Path | None:
    """What a model without a text encoder draws, where its folder says it."""
    path = Path(model) / "conditions.safetensors"
    return path if path.exists() else None


def load_model(model: str) -> Reference:
    """A model with what it draws: a text-to-image model's prompts are encoded."""
    path = conditions_of(model)
    recipe, source = pin(Recipe(model=model, conditions=None if path is None else str(path)))
    reference = load(source)
    if path is not None:
        reference.conditions = load_conditions(path)
    elif recipe.prompts is not None:
        reference.conditions = reference.encode(recipe.prompts, "cpu")
    return reference


def wanted(reference: Reference, count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Conditions in turn for `count` pictures, and the digits that they name."""
    conditions = np.arange(count, dtype=np.int64) % len(reference.conditions)
    return conditions, np.asarray([named_digit(name) for name in reference.conditions.names])[conditions]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", nargs="*", type=Path)
    parser.add_argument("--model", default="dit-digits")
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
            dq_export.export(model=options.model, output_dir=folders[0])
        reference = load_model(options.model)
        networks = {"PyTorch float": reference.forward} | {str(path): open_graph(path / "model.onnx") for path in folders}
        drawn: dict[str, list[Float32]] = {name: [] for name in networks}
        conditions, digits = wanted(reference, options.count)
        for start in range(0, options.count, BATCH):
            part = conditions[start : start + BATCH]
            noise = reference.noise(len(part), options.seed + start)
            for name, network in networks.items():
                drawn[name].append(reference.draw(network, noise, part, steps=options.steps, guidance=reference.guidance))
            print(f"drawn {start + len(part)}/{options.count}", flush=True)
        for name, pictures in drawn.items():
            right = reader.read(np.concatenate(pictures)) == digits
            print(f"{name}: {right.sum()}/{options.count} read as asked for ({right.mean():.1%})")
        if options.pictures:
            save_pictures(options.pictures, [pictures[0][:20] for pictures in drawn.values()])


if __name__ == "__main__":
    main()
