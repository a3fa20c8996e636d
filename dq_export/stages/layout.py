"""The stage `layout`: the folder of a diffusers pipeline with the engine's graph, for optimum's ORTDiffusionPipeline."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dq_export.core.digest import file_digest
from dq_export.core.recipe import Recipe, RecipeError

from ..families.reference import Reference
from ..finished_folder import MODEL
from ..ledger import Result
from .conditions import ENCODING
from .quantize import QUANTIZE
from .stage import Context, Stage, folder_bytes

if TYPE_CHECKING:
    from ..families.source import Source

FOLDER = "diffusers"
"""Its folder in an output folder."""


@dataclass(frozen=True)
class WriteLayout(Stage[Result]):
    """Writes every part of the pipeline that the checkpoint has, as ONNX files."""

    name: str = "layout"
    result: type[Result] = Result
    fields: tuple[str, ...] = ("variant",)
    needs: tuple[Stage[Any], ...] = (QUANTIZE,)

    def applies(self, context: Context) -> bool:
        """Where the recipe asks for it."""
        return context.recipe.layout == "diffusers"

    def modules(self, recipe: Recipe) -> tuple[str, ...]:
        """What text encoders are made with."""
        return ENCODING if recipe.layout == "diffusers" else ()

    def text(self, context: Context) -> str:
        """What is written."""
        return "a pipeline's folder for optimum"

    def outputs(self, context: Context) -> tuple[str, ...]:
        """The folder."""
        return (FOLDER,)

    def also(self, context: Context) -> dict[str, Any]:
        """The checkpoint, with the files of its text encoders and of its VAE."""
        from ..families.pipeline_folder import present_parts
        from ..families.text_parts import files_of

        family, checkpoint = context.source.family, context.source.checkpoint
        vae = sorted(path for path in checkpoint.vae.iterdir() if path.is_file()) if checkpoint.vae else []
        return {
            "model": context.reference.digest,
            "encoders": files_of(family, checkpoint) if present_parts(family, checkpoint) else [],
            "vae": [file_digest(path) for path in vae],
        }

    def run(self, context: Context, target: Path) -> Result:
        """Write `diffusers/`.

        Raises:
            ModelError: a part of the checkpoint is damaged.
        """
        from ..families.pipeline_folder import write_pipeline

        source, config = context.source, context.reference.config
        missing = write_pipeline(source.family, source.checkpoint, config, context.folder / MODEL, target / FOLDER)
        size = f"{folder_bytes(target / FOLDER) / 1e6:.1f} MB"
        return Result(summary=f"{size}; without {', '.join(missing)}" if missing else size)


LAYOUT = WriteLayout()


def require_layout(recipe: Recipe, source: Source) -> None:
    """Ask for what the folder will be made of, before the network is loaded.

    Raises:
        RecipeError: a format whose graph optimum does not run.
        ModelError: see `require_pipeline`; or a VAE that is damaged.
    """
    from ..families.decoder import load_vae
    from ..families.pipeline_folder import require_pipeline

    if recipe.layout != "diffusers":
        return
    if recipe.format not in ("onnx", "ort"):
        raise RecipeError(
            f"--layout diffusers: optimum runs graphs of --format ort and onnx, and this is --format {recipe.format}"
        )
    require_pipeline(source.family, source.checkpoint)
    if source.checkpoint.vae:
        load_vae(source.checkpoint.vae, None, source.checkpoint.weights.variant)


def layout_timesteps(recipe: Recipe, reference: Reference) -> str:
    """The recipe's timesteps, or those that optimum sends: one number to a UNet, and one for each sample to a transformer.

    Raises:
        RecipeError: the recipe asks for the other ones.
    """
    if recipe.layout != "diffusers":
        return recipe.timesteps
    choice = "shared" if reference.inputs[0].name == "sample" else "per-sample"
    if recipe.timesteps not in ("auto", choice):
        raise RecipeError(f"--layout diffusers: optimum sends {choice} timesteps to this network; leave out --timesteps")
    return choice
