"""The common parts of the trainings of the small digit models: pictures, the loop, and the command line."""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits

SIZE, CLASSES = 16, 10
LOGGED, SAVED = 50, 250
"""Steps between two lines of progress, and steps between two saved files."""


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """The 1,797 digits as float32[N, 1, 16, 16] in [-1, 1] (8x8, bilinear) and their labels int64[N]."""
    data = load_digits()
    small = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8.0 - 1.0
    large = torch.nn.functional.interpolate(small, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    return large, torch.tensor(data.target, dtype=torch.int64)


def warmed_cosine(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate rises over 200 steps and falls to a fiftieth at the last one."""
    warmup = 200
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(i / warmup, 1.0) * (0.02 + 0.49 * (1 + math.cos(math.pi * min(i / steps, 1.0))))
    )


def follow(average: torch.nn.Module, model: torch.nn.Module, step: int) -> None:
    """Move the moving average of a model's parameters towards them, after a number of steps."""
    decay = min(0.998, step / (step + 10))
    with torch.no_grad():
        for mean, new in zip(average.parameters(), model.parameters(), strict=True):
            mean.lerp_(new, 1 - decay)


def fit(
    model: Any, loss_of: Callable[[Any], torch.Tensor], save: Callable[[Any], None], *, steps: int, learning_rate: float
) -> None:
    """Train a model with AdamW; save copies of the moving average of its weights every SAVED steps and at the end.

    Args:
        loss_of: draws a batch and returns the model's loss.
        save: writes a model, which it may change.
    """
    average = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = warmed_cosine(optimizer, steps)
    start, smooth = time.monotonic(), float("nan")
    for step in range(1, steps + 1):
        loss = loss_of(model)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        follow(average, model, step)
        smooth = loss.item() if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss.item()
        if step % LOGGED == 0 or step == steps:
            elapsed = time.monotonic() - start
            left = elapsed / step * (steps - step)
            print(f"step {step}/{steps}  loss {smooth:.4f}  {elapsed:.0f} s, {left:.0f} s left", flush=True)
        if step % SAVED == 0 or step == steps:
            save(copy.deepcopy(average))


def run(
    train: Callable[[int, int, float, int, Path], None],
    text: str,
    *,
    folder: str,
    steps: int,
    learning_rate: float,
    batch: int = 128,
) -> None:
    """Parse the command line of a training, which `text` describes; the other arguments are defaults."""
    parser = argparse.ArgumentParser(description=text.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=Path(folder))
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--learning-rate", type=float, default=learning_rate)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    train(options.steps, options.batch, options.learning_rate, options.seed, options.output_dir)
    print(f"saved {options.output_dir}")
