"""The commands that export: all stages, or the first ones."""

from __future__ import annotations

import inspect
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dq_export.core.idle_options import TRAINING_FIELDS, require_used

from .errors import FAILED, end, watching
from .options import NOT_GIVEN, RUN, expanded, option, parameters_of, path_argument, path_option, recipe_options, with_options
from .tables import summarize

if TYPE_CHECKING:
    from dq_export.core.recipe import Recipe


def run_options(
    recipe: Annotated[Path | None, path_option("YAML with these options and rules; flags win", "--recipe", group=RUN)] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option("--exclude", help="linears to leave float; repeatable", metavar="REGEX", rich_help_panel="Quantization"),
    ] = None,
    output_dir: Annotated[
        Path, path_option("new, or an earlier run to continue (default out)", "--output-dir", "-o", group=RUN)
    ] = Path("out"),
    device: Annotated[str, option("where PyTorch samples: cpu or cuda (default cpu)", "--device", group=RUN)] = "cpu",
    max_memory: Annotated[
        float | None, option("GiB; what cannot fit is refused before it starts", "--max-memory", group=RUN)
    ] = None,
    overwrite: Annotated[bool, option("redo in a folder of another run what differs", "--overwrite", group=RUN)] = False,
    as_json: Annotated[bool, option("print report.json instead of the summary", "--json", group=RUN)] = False,
    verbose: Annotated[bool, option("also what each pass and stage did", "--verbose", "-v", group=RUN)] = False,
    quiet: Annotated[bool, option("only errors and the summary", "--quiet", "-q", group=RUN)] = False,
) -> None:
    """The options of every command that exports, besides the recipe's."""


def exporting(until: str, text: str, more: tuple[inspect.Parameter, ...] = ()) -> Callable[..., None]:
    """Make a command with the export's options that stops after a stage.

    Args:
        more: parameters that typer sees and the export does not need.
    """

    def command(context: typer.Context, **options: Any) -> None:
        for item in more:
            options.pop(item.name)
        if context.invoked_subcommand is None:
            _export(until, options)

    return with_options(command, (*recipe_options(), *parameters_of(run_options), *more), text)


def distill(
    out: Annotated[Path, path_argument("the output folder of an export, or of `dq-export calibrate`")],
    device: Annotated[str, option("where PyTorch computes: cpu or cuda (default cpu)", "--device")] = "cpu",
    max_memory: Annotated[float | None, option("GiB; what cannot fit is refused before it starts", "--max-memory")] = None,
    **options: Any,
) -> None:
    """Train OUT's blocks (--rounding distill), and export again what depends on them."""
    settings = {"device": device, "max_memory": max_memory, "overwrite": True, "as_json": False, "quiet": False, "verbose": False}
    until = "bench" if _processes() == 1 else "distill"  # torchrun's processes share nothing after the training
    fixed = {"recipe": out / "recipe.yaml", "output_dir": out, "rounding": "distill", "exclude": ()}
    _export(until, {**options, **settings, **fixed})


with_options(distill, recipe_options(*TRAINING_FIELDS), distill.__doc__ or "")


def _export(until: str, options: dict[str, Any]) -> None:
    from ..pipeline import run
    from ..preparation import Options
    from ..report.report import FRONT
    from ..report.verdict import require

    folder, path = options.pop("output_dir"), options.pop("recipe")
    settings = {key: options.pop(key) for key in ("overwrite", "as_json", "quiet", "verbose", "max_memory", "device")}
    exclude = tuple(options.pop("exclude") or ())
    flags: dict[str, Any] = {key: value for key, value in options.items() if value not in NOT_GIVEN}
    for key in ("bits", "format", "provider", "dtype"):
        if key in flags:
            flags[key] = flags[key].lower()
    if re.fullmatch(r"-?\d+", str(flags.get("bins", ""))):
        flags["bins"] = int(flags["bins"])
    recipe = recipe_of(path, flags)
    require_used(recipe, flags)
    group = _group(until)
    quiet = settings["quiet"] or settings["as_json"] or group.rank > 0
    with watching(quiet=quiet, advice="the same command continues after the last finished stage") as watch:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if settings["device"] == "cuda" else settings["device"]
        more = {"exclude": exclude, "device": device, **{key: settings[key] for key in ("overwrite", "max_memory")}}
        more["command"] = shlex.join(["dq-export", *sys.argv[1:]])
        if path:
            more["front"] = path.parent / FRONT
        report = run(recipe, folder, Options(**more), until=until, progress=watch, group=group)
    if report is not None and settings["as_json"]:
        print(report.model_dump_json(indent=1))
    elif report is not None:
        summarize(report, folder, verbose=settings["verbose"])
    if group.size > 1:
        group.leave()
        end(0)  # gloo's threads sometimes abort a process that ends by itself
    require(report.verdict if report else None)


def recipe_of(path: Path | None, flags: dict[str, Any]) -> Recipe:
    """The recipe of a file and of flags, which win. A flag for another model drops the file's keys about its own model. A flag
    for other prompts, adapters or tables drops the file's keys about those."""
    from dq_export.core.recipe import Recipe, RecipeError

    from ..families.prompts import prompts_of

    base = Recipe.read(path) if path else {}
    if "prompts" in flags:
        flags = {**flags, "prompts": prompts_of(expanded(flags["prompts"]))}
    if "prompts" in flags or "conditions" in flags:
        base = {key: value for key, value in base.items() if key not in ("prompts", "conditions", "conditions_sha256")}
    base = {key: value for key, value in base.items() if key.removesuffix("_sha256") not in flags.keys() & {"lora", "tables"}}
    if flags.get("model", base.get("model")) != base.get("model"):
        base = {key: value for key, value in base.items() if key not in ("revision", "variant")}
    values = {**base, **flags}
    if "model" not in values:
        raise RecipeError("--model is missing: dit-digits, pixart-digits, a hub id or a diffusers folder")
    return Recipe.parse(values, f"recipe {path} with flags" if path else "option")


def _processes() -> int:
    """The number of processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _group(until: str) -> Any:
    """The group of processes that torchrun started; a group of one without it."""
    from dq_export.calibration.group import ALONE, join_group
    from dq_export.core.recipe import RecipeError

    processes = _processes()
    if processes == 1:
        return ALONE
    if until not in ("calibrate", "distill"):
        raise RecipeError(
            f"{processes} processes share only a calibration and a training: run `torchrun … -m dq_export calibrate …`, or "
            "`torchrun … -m dq_export distill OUT`, then dq-export alone"
        )

    def end(number: int, frame: object) -> None:
        print("error: ended because another process of the run did; the same command continues", file=sys.stderr)
        os._exit(FAILED)

    signal.signal(signal.SIGTERM, end)
    return join_group()
