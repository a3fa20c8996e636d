"""The stage `triton`: a Triton model repository of the engine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dq_export.core.digest import file_digest
from dq_export.core.network import Axis, output_name
from dq_export.core.recipe import Recipe, RecipeError
from dq_export.deploy.tensorrt.plan import PLAN
from dq_export.deploy.triton.model_config import MAX_ROWS, Served
from dq_export.deploy.triton.readme import PROXY, README, SERVED
from dq_export.deploy.triton.repository import CLIENT, ENDPOINT, FRONT, PROBE, PROGRAM, write_repository
from dq_export.deploy.triton.serving.call import GUIDANCE, Call
from dq_export.deploy.triton.serving.sizes import Side, Sizes

from ..families.family import Family
from ..families.reference import ModelError, Reference
from ..finished_folder import ENGINE, MODEL
from ..ledger import Result
from ..report.report import EncoderReport
from .build import BUILD
from .conditions import ENCODING
from .quantize import QUANTIZE
from .stage import Context, Stage, folder_bytes
from .text_encoder import compare_encoder

REPOSITORY = "triton"
"""Its folder in an output folder."""
FEW_STEPS = 12
"""Tables of so many steps show whether a sampler has any: its order, its noise, its clipping. Larger ones take seconds."""
MAX_STEPS = 100
"""That a request may ask for, unless the export itself sampled more: a table is a number of rows for each number of steps."""


class Repository(Result):
    """What the repository's parts are like.

    Args:
        text_encoder: None where it has none, or in float32.
    """

    text_encoder: EncoderReport | None = None


@dataclass(frozen=True)
class WriteRepository(Stage[Repository]):
    """Writes what Triton needs to serve the engine: models, samplers, decoder, client."""

    name: str = "triton"
    result: type[Repository] = Repository
    fields: tuple[str, ...] = ("steps", "guidance_scale", "variant", "text_encoder_bits", "sizes")
    needs: tuple[Stage[Any], ...] = (QUANTIZE, BUILD)

    def applies(self, context: Context) -> bool:
        """Where the recipe asks for it."""
        return context.recipe.triton

    def modules(self, recipe: Recipe) -> tuple[str, ...]:
        """What encodes prompts."""
        return ENCODING if recipe.prompts is not None else ()

    def text(self, context: Context) -> str:
        """What is written."""
        return "model repository"

    def outputs(self, context: Context) -> tuple[str, ...]:
        """The repository."""
        return (REPOSITORY,)

    def also(self, context: Context) -> dict[str, Any]:
        """The checkpoint, its VAE, what encodes prompts, and the programs that are copied."""
        decoder = context.reference.decoder
        vae = sorted(path for path in decoder.iterdir() if path.is_file()) if decoder else []
        served = [*(SERVED / name for name in (*PROGRAM, PROBE, CLIENT, PROXY, README)), *(FRONT / name for name in ENDPOINT)]
        encoders = context.reference.encoding_files() if context.recipe.prompts is not None else []
        files = [file_digest(path) for path in (*vae, *served)]
        return {"model": context.reference.digest, "files": files, "encoders": encoders}

    def run(self, context: Context, target: Path) -> Repository:
        """Write `triton/`.

        Raises:
            BackendError: it would not load.
            ModelError: no sampler of the checkpoint can be served, or its VAE is damaged.
        """
        from ..families.decoder import Decoding, export_decoder, pixels_of_latent

        assert context.backend is not None  # preparation refuses formats that nothing serves
        recipe, reference, model = context.recipe, context.reference, context.folder / MODEL
        decoder, undecoded = target / "decoder" / MODEL, ""
        serving, latents = reference.serving, served_shape(recipe, reference)
        pixels, pictures = reference.unit or 1, reference.decoder is None and latents[0] in (1, 3)
        if reference.decoder:
            kind = Decoding(serving.packing, recipe.variant or "", resizable=len(recipe.pixels) > 1)
            undecoded = export_decoder(reference.decoder, latents, decoder, kind)
        if decoder.exists() and reference.decoder:
            pixels = serving.packing * pixels_of_latent(reference.decoder)
        encoder = reference.export_encoders(target / "encoder", recipe.text_encoder_bits) if recipe.conditions is None else None
        call = call_of(reference, encoder.tokenizers if encoder else ())
        compared = None
        if encoder and recipe.text_encoder_bits is not None:
            compared = compare_encoder(encoder, call, reference.conditions, context.progress.advance)
        samplers = reference.samplers(max(MAX_STEPS, recipe.steps), context.progress.advance)
        plan = context.folder / ENGINE / PLAN
        served = Served(
            backend=context.backend.triton,
            model=model,
            plan=plan if plan.exists() else None,
            call=call,
            shapes={item.name: item.zeros(1).shape[item.batched :] for item in reference.inputs},
            latents=latents,
            sizes=sizes_of(recipe, reference, 1 if pictures else pixels),
            encoder=encoder.path.parent if encoder else None,
            decoder=decoder if decoder.exists() else None,
            pictures=pictures,
            max_rows=context.backend.greatest_batch(model) or MAX_ROWS,
            classes=len(reference.conditions) if call.labels else 0,
            steps=recipe.steps,
            guidance=recipe.guidance_scale or 1.0,
            scheduler=samplers.default,
            schedules=samplers.schedules,
            prompts=recipe.prompts or (),
        )
        faults = write_repository(served, target / REPOSITORY)
        remarks = [*samplers.refused, *filter(None, [undecoded]), f"{folder_bytes(target / REPOSITORY) / 1e6:.1f} MB"]
        parts = [f"schedulers {', '.join(samplers.schedules.tables)}", *remarks]
        parts += [f"text encoder {compared}"] if compared else []
        return Repository(
            summary="; ".join([*parts, *(f"{item.model}: {item.problem}" for item in faults)]), text_encoder=compared
        )


TRITON = WriteRepository()


def call_of(reference: Reference, tokenizers: tuple[str, ...]) -> Call:
    """How a server calls the network."""
    types, serving = {item.name: item.dtype for item in reference.inputs}, reference.serving
    return Call(
        state=reference.inputs[0].name,
        output=output_name(types),
        timestep=types["timestep"],
        conditions={name: serving.requests[name] for name in types if name in serving.requests},
        tokenizers=tokenizers,
        lowercase=serving.lowercase,
        size_values=serving.size_values,
        zero_null=serving.zero_null,
        template=serving.template,
        batched=serving.batched,
        guided_by=reference.guided_by,
        tokens=serving.tokens,
        picture_positions=dict(serving.picture_positions),
        text_positions=dict(serving.text_positions),
    )


def served_shape(recipe: Recipe, reference: Reference) -> tuple[int, ...]:
    """(C, H, W) of a picture's latents at the default size; of tokens, the channels of one and their rows and columns."""
    if not reference.serving.tokens:
        return reference.feed_shape
    tokens, channels = reference.feed_shape
    height, width = recipe.pixels[0] if recipe.pixels else (round(math.sqrt(tokens)) * reference.unit,) * 2
    return channels, height // reference.unit, width // reference.unit


