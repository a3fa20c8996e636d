"""Make a diffusers folder of Stable Diffusion 3.5 medium's or FLUX.1-dev's exact architecture, and conditions for it.

    python benchmarks/mmdit_xl.py FOLDER --network sd35-medium [--layers 24] [--dtype bf16]
    python benchmarks/mmdit_xl.py FOLDER --network flux-dev --layers 2,4

SD3.5 medium has 24 blocks of width 1536, 13 of them with dual attention: 2.2 G parameters, 9.0 GB in float32. FLUX.1-dev has 19
blocks of two streams and 38 of one, of width 3072: 11.9 G parameters; `--layers` makes fewer blocks. The random weights are
seeded, let every block add to the residual, like trained weights, and are written in shards as on the hub. Speed and memory
equal those of the real model, pictures do not. `FOLDER/conditions.safetensors` holds 4 random texts in place of those of T5 and
CLIP, and a null text: pass it as `--conditions`. There is no text encoder and no VAE.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from random_texts import TEXTS, as_conditions

from dq_export.core.condition_file import save_conditions
from dq_export.core.network import Conditions
from dq_export.families.flux import SCHEDULER as FLUX_SCHEDULER

SD35_MEDIUM = {
    "sample_size": 64,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
"""The hub's configuration, for pictures of 512 pixels instead of 1024."""
FLUX_DEV = {"num_layers": 19, "num_single_layers": 38, "guidance_embeds": True}
"""Other values are diffusers' defaults."""
WIDTH = 4096
NETWORKS: dict[str, tuple[str, dict[str, Any], str, int, int]] = {
    "sd35-medium": ("SD3Transformer2DModel", SD35_MEDIUM, "StableDiffusion3Pipeline", 333, 2048),
    "flux-dev": ("FluxTransformer2DModel", FLUX_DEV, "FluxPipeline", 512, 768),
}
"""Class, configuration, pipeline, tokens of a text, width of the pooled text."""


def make(folder: Path, network: str, layers: list[int], dtype: str, *, seed: int = 0) -> None:
    """Write the pipeline folder: transformer, the pipeline's scheduler, and conditions."""
    kind, config, pipeline, tokens, pooled = NETWORKS[network]
    depth = dict(zip(("num_layers", "num_single_layers"), layers, strict=False))
    dual = {"dual_attention_layers": tuple(range(min(13, layers[0])))} if layers and network == "sd35-medium" else {}
    torch.manual_seed(seed)
    torch.set_default_dtype({"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])
    model = getattr(diffusers, kind)(**{**config, **depth, **dual})
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and "norm" in name:  # modulations
                torch.nn.init.normal_(module.weight, std=0.02)
                torch.nn.init.normal_(module.bias, std=0.2)
    model.to(torch.get_default_dtype()).save_pretrained(folder / "transformer", max_shard_size="5GB")
    scheduler = {key: value for key, value in FLUX_SCHEDULER.items() if key != "_class_name"}
    settings = scheduler if network == "flux-dev" else {"shift": 3.0}
    diffusers.FlowMatchEulerDiscreteScheduler(**settings).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline}) + "\n")
    save_conditions(folder / "conditions.safetensors", conditions(tokens, pooled, null=network == "sd35-medium", seed=seed))


def conditions(tokens: int, pooled: int, *, null: bool, seed: int) -> Conditions:
    """Return random texts, and a null text."""
    rng = np.random.default_rng(seed)
    states = rng.normal(scale=0.2, size=(TEXTS + 1, tokens, WIDTH)).astype(np.float32)
    rows = {"encoder_hidden_states": states, "pooled_projections": rng.normal(size=(TEXTS + 1, pooled)).astype(np.float32)}
    return as_conditions(rows, null=null)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--network", choices=tuple(NETWORKS), required=True)
    parser.add_argument("--layers", default="", help="N, or N,M for blocks of two streams and of one")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    options = parser.parse_args()
    make(options.folder, options.network, [int(word) for word in options.layers.split(",") if word], options.dtype)
