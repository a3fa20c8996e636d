"""diffusers' own pipelines, used as sampling loops of families."""

from __future__ import annotations

from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any

from dq_export.core.network import Feed

from .reference import Float32, MissingPackageError
from .text_parts import silent


def pipeline_of(name: str, **parts: Any) -> Any:
    """A pipeline of a diffusers class, without a VAE and without a progress bar.

    Args:
        parts: the arguments of its constructor but for the VAE; None where it calls for nothing.

    Raises:
        MissingPackageError: the class needs a package that is not installed.
    """
    import diffusers

    # The modules of some classes import parts that no pipeline here uses, and transformers warns of what these go without.
    with silent() if find_spec("transformers") else nullcontext():
        kind = getattr(diffusers, name)
    # Where a package is missing, diffusers has a class of this name that lists what it needs, and whose every use fails.
    packages = [package for package in getattr(kind, "_backends", ()) if package != "torch"]
    if packages:
        raise MissingPackageError(f"diffusers' {name} needs {' and '.join(packages)}; pip install 'dq-export[text]'")
    pipeline = kind(**parts, vae=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def latents_of(pipeline: Any, noise: Float32 | None, prompts: Feed, **settings: Any) -> Float32:
    """The latents that a pipeline samples, float32 of the shape of the noise.

    Args:
        noise: what it starts from; None where the pipeline makes that of a picture.
        prompts: arrays by the names of the pipeline's arguments.
        settings: what else the pipeline takes, such as `height` and `guidance_scale`.
    """
    import torch

    tensors = {name: torch.from_numpy(rows) for name, rows in prompts.items()}
    result = pipeline(latents=None if noise is None else torch.from_numpy(noise), output_type="latent", **tensors, **settings)
    latents: Float32 = result.images.numpy()
    return latents
