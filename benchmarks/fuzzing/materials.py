"""The materials of the mutants: small valid models in every layout, and a finished export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "sample_size": 4,
    "patch_size": 2,
    "num_embeds_ada_norm": 5,
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
}
OLD = {
    "_class_name": "Transformer2DModel", "_diffusers_version": "0.12.0.dev0", "activation_fn": "gelu-approximate",
    "attention_bias": True, "attention_head_dim": 16, "cross_attention_dim": None, "dropout": 0.0, "in_channels": 4,
    "norm_elementwise_affine": False, "norm_num_groups": 32, "norm_type": "ada_norm_zero", "num_attention_heads": 2,
    "num_embeds_ada_norm": 5, "num_layers": 2, "num_vector_embeds": None, "only_cross_attention": False, "out_channels": 4,
    "patch_size": 2, "sample_size": 4, "upcast_attention": False, "use_linear_projection": False,
}  # fmt: skip
"""A config of 2022, as the hub has it."""
LAYOUTS = ("plain", "published", "sharded", "sharded_bin")
EXPORT = ("--steps", "2", "--calib-size", "1", "--parity-size", "1", "--min-sqnr", "0")
"""Options for the shortest export."""


def network(seed: int = 0, **changes: Any) -> Any:
    """A DiT of 2 blocks and width 32 with seeded random weights that are large enough to show a wrong fold."""
    import torch
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(seed)
    model = DiTTransformer2DModel(**{**TINY, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.5 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.2
            parameter.copy_(torch.randn_like(parameter) * scale)
        first = model.transformer_blocks[0]
        for block in model.transformer_blocks:  # diffusers gives each block an embedding; DiT has one
            block.norm1.emb.load_state_dict(first.norm1.emb.state_dict())
    return model


def decoder() -> Any:
    """A VAE of one small block."""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(latent_channels=4, block_out_channels=(8,), layers_per_block=1, norm_num_groups=2)


def save_models(folder: Path) -> None:
    """Write the same model in every layout."""
    from diffusers import DDIMScheduler

    model, vae = network(), decoder()
    for layout in LAYOUTS:
        to = folder / layout
        binary, shard = layout in ("published", "sharded_bin"), "60KB" if layout.startswith("sharded") else "5GB"
        model.save_pretrained(to / "transformer", safe_serialization=not binary, max_shard_size=shard)
        vae.save_pretrained(to / "vae", safe_serialization=not binary)
        DDIMScheduler(beta_schedule="linear", clip_sample=False).save_pretrained(to / "scheduler")
        classes = {"scheduler": ["diffusers", "DDIMScheduler"], "vae": ["diffusers", "AutoencoderKL"]}
        index = {"_class_name": "DiTPipeline", "_diffusers_version": "0.12.0.dev0", "id2label": {"0": "a"}, **classes}
        index["transformer"] = ["diffusers", "Transformer2DModel" if binary else "DiTTransformer2DModel"]
        (to / "model_index.json").write_text(json.dumps(index, indent=1))
        if layout == "published":
            (to / "transformer" / "config.json").write_text(json.dumps(OLD, indent=1))


def save_text(folder: Path) -> None:
    """Write a PixArt of two blocks with a T5 of one, `text`, and conditions for it, `conditions.safetensors`."""
    import torch
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    from dq_export.core.condition_file import save_conditions
    from dq_export.core.network import Conditions

    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "cross_attention_dim": 32, "caption_channels": 8}
    network = PixArtTransformer2DModel(**sizes, in_channels=4, out_channels=8, num_layers=2, sample_size=4)
    network.save_pretrained(folder / "text" / "transformer")
    marks = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -9.0)]
    words = [(f"\u2581{word}", -1.0) for word in ("a", "red", "blue", "square", "circle")]
    T5Tokenizer(vocab=[*marks, *words], extra_ids=0).save_pretrained(folder / "text" / "tokenizer")
    encoder = T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu")
    T5EncoderModel(encoder).save_pretrained(folder / "text" / "text_encoder")
    DPMSolverMultistepScheduler().save_pretrained(folder / "text" / "scheduler")
    parts = {"tokenizer": ["transformers", "T5Tokenizer"], "text_encoder": ["transformers", "T5EncoderModel"]}
    index = {"_class_name": PixArtSigmaPipeline.__name__, "transformer": ["diffusers", "PixArtTransformer2DModel"], **parts}
    (folder / "text" / "model_index.json").write_text(json.dumps(index, indent=1))
    rows = {"encoder_hidden_states": torch.randn(2, 6, 8).numpy(), "encoder_attention_mask": torch.ones(2, 6).numpy()}
    null = {name: value[:1] for name, value in rows.items()}
    save_conditions(folder / "conditions.safetensors", Conditions(names=("a", "b"), arrays=rows, null=null))


def save_graphs(folder: Path, export: Path) -> None:
    """Write ONNX files: every form of the checker's table, and the graphs of an export."""
    import onnx_ir as ir
    from forms import FORMS

    folder.mkdir()
    for number, form in enumerate(FORMS):
        ir.save(form.model(form.only or ("ort", "trt-rtx")[number % 2]), folder / f"form{number:03}.onnx")
    for name, source in (("qdq", export), ("float", export / "float")):
        (folder / name).mkdir()
        for file in source.iterdir():
            if file.name.startswith("model.onnx") or file.suffix == ".safetensors":
                shutil.copyfile(file, folder / name / file.name)
