"""The families that the contract is held to: a tiny checkpoint of each, and what diffusers' own pipeline draws from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from conftest import save_tiny
from ddpm import drawn_by_ddpm_pipeline, save_ddpm
from flux import SIDE, drawn_by_flux_pipeline, save_flux
from flux2 import drawn_by_flux2_pipeline, save_flux2
from pixart import ALPHA, drawn_by_pixart_pipeline, save_pixart
from sd3 import drawn_by_sd3_pipeline, save_sd3
from toy import PROMPTS, TOY, ToyPipeline, save_toy
from unet import INPAINT, REFINER, XL, drawn_by_unet_pipeline, save_lcm, save_unet

from dq_export.core.network import Float32
from dq_export.families import FAMILIES
from dq_export.families.family import Family
from dq_export.families.reference import Reference
from dq_export.families.source import load_reference

SEED = 7


@dataclass(frozen=True, kw_only=True)
class Case:
    """A family, a tiny checkpoint of it, and what diffusers' own pipeline draws from that.

    Args:
        save: writes a pipeline folder.
        changes: values of config.json that the same weights fit.
        size: of the pictures in pixels, where it is not the network's own.
        draw: latents float32[P, ...] of a pipeline folder, conditions and guidance in 4 steps, from the noise of SEED.
    """

    family: Family
    save: Callable[[Path], Path]
    changes: Mapping[str, Any]
    draw: Callable[[Path, Any, Any, float], Float32]
    size: tuple[int, int] | None = None


def loaded(folder: Path, case: Case) -> Any:
    """The network of a pipeline folder, which knows what it draws."""
    reference: Any = load_reference(str(folder))
    if case.size is not None:
        reference.draw_at(*case.size)
    if case.family.encoders:
        reference.conditions = reference.encode(PROMPTS, "cpu")
    return reference


def drawn_by_dit_pipeline(folder: Path, reference: Reference, chosen: Any, guidance: float) -> Float32:
    """DiTPipeline takes no latents and gives pictures: its generators draw our noise, and what stands for its decoder keeps
    the latents."""
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    class Recorder:
        config = SimpleNamespace(scaling_factor=1.0)

        def decode(self, latents: torch.Tensor) -> Any:
            self.latents = latents
            return SimpleNamespace(sample=latents)

    network, recorder = DiTTransformer2DModel.from_pretrained(folder / "transformer"), Recorder()
    pipeline = DiTPipeline(network, recorder, DDIMScheduler.from_pretrained(folder / "scheduler"))
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(SEED * 100_003 + i) for i in range(len(chosen))]
    pipeline(chosen.tolist(), guidance, generators, num_inference_steps=4, output_type="np")
    return recorder.latents.numpy()


def drawn_by_toy_pipeline(folder: Path, reference: Reference, chosen: Any, guidance: float) -> Float32:
    from diffusers import EulerDiscreteScheduler

    network = TOY.network_class("ToyNetwork").from_pretrained(folder / "transformer")
    pipeline = ToyPipeline(network, EulerDiscreteScheduler.from_pretrained(folder / "scheduler"))
    conditions = reference.conditions
    context, null = conditions.rows(chosen)["context"], conditions.null_rows(len(chosen))["context"]
    tensors = map(torch.from_numpy, (context, null, reference.noise(len(chosen), SEED)))
    return np.asarray(pipeline(*tensors, 4, guidance))


def unet_case(save: Callable[[Path], Path]) -> Case:
    """A network of the family `unet`."""
    return Case(
        family=FAMILIES[5],
        save=save,
        changes={"norm_eps": 1e-4},
        draw=lambda *arguments: drawn_by_unet_pipeline(*arguments, SEED),
    )


CASES = {
    "dit": Case(
        family=FAMILIES[0],
        # DiTPipeline has ImageNet's null label, 1000, written into it.
        save=lambda folder: save_tiny(folder, num_embeds_ada_norm=1000, out_channels=4),
        changes={"norm_eps": 1e-4},
        draw=drawn_by_dit_pipeline,
    ),
    "pixart": Case(
        family=FAMILIES[1],
        save=save_pixart,
        changes={"norm_eps": 1e-4},
        draw=lambda *arguments: drawn_by_pixart_pipeline(*arguments, SEED),
    ),
    "pixart-alpha": Case(
        family=FAMILIES[1],
        save=lambda folder: save_pixart(folder, pipeline="PixArtAlphaPipeline", **ALPHA),
        changes={"norm_eps": 1e-4},
        draw=lambda *arguments: drawn_by_pixart_pipeline(*arguments, SEED),
    ),
    "sd3": Case(
        family=FAMILIES[2],
        save=save_sd3,
        changes={"sample_size": 12},
        draw=lambda *arguments: drawn_by_sd3_pipeline(*arguments, SEED),
    ),
    "flux": Case(
        family=FAMILIES[3],
        save=save_flux,
        changes={"axes_dims_rope": [6, 4, 6]},
        draw=lambda *arguments: drawn_by_flux_pipeline(*arguments, SEED),
        size=SIDE,
    ),
    "flux2": Case(
        family=FAMILIES[4],
        save=save_flux2,
        changes={"eps": 1e-4},
        draw=lambda *arguments: drawn_by_flux2_pipeline(*arguments, SEED),
        size=SIDE,
    ),
    "unet": unet_case(save_unet),
    "unet-xl": unet_case(lambda folder: save_unet(folder, **XL)),
    "unet-inpaint": unet_case(lambda folder: save_unet(folder, **XL, **INPAINT)),
    "unet-refiner": unet_case(lambda folder: save_unet(folder, **REFINER)),
    "unet-lcm": unet_case(save_lcm),
    "ddpm": Case(
        family=FAMILIES[6],
        save=save_ddpm,
        changes={"norm_eps": 1e-4},
        draw=lambda folder, reference, chosen, guidance: drawn_by_ddpm_pipeline(folder, reference, None, SEED),
    ),
    "toy": Case(family=TOY, save=save_toy, changes={"size": 8}, draw=drawn_by_toy_pipeline),
}
