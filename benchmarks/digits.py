"""Counts the drawn digits that are read as requested, of the float model and its engines from the same noise.

    pip install ".[cpu,metrics,text]" && python benchmarks/digits.py [--model pixart-digits] [OUT ...]

Each OUT is an export of the model. Without OUT the model is exported with default options. The reader is a support vector
machine, trained on three quarters of scikit-learn's 8x8 digits. Its accuracy on the other quarter is printed, too.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
PART = 8
"""Pictures that `draw_in_parts` draws at once."""


def conditions_of(model: str) -> Path | None:
    """Return the file of a model's conditions, if its folder has one."""
    path = Path(model) / "conditions.safetensors"
    return path if path.exists() else None


def load_model(model: str) -> Reference:
    """Load a model with its conditions. The prompts of a text-to-image model are encoded."""
    path = conditions_of(model)
    recipe, source = pin(Recipe.parse({"model": model, "conditions": None if path is None else str(path)}, "benchmark"))
    reference = load(source)
    if path is not None:
        reference.conditions = load_conditions(path)
    elif recipe.prompts is not None:
        reference.conditions = reference.encode(recipe.prompts, "cpu")
    return reference


def conditions_and_digits(reference: Reference, count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the conditions of `count` pictures, in turn, and the digits that they name."""
    conditions = np.arange(count, dtype=np.int64) % len(reference.conditions)
    return conditions, np.asarray([named_digit(name) for name in reference.conditions.names])[conditions]


def draw_in_parts(
    reference: Reference,
    network: Callable[[Any], Float32],
    conditions: npt.NDArray[np.int64],
    *,
    steps: int,
    guidance: float,
    seed: int,
) -> Float32:
    """Draw a picture of each condition; the noise of a part depends on the seed and on its first picture."""
    parts = []
    for start in range(0, len(conditions), PART):
        part = conditions[start : start + PART]
        noise = reference.noise(len(part), seed + start)
        parts.append(reference.draw(network, noise, part, steps=steps, guidance=guidance))
    return np.concatenate(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", nargs="*", type=Path)
    parser.add_argument("--model", default="dit-digits")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=77)
    parser.add_argument("--pictures", type=Path, help="also save the first 20 pictures of each as PNG")
    options = parser.parse_args()
    reader = Reader.train()
    print(f"reader: {reader.accuracy:.1%} of held-out real digits")
    with tempfile.TemporaryDirectory() as temporary:
        folders = options.out or [Path(temporary) / "out"]
        if not options.out:
            dq_export.export(model=options.model, output_dir=folders[0])
        reference = load_model(options.model)
        networks = {"PyTorch float": reference.forward} | {str(path): open_graph(path / "model.onnx") for path in folders}
        pictures_of: dict[str, list[Float32]] = {name: [] for name in networks}
        conditions, digits = conditions_and_digits(reference, options.count)
        for start in range(0, options.count, BATCH):
            part = conditions[start : start + BATCH]
            noise = reference.noise(len(part), options.seed + start)
            for name, network in networks.items():
                pictures = reference.draw(network, noise, part, steps=options.steps, guidance=reference.guidance)
                pictures_of[name].append(pictures)
            print(f"drawn {start + len(part)}/{options.count}", flush=True)
        for name, parts in pictures_of.items():
            right = reader.read(np.concatenate(parts)) == digits
            print(f"{name}: {right.sum()}/{options.count} read as requested ({right.mean():.1%})")
        if options.pictures:
            save_pictures(options.pictures, [parts[0][:20] for parts in pictures_of.values()])


if __name__ == "__main__":
    main()
