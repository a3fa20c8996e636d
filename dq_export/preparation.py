"""What is checked and resolved before an export works: whatever can be refused is refused here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dq_export.calibration.plugin import UNCHANGED, WeightPlugin
from dq_export.calibration.tables import NO_TABLES, Tables
from dq_export.core.condition_file import misfit
from dq_export.core.documents import shown_path
from dq_export.core.network import BATCH
from dq_export.core.progress import Progress
from dq_export.core.recipe import Recipe, RecipeError
from dq_export.core.rule import Rule
from dq_export.deploy.backend import Backend

from .families.prompts import conditions_of
from .families.reference import ModelError, Reference
from .memory import float32_bytes, plan_memory
from .sizes import plan_shapes, require_sizes
from .stages.appearance import latent_shape, require_appearance
from .stages.layout import layout_timesteps, require_layout
from .stages.stage import Prepared, Stage
from .stages.triton import TRITON, require_encoder_bits, require_served
from .stages.verify import VERIFY


@dataclass(frozen=True, kw_only=True)
class Options:
    """What decides a run in addition to its recipe.

    Args:
        exclude: regular expressions of module names that stay float, before all of the recipe's rules.
        overwrite: accept a folder that holds a run of another recipe.
        max_memory: GiB that each process may take; bench is left out where it alone does not fit. None: no limit.
        device: where PyTorch samples: `cpu`, `cuda` or `cuda:N`. Tables differ by float32 rounding.
        front: the picture of the search that found the recipe, for the report.
        plugin: the user's own weights and Hessians; not together with torchrun.
        command: what the user typed, for the report; empty where Python called.
    """

    exclude: tuple[str, ...] = ()
    overwrite: bool = False
    max_memory: float | None = None
    device: str = "cpu"
    front: Path | None = None
    plugin: WeightPlugin = UNCHANGED
    command: str = ""


DEFAULT = Options()
TRACING = "the network's graph, for its linears and folds"
"""What follows the reading of the weights."""


def prepare(recipe: Recipe, stages: tuple[Stage[Any], ...], options: Options, progress: Progress, place: Path) -> Prepared:
    """Load the checkpoint, resolve the recipe, and check everything that the stages need.

    Args:
        stages: what the run is to do; bench is left out where it alone does not fit into memory.
        progress: its running stage loads the checkpoint.
        place: see `families.source.load`.

    Raises:
        ModelError, RecipeError, BackendError: see each part.
    """
    from dq_export.deploy.backends import backend_of

    from .families.controlnet import controlnet_weights
    from .families.recorded_file import settle_metrics, settle_tables
    from .families.source import load, pin, require_device
    from .families.text_encoders import encoder_bytes, require_prompts

    recipe, source = pin(settle_metrics(settle_tables(recipe)).settled())
    require_encoder_bits(recipe, source.family)
    encoders = encoder_bytes(source.family, source.checkpoint) if recipe.prompts is not None else 0
    names = tuple(stage.name for stage in stages)
    beside = controlnet_weights(source.checkpoint) if source.checkpoint.pipeline in source.family.controlled else None
    controlnet = float32_bytes(beside) if beside else 0
    memory = plan_memory(source.checkpoint.weights, recipe, options.max_memory, names, encoders, controlnet)
    require_device(options.device)
    require_layout(recipe, source)
    backend = backend_of(recipe)
    _require_packages([stage for stage in stages if stage.name in memory.stages], recipe, backend)
    if recipe.prompts is not None:
        require_prompts(source.family, source.checkpoint, recipe.prompts)
    reference = load(source, progress.advance, place)
    progress.begin("load", TRACING)  # at the first question for its linears
    verified = VERIFY.name in memory.stages
    resolved = resolve(recipe, options.exclude, reference, backend)
    assigned = resolved.assign(reference.linears)
    _require_trained(reference)
    if backend:
        backend.require_schemes(rule.scheme for rule in assigned.values())
    _require_blocks(resolved, reference, assigned)
    _require_shapes(resolved, reference)
    require_conditions(resolved, reference)
    undecoded = require_appearance(reference, resolved, options.max_memory) if verified else ""
    _require_decoder(resolved, reference, drawn=verified and not undecoded)
    tables = _tables(resolved, reference, assigned)
    if resolved.triton and TRITON.name in memory.stages:
        require_served(resolved, reference)
    return Prepared(
        recipe=resolved,
        source=source,
        reference=reference,
        backend=backend,
        assigned=assigned,
        tables=tables,
        stages=memory.stages,
        space=memory.space,
        undecoded=undecoded,
        weight_bytes=sum(reference.weight(name).nbytes for name in reference.linears),
    )


def _require_packages(stages: Iterable[Stage[Any]], recipe: Recipe, backend: Backend | None) -> None:
    """Ask for all that the stages import, so that none of them fails for it after hours.

    Raises:
        BackendError: see `require_packages`.
    """
    from dq_export.deploy.packages import require_packages
    from dq_export.deploy.triton.repository import require_triton

    for stage in stages:
        require_packages(stage.modules(recipe), f"the stage {stage.name} of --format {recipe.format}")
    if backend and any(stage.name == "build" for stage in stages):
        backend.require()
    if recipe.triton:
        require_triton()


def _require_decoder(recipe: Recipe, reference: Reference, *, drawn: bool) -> None:
    """Load the VAE that the server or the report will decode with.

    Raises:
        ModelError: it is damaged.
    """
    from .families.decoder import load_vae

    if reference.decoder and (recipe.triton or drawn):
        load_vae(reference.decoder, latent_shape(reference), recipe.variant or "")


def resolve(recipe: Recipe, exclude: tuple[str, ...], reference: Reference, backend: Backend | None) -> Recipe:
    """The recipe with every value filled in that depends on the model or the backend; the network is traced as it says.

    Raises:
        ModelError: the network does not draw pictures of the recipe's size.
        RecipeError: a pattern of `exclude` is not a regular expression, or a guidance that the network does not take.
    """
    require_sizes(recipe, reference)
    if reference.guided_by == "nothing" and (recipe.guidance_scale or 1.0) > 1:
        raise RecipeError(
            f"guidance_scale {recipe.guidance_scale:g}: this network has no input for it, and no call without a condition; "
            "leave it out"
        )
    try:
        front = tuple(Rule(match=pattern, action="float", reason="excluded by --exclude") for pattern in exclude)
    except ValidationError as error:
        reasons = [item["msg"].removeprefix("Value error, ") for item in error.errors()]
        raise RecipeError(f"--exclude: {'; '.join(reasons)}") from error
    timesteps = layout_timesteps(recipe, reference)
    shared = backend.shared_timesteps(timesteps) if backend else timesteps != "per-sample"
    if recipe.triton:
        _require_servable(recipe, backend)
        shared = False
    reference.shared = shared  # the first question for its linears, which rules ask, traces the network in this form
    return recipe.model_copy(
        update={
            "rules": (*front, *_rules(recipe, reference)),
            "granularity": recipe.granularity or recipe.width.granularity,
            "provider": backend.provider if backend else None,
            "dtype": backend.dtype if backend else "fp32",
            "guidance_scale": reference.guidance if recipe.guidance_scale is None else recipe.guidance_scale,
            "timesteps": "shared" if shared else "per-sample",
            **plan_shapes(recipe, reference),
        }
    )


def _rules(recipe: Recipe, reference: Reference) -> tuple[Rule, ...]:
    """The recipe's rules, or the family's with those of its width; who names a granularity gets it everywhere."""
    if recipe.rules is not None or recipe.granularity is not None:
        return reference.rules if recipe.rules is None else recipe.rules
    place = next((index for index, rule in enumerate(reference.rules) if rule.action == "bits"), len(reference.rules))
    first = recipe.width.rules(reference.tower, reference.sites, reference.linears)
    return (*reference.rules[:place], *first, *reference.rules[place:])


def require_conditions(recipe: Recipe, reference: Reference) -> None:
    """Look whether the network takes the file of conditions of a resolved recipe.

    Raises:
        RecipeError: it does not, or it is damaged.
    """
    if recipe.conditions is None:
        return
    path = Path(recipe.conditions)
    guided = reference.guided_by == "null" and (recipe.guidance_scale or 1.0) > 1
    if reason := misfit(conditions_of(path), reference.inputs, guided=guided):
        raise RecipeError(f"conditions {shown_path(path)}: {reason}")


def _tables(recipe: Recipe, reference: Reference, assigned: Mapping[str, Rule]) -> Tables:
    """What the recipe's file of tables decides.

    Raises:
        RecipeError: see `read_tables`.
        ModelError: the scheduler cannot make so many steps.
    """
    from dq_export.calibration.table_reader import read_tables

    timesteps = reference.timesteps(recipe.steps)
    return NO_TABLES if recipe.tables is None else read_tables(Path(recipe.tables), reference, assigned, recipe, timesteps)


def _require_blocks(recipe: Recipe, reference: Reference, assigned: Mapping[str, Rule]) -> None:
    """Look whether there is something to train.

    Raises:
        RecipeError: no block holds a quantized linear.
    """
    quantized = [name for site in reference.sites for name in site.linears if assigned[name].scheme.low_precision]
    if recipe.rounding == "distill" and not any(name.startswith(f"{block}.") for block in reference.blocks for name in quantized):
        raise RecipeError("rounding distill: no block of the network holds a quantized linear to train; take rounding gptq")


def _require_servable(recipe: Recipe, backend: Backend | None) -> None:
    if backend is None or not backend.triton:
        flags = f"--format {recipe.format}" + (f" --provider {recipe.provider}" if recipe.provider else "")
        raise RecipeError(f"--triton: no backend of Triton's serves {flags}; --format ort and --format trt are served")
    if recipe.timesteps == "shared":
        raise RecipeError(
            "--triton needs --timesteps per-sample: requests at different steps share one call of the denoiser; export into "
            "another folder without --timesteps shared"
        )


def _require_trained(reference: Reference) -> None:
    """Look for modulations of zeros, with which adaLN-Zero begins: such gates make a block silent, and nothing can be measured.

    Raises:
        ModelError: a linear that works on one row a sample is zero throughout.
    """
    vectors = [name for name, linear in reference.linears.items() if linear.role == "vector"]
    silent = [name for name in vectors if not reference.weight(name).any() and not reference.bias(name).any()]
    if silent:
        more = f" and {len(silent) - 1} more of {len(vectors)}" if silent[1:] else ""
        raise ModelError(
            f"'{silent[0]}'{more}: weights and bias are zero throughout, as before a training; gates of zeros make a block "
            "silent, so no engine could be compared with it: pass a trained checkpoint"
        )


def _require_shapes(recipe: Recipe, reference: Reference) -> None:
    """Read the shapes before the work, of the inputs that the graph will have: a plan needs them, others may name them.

    Raises:
        BackendError: see `profiles`.
    """
    from dq_export.deploy.tensorrt.profiles import profiles
    from dq_export.passes.sizes import Dims

    shared = recipe.timesteps == "shared"
    inputs: dict[str, Dims] = {
        item.name: tuple(None if size is BATCH else size for size in item.shape) for item in reference.inputs
    }
    if shared:
        inputs["timestep"] = (1,)
    flags = (recipe.min_shapes, recipe.opt_shapes, recipe.max_shapes)
    if recipe.plan or any(flags):
        profiles(inputs, flags)