def sizes_of(recipe: Recipe, reference: Reference, pixels: int) -> Sizes:
    """The sizes that requests may ask for: those between the least and the greatest of the recipe, for which its scales are.

    Args:
        pixels: of a latent, along a side of the picture that the server returns.
    """
    axes = () if reference.serving.tokens else reference.inputs[0].shape[-2:]
    step = math.lcm(*(axis.multiple for axis in axes if isinstance(axis, Axis)))
    sizes = [[pixels * side // reference.unit for side in size] for size in recipe.pixels]
    default = [pixels * side for side in served_shape(recipe, reference)[1:]]
    height, width = (
        Side(name=name, default=side, minimum=min(chosen), maximum=max(chosen), step=pixels * step)
        for name, side, *chosen in zip(("height", "width"), default, *(sizes or [default]), strict=True)
    )
    return Sizes(height=height, width=width, pixels=pixels)


def require_encoder_bits(recipe: Recipe, family: Family) -> None:
    """Ask whether there will be text encoders to quantize.

    Raises:
        RecipeError: no repository is written, or it gets no text encoder.
    """
    if recipe.text_encoder_bits is None:
        return
    option = f"--text-encoder-bits {recipe.text_encoder_bits}"
    if not recipe.triton:
        raise RecipeError(f"{option}: of the text encoders that --triton writes; pass --triton, too, or leave it out")
    if not family.encoders:
        raise RecipeError(f"{option}: this network draws no prompts, so its server has no text encoder; leave it out")
    if recipe.conditions is not None:
        raise RecipeError(f"{option}: with --conditions the server has no text encoder; leave one of the two out")


def require_served(recipe: Recipe, reference: Reference) -> None:
    """Ask for what the server needs before anything is computed.

    Raises:
        ModelError: the network has inputs that the server's requests do not hold, or no sampler of the checkpoint can be served.
        RecipeError: its sampler follows the size and the recipe has several.
    """
    if any(item.role == "residual" for item in reference.inputs):
        raise ModelError(
            "--triton: the server runs no ControlNet, and this network takes the residuals of one. Leave --triton out, or export "
            "the model of a pipeline without a ControlNet"
        )
    state, serving = reference.inputs[0], reference.serving
    supplied = {state.name, "timestep", *serving.requests, *serving.size_values}
    supplied |= {*serving.picture_positions, *serving.text_positions, *([GUIDANCE] if reference.guided_by == "input" else [])}
    others = [item.name for item in reference.inputs if item.name not in supplied]
    if state.zeros(1).shape[1:] != reference.feed_shape:
        others.append(f"the mask and the picture in {state.name}")
    if others or not serving.requests:
        raise ModelError(
            f"--triton: the server's requests do not hold what this network takes: {', '.join(others) or 'its conditions'}. "
            "Leave --triton out"
        )
    if serving.follows_size and len(recipe.pixels) > 1:
        raise RecipeError(
            "--triton: the timesteps of this checkpoint's sampler follow the picture's size, and a server's table holds those of "
            "one; pass one of --sizes"
        )
    reference.samplers(FEW_STEPS)
