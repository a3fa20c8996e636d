"""The fixed embeddings of a network's positions and timesteps, computed in float64 and rounded once."""

from __future__ import annotations

from typing import Any

import numpy as np


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


def settle_timesteps(model: Any) -> None:
    """Give every timestep embedding one constant table of frequencies.

    diffusers computes the frequencies at every call with PyTorch's exponential function, and the exporter folds them with
    another one. Their last bits differ, and timestep * frequency multiplies that by up to 1000: the graph's embedding is
    then 60 dB above float32 rounding, which a network of large weights makes louder in every block.

    Exactness: within float32 rounding of diffusers' own frequencies.
    Source: section 3.5 of arXiv 1706.03762, with cosines first as DiT has them.
    """
    import torch
    from diffusers.models.embeddings import Timesteps

    class Table(torch.nn.Module):  # type: ignore[misc]
        def __init__(self, own: Any) -> None:
            super().__init__()
            half = own.num_channels // 2
            exact = own.scale * np.exp(-np.log(10_000) * np.arange(half) / (half - own.downscale_freq_shift))
            # No buffer: a copy of the network in bfloat16 must keep these in float32, as diffusers does.
            self.frequencies = torch.from_numpy(exact.astype(np.float32))

        def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
            angles = timesteps[:, None].to(torch.float32) * self.frequencies.to(timesteps.device)[None]
            return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)

    tables = {name: module for name, module in model.named_modules() if type(module) is Timesteps}
    if not tables:
        return
    # One module for all blocks: the graph then holds its table once.
    shared = Table(next(iter(tables.values())))
    for name in tables:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, shared)
