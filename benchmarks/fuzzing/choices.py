"""The space of valid models and options that the sweep draws from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .materials import OLD, network

MODELS: dict[str, tuple[Any, ...]] = {
    "num_layers": (2, 1, 3, 4),
    "heads": ((2, 16), (2, 8), (1, 36), (3, 24), (4, 16), (5, 8)),
    "picture": ((4, 2), (8, 2), (6, 3), (5, 1), (8, 4), (7, 7)),
    "in_channels": (4, 1, 3, 2),
    "learned_sigma": (False, True),
    "num_embeds_ada_norm": (5, 1, 2, 1000),
    "activation_fn": ("gelu-approximate", "gelu", "geglu"),
    "norm_eps": (1e-5, 1e-6, 1e-2),
    "attention_bias": (True, False),
    "weights": (1.0, 0.2, 3.0),
    "layout": ("safetensors", "bin", "old bin", "float16", "shards", "float16 variant"),
    "scheduler": (
        "DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler",
        "UniPCMultistepScheduler", "HeunDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DEISMultistepScheduler",
        "DPMSolverSinglestepScheduler", "LCMScheduler",
    ),
    "spacing": ("", "leading", "trailing", "linspace"),
    "prediction": ("epsilon", "v_prediction", "sample"),
    "betas": ("linear", "scaled_linear", "squaredcos_cap_v2"),
}  # fmt: skip
OPTIONS: dict[str, tuple[Any, ...]] = {
    "format": (None, "onnx", "trt-rtx"),
    "provider": (None, None, None, "openvino"),
    "bits": ("w8a8", "w8a16", "w6a6", "w4a8", "w4a16", "w4a4", "fp8"),
    "granularity": (None, "token", "token-group"),
    "group-size": (None, 0, 4, 16, 64),
    "rounding": (None, "mse", "gptq"),
    "method": (None, "percentile", "mse"),
    "bins": (None, "per-step", 1, 2),
    "scaling": (None, "none", "dilate", "smooth", "balance", "equalize"),
    "timesteps": (None, "shared", "per-sample"),
    "steps": (3, 1, 2, 6),
    "guidance-scale": (None, 1, 7.5),
    "seed": (0, 7, 2**47, 2**63),
    "exclude": (None, r"blocks\.0\.", "ff"),
    "triton": (None, True),
    "bias-correction": (None, True),
    "calibration": (None, "progressive"),
    "calib-size": (1, 3),
    "dtype": (None, None, "fp16", "bf16"),
}
SANE = {"w8a8": 20.0, "w8a16": 20.0, "w6a6": 12.0, "w4a8": 5.0, "w4a16": 5.0, "w4a4": 0.0, "fp8": 10.0}
"""Lowest SQNR in dB of the worst network call of a model with random weights, by bits. Below it, a run must fail."""


def fits(choice: Mapping[str, Any]) -> bool:
    """Whether options agree according to the table in docs/bits.md. Without this check most runs are refused."""
    bits, granularity, size = choice["bits"], choice["granularity"], choice["group-size"]
    rtx, openvino = choice["format"] == "trt-rtx", choice["provider"] == "openvino"
    dtypes = (None, "fp16", "bf16") if rtx else (None, "bf16") if openvino else (None,)
    wrong = (
        choice["dtype"] not in dtypes,
        choice["format"] is not None and (openvino or choice["triton"]),
        choice["triton"] and (openvino or choice["timesteps"] == "shared"),
        openvino and (bits, granularity, size) not in (("w8a8", None, None), ("w8a8", None, 0)),
        bits == "fp8" and (not rtx or granularity or size or choice["rounding"] == "gptq"),
        rtx and (bits == "w8a16" or granularity == "token-group"),
        granularity == "token" and bits.endswith("16"),
        granularity == "token-group" and (bits not in ("w8a8", "w4a8") or size == 0),
        size == 0 and bits.endswith("16"),
        size and bits in ("w8a8", "w6a6") and granularity != "token-group",
        size and choice["heads"][0] * choice["heads"][1] % size != 0,
    )
    return not any(wrong)


def save_model(choice: Mapping[str, Any], folder: Path) -> None:
    """Write a pipeline folder with seeded random weights."""
    import torch

    (heads, width), (sample, patch) = choice["heads"], choice["picture"]
    channels = choice["in_channels"]
    copied_keys = ("num_layers", "num_embeds_ada_norm", "activation_fn", "norm_eps", "attention_bias")
    model = network(
        num_attention_heads=heads, attention_head_dim=width, sample_size=sample, patch_size=patch, in_channels=channels,
        out_channels=channels * (1 + choice["learned_sigma"]), **{key: choice[key] for key in copied_keys},
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(choice["weights"])
    layout = choice["layout"]
    model.to(torch.float16 if "float16" in layout else torch.float32).save_pretrained(
        folder / "transformer",
        safe_serialization="bin" not in layout,
        max_shard_size="40KB" if layout == "shards" else "5GB",
        variant="fp16" if "variant" in layout else None,
    )
    if layout == "old bin":
        file = folder / "transformer" / "config.json"
        config = {key: value for key, value in json.loads(file.read_text()).items() if not key.startswith("_")}
        file.write_text(json.dumps({**config, **{key: OLD[key] for key in OLD if key not in config}}))
    save_scheduler(choice, folder / "scheduler")
    classes = {"transformer": ["diffusers", "DiTTransformer2DModel"], "scheduler": ["diffusers", choice["scheduler"]]}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline", **classes}))


def save_scheduler(choice: Mapping[str, Any], folder: Path) -> None:
    """Write the scheduler's config, with the values of the choice that its class accepts."""
    import inspect

    import diffusers

    kind = getattr(diffusers, choice["scheduler"])
    settings = {
        "beta_schedule": choice["betas"],
        "prediction_type": choice["prediction"],
        "timestep_spacing": choice["spacing"],
        "clip_sample": False,
    }
    arguments = inspect.signature(kind.__init__).parameters
    kind(**{key: value for key, value in settings.items() if key in arguments and value != ""}).save_pretrained(folder)


def words(choice: Mapping[str, Any]) -> list[str]:
    """Return the command line of a choice, without the output folder."""
    arguments = ["--model", "model", "--parity-size", "1", "--min-coverage", "1", "--min-sqnr", str(SANE[choice["bits"]])]
    for name in OPTIONS:
        value = choice[name]
        if value is True:
            arguments.append(f"--{name}")
        elif value is not None:
            arguments += [f"--{name}", str(value)]
    return arguments
