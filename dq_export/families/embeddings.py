"""The fixed embeddings of a network's positions and timesteps, computed in float64 and rounded once."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt


def settle_positions(model: Any) -> None:
    """Recompute the position embedding in float64, rounded once.

    diffusers computes it in float32 when a model is made, with sine and cosine whose last bit depends on where in memory
    their operands lie: from one process to the next the network would differ, and no run would repeat another's bytes.

    Exactness: within float32 rounding of diffusers' own; left alone where it is anything else.
    Source: section 3.2 of arXiv 2212.09748 (sine-cosine embedding of the patch grid).
    """
    import torch

    stored = getattr(model.pos_embed, "pos_embed", None)
    side = model.config.sample_size // model.config.patch_size
    quarter = model.inner_dim // 4
    if stored is None or stored.shape != (1, side * side, 4 * quarter):
        return
    angles = np.arange(side)[:, None] / 10_000 ** (np.arange(quarter) / quarter)
    one = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    both = np.concatenate([np.tile(one, (side, 1)), np.repeat(one, side, axis=0)], axis=1).astype(np.float32)
    if np.allclose(both, stored[0].numpy(), atol=1e-5):
        model.pos_embed.pos_embed = torch.from_numpy(both)[None]


class Positions:
    """A forward hook of diffusers' PatchEmbed that adds the embedding of a patch grid of any size.

    diffusers recomputes it by operations that cannot be traced where the grid is not the checkpoint's. Here a call with
    numbers for sizes takes float64's results, rounded once, as `settle_positions` does, and a call with symbols traces
    float32's sines and cosines of the row and of the column.

    Row i of H has the position i * base / (H * scale), where base is the checkpoint's H: a larger picture has a finer grid.

    Exactness: numbers, within float32 rounding of diffusers' own. Symbols, angles are rounded to float32: within 2^-24 of the
    largest position, 4e-6 for 128 rows at scale 2.
    Source: section 3.2 of arXiv 2212.09748; the scale is that of section 3.2 of arXiv 2310.00426.
    """

    def __init__(self, embed: Any, width: int) -> None:
        self.patch, self.quarter = embed.patch_size, width // 4
        self.span = embed.base_size / embed.interpolation_scale

    def __call__(self, module: Any, inputs: tuple[Any, ...], tokens: Any) -> Any:
        """float[B, H * W, width] tokens of a float[B, C, H * patch, W * patch] picture with their positions."""
        import torch

        height, width = (size // self.patch for size in inputs[0].shape[-2:])
        rows, columns = (self._along(size, tokens.device) for size in (height, width))
        both = torch.cat([columns[None].expand(height, -1, -1), rows[:, None].expand(-1, width, -1)], dim=-1)
        return (tokens + both.flatten(0, 1)).to(tokens.dtype)

    def _along(self, size: Any, device: Any) -> Any:
        """float32[size, width / 2]: sines, then cosines."""
        import torch

        if isinstance(size, int):
            return torch.from_numpy(_sines(size, self.span, self.quarter)).to(device)
        steps = torch.arange(size, dtype=torch.float32)
        angles = (steps * self.span / (steps[-1:] + 1))[:, None] * torch.from_numpy(_frequencies(self.quarter)).float()[None]
        return torch.cat([torch.sin(angles), torch.cos(angles)], dim=-1)


def _frequencies(count: int) -> npt.NDArray[np.float64]:
    frequencies: npt.NDArray[np.float64] = 1 / 10_000 ** (np.arange(count) / count)
    return frequencies


@cache
def _sines(size: int, span: float, count: int) -> npt.NDArray[np.float32]:
    angles = (np.arange(size) * span / size)[:, None] * _frequencies(count)
    table: npt.NDArray[np.float32] = np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)
    return table


def settle_timesteps(model: Any) -> None:
    """Give every timestep embedding a constant table of frequencies, of which equal ones share one.

    diffusers computes the frequencies at every call with PyTorch's exponential function, and the exporter folds them with
    another one. Their last bits differ, and timestep * frequency multiplies that by up to 1000: the graph's embedding is
    then 60 dB above float32 rounding, which a network of large weights makes louder in every block.

    Exactness: within float32 rounding of diffusers' own frequencies.
    Source: section 3.5 of arXiv 1706.03762, with cosines first where the network has them so.
    """
    import torch
    from diffusers.models.embeddings import Timesteps

    class Table(torch.nn.Module):  # type: ignore[misc]
        def __init__(self, embedding: Any) -> None:
            super().__init__()
            half = embedding.num_channels // 2
            exact = embedding.scale * np.exp(-np.log(10_000) * np.arange(half) / (half - embedding.downscale_freq_shift))
            # No buffer: a copy of the network in bfloat16 must keep these in float32, as diffusers does.
            self.frequencies = torch.from_numpy(exact.astype(np.float32))
            self.cosines_first = embedding.flip_sin_to_cos

        def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
            angles = timesteps[:, None].to(torch.float32) * self.frequencies.to(timesteps.device)[None]
            both = torch.cos(angles), torch.sin(angles)
            return torch.cat(both if self.cosines_first else both[::-1], dim=-1)

    # One module for all blocks: the graph then holds its table once.
    shared: dict[tuple[float, ...], Table] = {}
    for name, module in list(model.named_modules()):
        if type(module) is Timesteps:
            key = (module.num_channels, module.flip_sin_to_cos, module.downscale_freq_shift, module.scale)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, shared.setdefault(key, Table(module)))


def settle_rotations(model: Any) -> None:
    """Give a network's rotary position embedding one constant table of frequencies, and angles in float32.

    diffusers computes the angles in float64 at every call, for which inference runtimes have no fast kernels, or none.

    Exactness: angles are rounded to float32: within 2^-24 of the largest position, 4e-6 for 64 rows.
    Source: section 3.2.2 of arXiv 2104.09864.
    """
    import torch

    embedding = model.pos_embed

    class Rotations(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            # Each axis of the positions turns pairs of neighbouring channels.
            exact = [embedding.theta ** -(np.arange(0, size, 2) / size) for size in embedding.axes_dim]
            # No buffers: see `settle_timesteps`.
            self.frequencies = torch.from_numpy(np.concatenate(exact).repeat(2).astype(np.float32))
            self.axes = torch.from_numpy(np.arange(len(exact)).repeat(embedding.axes_dim))

        def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            positions = ids.to(torch.float32)[:, self.axes.to(ids.device)]
            angles = positions * self.frequencies.to(ids.device)
            return torch.cos(angles), torch.sin(angles)

    model.pos_embed = Rotations()
