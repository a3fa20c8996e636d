"""dq-export: diffusion models to quantized engines that provably run on low-precision kernels.

`export` does everything; `calibrate`, `quantize` and `build` stop after that stage. `load` puts the engine of an export into
a diffusers pipeline. Importing this package loads neither torch nor a runtime.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from .families.stand_in import StandIn
    from .report.report import Report

__version__ = "0.1.0"
__all__ = ["__version__", "build", "calibrate", "export", "load", "quantize"]


def export(*, model: str, output_dir: str | Path, **options: Any) -> Report:
    """Export a model and prove what was exported.

    Args:
        model: `dit-digits`, `pixart-digits`, another short name, a hub id or a local diffusers folder.
        output_dir: a new folder, or one that holds an earlier run of the same options, which is then continued.
        options: every key of the recipe (`format`, `bits`, `method`, `scaling`, `steps` …), and `exclude` (a tuple of
            regular expressions), `overwrite`, `max_memory`, `device`, `plugin` as in `dq_export.preparation.Options`, and
            `progress`.

    Returns:
        The report, also written to `output_dir/report.json`.

    Raises:
        ModelError, RecipeError, CalibrationError, GraphError, BackendError, AuditError, ParityError, OutputError.
    """
    return _run("bench", model, output_dir, options)


def calibrate(*, model: str, output_dir: str | Path, **options: Any) -> Report:
    """Like `export`, up to `calibration.safetensors`."""
    return _run("calibrate", model, output_dir, options)


def quantize(*, model: str, output_dir: str | Path, **options: Any) -> Report:
    """Like `export`, up to the Q/DQ graph `model.onnx`."""
    return _run("quantize", model, output_dir, options)


def build(*, model: str, output_dir: str | Path, **options: Any) -> Report:
    """Like `export`, up to the engine, not audited and not compared."""
    return _run("build", model, output_dir, options)


def load(output_dir: str | Path) -> StandIn:
    """The engine of an export, to take the denoiser's place in a diffusers pipeline: `pipe.transformer = load("out")`.

    A UNet is `pipe.unet`. It has the `config`, `dtype` and `device` that pipelines ask for, and is called with the arguments
    of the diffusers model's `forward`. It runs where its runtime does, wherever the pipeline's other parts are.

    Args:
        output_dir: the folder of a finished export; or a text `owner/name` or `owner/name@revision` that is not a folder here: an
            export that `dq-export push` published on the hub.

    Raises:
        OutputError: it is none, or its engine is not built yet.
        RecipeError: its recipe is damaged.
        ModelError: its `float/config.json` is damaged; or the hub has no such export, or cannot be reached.
        BackendError: the engine's runtime is missing, or does not load it on this machine.
    """
    from .engine import load as load_engine

    return load_engine(output_dir)


def _run(until: str, model: str, output_dir: str | Path, options: dict[str, Any]) -> Report:
    import os
    from pathlib import Path

    from dq_export.core.idle_options import require_used
    from dq_export.core.recipe import Recipe

    from .pipeline import run
    from .preparation import Options
    from .report.verdict import require

    progress = options.pop("progress", None)
    more = {key: options.pop(key) for key in ("exclude", "overwrite", "max_memory", "device", "plugin") if key in options}
    recipe = Recipe.parse({"model": model, **options}, "dq_export")
    # A caller may pass all values of a recipe's file: those that are the defaults mean nothing.
    require_used(recipe, [name for name in options if getattr(recipe, name) != Recipe.model_fields[name].default])
    report = run(recipe, Path(os.path.expanduser(output_dir)), Options(**more), until=until, progress=progress)
    assert report is not None  # one process does everything
    require(report.verdict)
    return report
