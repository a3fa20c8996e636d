"""What PyTorch computed from noise that calibration did not see: the truth of every comparison."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dq_export.core.documents import DocumentError, shown_path
from dq_export.core.network import Feed, batch_of
from dq_export.core.progress import Advance
from dq_export.core.recipe import Recipe
from dq_export.core.scales import TimestepBins
from dq_export.core.tensor_file import load_tensors, save_tensors
from dq_export.deploy.parity import pick_calls
from dq_export.deploy.replay import load_replay, save_replay

from ..families.reference import Float32, ModelError, Network, Reference
from ..output_folder import OutputError
from .conditions import draws_prompts

HELD_OUT = 1_000_000
"""Added to the seed, so that the noise is none of calibration's."""
PICTURES = "pytorch.safetensors"


@dataclass(frozen=True, kw_only=True, eq=False)
class Recording:
    """Network calls of a guided trajectory, and the pictures at the end of several.

    Args:
        feeds: inputs of the chosen calls, as the graph takes them; `outputs`: PyTorch's.
        pictures: float32[N, ...], the latents that PyTorch sampled.
    """

    feeds: list[Feed]
    outputs: list[Float32]
    pictures: Float32

    @staticmethod
    def load(folder: Path) -> Recording:
        """Read what `record` wrote.

        Raises:
            OutputError: a file is missing or is not what `record` wrote.
        """
        try:
            feeds, outputs = load_replay(folder)
            pictures = load_tensors(folder / PICTURES)[0].get("pictures", np.zeros(0))
            if pictures.dtype != np.float32 or pictures.ndim < 2 or not np.isfinite(pictures).all():
                raise DocumentError(f"{shown_path(folder / PICTURES)}: expected finite pictures float32[N, ...]")
        except DocumentError as error:
            raise OutputError(f"{error}; delete {shown_path(folder)} and run the same command again") from error
        return Recording(feeds=feeds, outputs=outputs, pictures=pictures)


def record(reference: Reference, recipe: Recipe, bins: TimestepBins, folder: Path, progress: Advance) -> None:
    """Sample `recipe.parity_size` pictures with PyTorch; write them, and one call for each timestep bin, to `folder`.

    Of the sizes behind the first one a batch of pictures is sampled, of which the calls alone are written.

    Raises:
        ModelError: PyTorch's own output is not finite.
    """
    batches = -(-recipe.parity_size // reference.batch)
    others, count = recipe.pixels[1:], min(recipe.parity_size, reference.batch)
    total = len(reference.timesteps(recipe.steps)) * (batches + len(others))
    calls = _Calls(reference, bins, progress, total)
    pictures = calls.draw(recipe)
    for size in others:
        with reference.at(size):
            calls.draw(recipe.model_copy(update={"parity_size": count}))
    feeds, outputs = calls.feeds, calls.outputs
    folder.mkdir(parents=True, exist_ok=True)
    save_replay(folder, feeds, outputs)
    save_tensors(folder / PICTURES, {"pictures": pictures})


class _Calls:
    """The chosen calls of trajectories, PyTorch's outputs, and progress over all calls."""

    def __init__(self, reference: Reference, bins: TimestepBins, progress: Advance, total: int) -> None:
        self.reference, self.bins, self.progress, self.total, self.done = reference, bins, progress, total, 0
        self.feeds: list[Feed] = []
        self.outputs: list[Float32] = []

    def draw(self, recipe: Recipe) -> Float32:
        """The pictures of a recipe, at the reference's size; of the first batch one call for each bin is kept.

        Raises:
            ModelError: PyTorch's own output is not finite.
        """
        start, chosen = self.done, pick_calls(self.bins.index(self.reference.timesteps(recipe.steps)))

        def recorded(feed: Feed) -> Float32:
            output = self.reference.forward(feed)
            if not np.isfinite(output).all():
                step = float(np.asarray(feed["timestep"]).ravel()[0])
                raise ModelError(f"PyTorch's own output has NaN or Inf at timestep {step:g}; check the checkpoint")
            if self.done - start in chosen:
                self.feeds.append(feed_of(feed, recipe))
                self.outputs.append(output)
            self.done += 1
            self.progress(self.done, self.total, "calls")
            return output

        return draw(self.reference, recorded, recipe)


def draw(reference: Reference, network: Network, recipe: Recipe) -> Float32:
    """Sample the recording's pictures with another network, from the same noise."""
    conditions = drawn_conditions(reference, recipe)
    noise = reference.noise(recipe.parity_size, recipe.seed + HELD_OUT)
    parts: list[npt.NDArray[np.float32]] = []
    for start in range(0, recipe.parity_size, reference.batch):
        part = slice(start, start + reference.batch)
        parts.append(
            reference.draw(network, noise[part], conditions[part], steps=recipe.steps, guidance=recipe.guidance_scale or 1.0)
        )
    return np.concatenate(parts)


def drawn_conditions(reference: Reference, recipe: Recipe) -> npt.NDArray[np.int64]:
    """int64[recipe.parity_size]: the index of each picture's condition."""
    return np.arange(recipe.parity_size, dtype=np.int64) % len(reference.conditions)


def prompts_of(reference: Reference, recipe: Recipe) -> list[str]:
    """The prompt of each picture; none of a network that draws class labels."""
    names = reference.conditions.names
    return [names[index] for index in drawn_conditions(reference, recipe)] if draws_prompts(recipe) else []


def feed_of(feed: Feed, recipe: Recipe) -> Feed:
    """The feed with a timestep for each sample, where the graph takes one."""
    if recipe.timesteps == "shared":
        return feed
    return {**feed, "timestep": np.repeat(feed["timestep"], batch_of(feed))}
