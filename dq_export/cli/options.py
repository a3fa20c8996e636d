"""The options of the commands that export: those of the recipe, made from its fields, and those of the run itself."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from dq_export.core.idle_options import TRAINING_FIELDS
from dq_export.core.plugins import OneOf
from dq_export.core.recipe import Recipe

GROUPS = {
    "Model": ("model", "revision", "variant", "lora", "prompts", "conditions"),
    "Engine": (
        "format", "provider", "dtype", "target", "min_shapes", "opt_shapes", "max_shapes", "timesteps", "triton",
        "text_encoder_bits", "layout",
    ),
    "Quantization": ("bits", "granularity", "group_size", "channel_bits", "attention", "rounding", "bias_correction"),
    "Calibration": (
        "tables", "method", "percentile", "bins", "scaling", "alpha", "rho", "shift", "calibration", "calib_size", "steps",
        "guidance_scale", "sizes", "seed",
    ),
    "Training": TRAINING_FIELDS,
    "Proof": ("parity_size", "min_coverage", "min_sqnr", "metric_weights", "max_lpips"),
}  # fmt: skip
"""The recipe's fields in the order and under the headings of `--help`."""
RUN = "Run"
NAMES = {"model": ("--model", "-m"), "triton": ("--triton",)}
"""Options whose names are not simply their field's."""
METAVARS = {"prompts": "FILE", "conditions": "FILE", "tables": "FILE", "lora": "FILE[:SCALE]", "metric_weights": "FOLDER"}
"""The word of `--help` for a value that is a file. The content of a prompts file becomes the field's value."""
REPEATED = ("lora",)
"""Options that may be repeated."""
NOT_GIVEN: tuple[Any, ...] = ("", None, [])
UNIONS, NONE = (Union, UnionType), type(None)


def option(text: str, *names: str, group: str | None = None) -> Any:
    """A typer option without a default of its own: its text states the default, because a recipe file may set another value."""
    return typer.Option(*names, help=text, show_default=False, rich_help_panel=group)


def expanded(path: str) -> Path:
    """The path with `~` replaced: shells leave it alone after `--option=`."""
    return Path(os.path.expanduser(path))


def path_option(text: str, *names: str, group: str | None = None) -> Any:
    """Like `option`, for a path."""
    return typer.Option(*names, help=text, show_default=False, parser=expanded, metavar="PATH", rich_help_panel=group)


def path_argument(text: str) -> Any:
    """A typer argument that is a path."""
    return typer.Argument(help=text, show_default=False, parser=expanded)


def recipe_options(*fields: str) -> list[inspect.Parameter]:
    """Parameters of a command, one for each of these fields of the recipe; without names, for every field.

    None, or an empty text, means that the option is not set. The recipe checks the values, as it checks those of files.
    """
    group_of = {name: group for group, names in GROUPS.items() for name in names}
    return [_parameter(name, Recipe.model_fields[name], group_of[name]) for name in fields or group_of]


def with_options(command: Callable[..., None], parameters: Iterable[inspect.Parameter], text: str) -> Callable[..., None]:
    """Let typer see a command that takes `**options` as one with these parameters.

    Args:
        text: for `--help`.
    """
    first = [item for item in parameters_of(command) if item.kind is not item.VAR_KEYWORD]
    signature = inspect.Signature([*first, *(item.replace(kind=item.KEYWORD_ONLY) for item in parameters)])
    command.__signature__ = signature  # type: ignore[attr-defined]
    command.__annotations__ = {name: item.annotation for name, item in signature.parameters.items()}
    command.__doc__ = text
    return command


def parameters_of(options: Callable[..., None]) -> list[inspect.Parameter]:
    """The parameters of a function, whose signature lists options of several commands."""
    return list(inspect.signature(options, eval_str=True).parameters.values())


def _parameter(name: str, field: FieldInfo, group: str) -> inspect.Parameter:
    flag = "--" + name.replace("_", "-")
    kind, choices = _kind(field)
    names = NAMES.get(name) or ((f"{flag}/--no-{flag[2:]}",) if kind is bool else (flag,))
    field_option = typer.Option(
        *names,
        help=_text(field, choices),
        show_default=False,
        metavar=METAVARS.get(name),
        rich_help_panel=group,
        autocompletion=(lambda: list(choices)) if choices else None,
    )
    if name in REPEATED:
        kind = list[kind]  # type: ignore[valid-type]
    annotation: Any = Annotated[str, field_option] if kind is str else Annotated[kind | None, field_option]
    default = "" if kind is str else None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _kind(field: FieldInfo) -> tuple[type, tuple[str, ...]]:
    """What the command line reads, and the words that a text can be."""
    annotation: Any = field.annotation
    checks = (getattr(item, "func", None) for item in field.metadata)
    open_ended = next((check for check in checks if isinstance(check, OneOf)), None)
    if open_ended:
        return str, open_ended.words()
    parts = [part for part in (get_args(annotation) if get_origin(annotation) in UNIONS else (annotation,)) if part is not NONE]
    words = [word for part in parts if get_origin(part) is Literal for word in get_args(part)]
    kinds = [part for part in parts if part in (bool, int, float)]
    if words and all(isinstance(word, int) for word in words):
        return int, tuple(map(str, words))
    return (kinds[0] if kinds and not words else str), tuple(words)


def _text(field: FieldInfo, words: tuple[str, ...]) -> str:
    """The field's description and default, and its words unless the description names them all."""
    text, _, absent = (field.description or "").partition("; null: ")
    if set(words) - set(re.split(r"[^\w-]+", text)):
        text += f": {', '.join(words)}"
    plain = field.is_required() or field.default is None or field.default is False or field.default == ""
    default = absent or ("" if plain else str(field.default))
    return f"{text} (default {default})" if default else text
