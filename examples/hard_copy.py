"""Make a deliberately hard copy of a DiT: the same float function, with outlier channels in every quantized input.

The inputs of qkv, proj and fc1 are scaled per channel by log-normal factors and a few channels by 50; the producers and
the readers' weights are compensated, so the network computes the same function. Static per-tensor int8 collapses on it.

    python examples/hard_copy.py path/to/dit-folder path/to/hard-copy
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel


def harden(model: DiTTransformer2DModel, seed: int = 0, sigma: float = 0.7, outlier: float = 50.0) -> None:
    """Scale input channels in place: log-normal(0, sigma), and 1 channel in 64 (at least one) by `outlier` more."""
    random = torch.Generator().manual_seed(seed)
    width = model.inner_dim

    def factors() -> torch.Tensor:
        value = torch.exp(sigma * torch.randn(width, generator=random))
        value[torch.randperm(width, generator=random)[: max(1, width // 64)]] *= outlier
        return value

    with torch.no_grad():
        for block in model.transformer_blocks:
            attention, modulation = block.attn1, block.norm1.linear
            for first_chunk, readers in (
                (0, (attention.to_q, attention.to_k, attention.to_v)),
                (3, (block.ff.net[0].proj,)),
            ):
                factor = factors()
                shift = slice(first_chunk * width, (first_chunk + 1) * width)
                scale = slice((first_chunk + 1) * width, (first_chunk + 2) * width)
                modulation.weight[shift] *= factor[:, None]
                modulation.bias[shift] *= factor
                modulation.weight[scale] *= factor[:, None]
                modulation.bias[scale] = (1 + modulation.bias[scale]) * factor - 1
                for reader in readers:
                    reader.weight /= factor
            factor = factors()
            attention.to_v.weight *= factor[:, None]
            attention.to_v.bias *= factor
            attention.to_out[0].weight /= factor


def harden_folder(source: Path, target: Path) -> None:
    """Write the hard copy of a pipeline folder, in float32: float16 would not hold the compensation exactly enough."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    model = DiTTransformer2DModel.from_pretrained(source / "transformer", torch_dtype=torch.float32, low_cpu_mem_usage=False)
    harden(model)
    model.save_pretrained(target / "transformer", safe_serialization=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    harden_folder(options.source, options.target)
