"""Low-rank adapters: W + scale * alpha / rank * B A, fused into a loaded network's weights."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dq_export.core.documents import DocumentError, parse_json, read_json, shown, shown_path
from dq_export.core.patterns import PatternError, search
from dq_export.core.recipe import Recipe, RecipeError
from dq_export.core.tensor_file import open_tensors
from dq_export.core.violations import nearest

from .recorded_file import place_of, require_recorded
from .reference import ModelError
from .tensors import read_tensors

PREFIX = re.compile(r"(base_model\.model\.)?((transformer|unet)\.)?")
"""Prefixes of a module's name: peft's, and that of diffusers' pipelines."""
PART = re.compile(r"(?P<module>.+?)\.((?P<A>lora_A|lora\.down|lora_down)|(?P<B>lora_B|lora\.up|lora_up))(\.default)?\.weight")
ALPHA = re.compile(r"(?P<module>.+?)(\.lora)?\.alpha")
METADATA = "lora_adapter_metadata"
"""Key of diffusers' settings in a safetensors file, whose own keys begin with `transformer.`."""
CONFIG = "adapter_config.json"
"""The file of peft's settings, beside the weights."""
NETWORK = "transformer."
UNFIT = ("use_dora", "lora_bias", "fan_in_fan_out", "use_qalora", "bias")
"""Settings of adapters that add more than B A, or have another layout: all must be false, or `none`."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A file of low-rank weights, and their scale."""

    path: Path
    scale: float

    @staticmethod
    def of(text: str) -> Adapter:
        """From FILE[:SCALE].

        Raises:
            RecipeError: the file does not exist, or the scale is not finite.
        """
        front, colon, behind = text.rpartition(":")
        try:
            scale = float(behind)
        except ValueError:
            colon, scale = "", 1.0
        if colon and not math.isfinite(scale):
            raise RecipeError(f"lora {shown(text, 200)}: its scale is not a finite number")
        return Adapter(path=place_of("lora", front if colon else text), scale=scale if colon else 1.0)

    def __str__(self) -> str:
        return f"{self.path}:{self.scale!r}"


def settle_adapters(recipe: Recipe) -> tuple[Recipe, tuple[Adapter, ...]]:
    """The recipe with the paths and digests of its adapters, and the adapters.

    Raises:
        RecipeError: a file is missing or has changed since it was recorded, or the numbers of files and digests differ.
    """
    if recipe.lora is None:
        if recipe.lora_sha256 is not None:
            raise RecipeError("lora_sha256: it is of files, and lora names none; add lora, or leave it out")
        return recipe, ()
    adapters = tuple(Adapter.of(text) for text in recipe.lora)
    recorded: Sequence[str | None] = recipe.lora_sha256 or [None] * len(adapters)
    if len(recorded) != len(adapters):
        raise RecipeError(f"lora_sha256: {len(recorded)} digests for {len(adapters)} files of lora; expected one for each")
    digests = [require_recorded("lora", item.path, digest) for item, digest in zip(adapters, recorded, strict=True)]
    values = {"lora": tuple(map(str, adapters)), "lora_sha256": tuple(digests)}
    return recipe.model_copy(update=values), adapters


def fuse(model: Any, adapters: Sequence[Adapter]) -> frozenset[str]:
    """Add adapters to a network's weights, one after the other, in float32.

    Returns:
        The names of the parameters that changed.

    Raises:
        ModelError: a file is damaged, or has tensors that do not fit the network; the message names it.
    """
    import torch

    changed: set[str] = set()
    for adapter in adapters:
        place = f"lora {shown_path(adapter.path)}"
        for module, pair in _pairs(adapter, place).items():
            name = f"{module}.weight"
            parameter = _parameter(model, name, place)
            with torch.no_grad():
                parameter.data = pair.added_to(parameter.data, adapter.scale, f"{place}: {shown(module)}")
            if not torch.isfinite(parameter.data.sum()):
                raise ModelError(f"{place}: makes NaN or Inf of {shown(name)}; the file is damaged, or its scale too large")
            changed.add(name)
    return frozenset(changed)


@dataclass
class _Pair:
    """The two matrices of a module, and the strength alpha / rank or alpha / sqrt(rank)."""

    parts: dict[str, Any] = field(default_factory=dict)
    alpha: float | None = None
    rooted: bool = False

    def added_to(self, weight: Any, scale: float, place: str) -> Any:
        """The weight with B A added, float32 of the same shape."""
        if set(self.parts) != {"A", "B"}:
            raise ModelError(f"{place} has only one of its two matrices; copy or download the file again")
        down, up = self.parts["A"].float(), self.parts["B"].float()
        rank = down.shape[0] if down.ndim else 0
        fits = up.ndim >= 2 and up.shape[:2] == (weight.shape[0], rank) and up[0, 0].numel() == 1
        if not fits or down.shape[1:] != weight.shape[1:]:
            raise ModelError(
                f"{place} has matrices of shapes {list(up.shape)} and {list(down.shape)}; the network's weight is "
                f"{list(weight.shape)}: it was trained for another network"
            )
        strength = 1.0 if self.alpha is None else self.alpha / (math.sqrt(rank) if self.rooted else rank)
        return weight + (scale * strength) * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)


def _pairs(adapter: Adapter, place: str) -> dict[str, _Pair]:
    """By module, the matrices of a file.

    Raises:
        ModelError: the file is damaged, or a tensor does not belong to a low-rank adapter of the network.
    """
    pairs: dict[str, _Pair] = {}
    for name, tensor in read_tensors(adapter.path).items():
        plain = name[PREFIX.match(name).end() :]  # type: ignore[union-attr]
        part, alpha = PART.fullmatch(plain), ALPHA.fullmatch(plain)
        if not tensor.is_floating_point() or not (part or (alpha and tensor.numel() == 1)):
            raise ModelError(
                f"{place}: tensor {shown(name, 120)} is not part of a low-rank adapter of the network; expected "
                "'transformer.<module>.lora_A.weight' and 'lora_B.weight' in floating point, as diffusers and peft write them"
            )
        pair = pairs.setdefault((part or alpha)["module"], _Pair())  # type: ignore[index]
        if part:
            pair.parts["A" if part["A"] else "B"] = tensor
        else:
            pair.alpha = float(tensor)
    if not pairs:
        raise ModelError(f"{place}: holds no tensors")
    _set_alphas(pairs, _settings(adapter, place), place)
    return pairs


def _set_alphas(pairs: Mapping[str, _Pair], settings: Mapping[str, Any], place: str) -> None:
    """The strengths of peft's settings; those of the file's own tensors stay."""
    for key in UNFIT:
        if settings.get(key) not in (None, False, "none"):
            raise ModelError(f"{place}: trained with {key} {shown(settings[key])}, which fusing does not have")
    patterns = settings.get("alpha_pattern") or {}
    for module, pair in pairs.items():
        pair.rooted = settings.get("use_rslora") is True
        if pair.alpha is None:
            try:
                close = [value for key, value in patterns.items() if search(rf"(^|\.)(?:{key})$", module)]
            except (AttributeError, PatternError) as error:
                raise ModelError(f"{place}: its alpha_pattern is not a mapping of patterns to numbers") from error
            pair.alpha = _number([*close, settings.get("lora_alpha")][0], place)


def _number(value: Any, place: str) -> float | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value)):
        raise ModelError(f"{place}: lora_alpha {shown(value)} is not a finite number")
    return value


def _settings(adapter: Adapter, place: str) -> dict[str, Any]:
    """The adapter's settings: diffusers' in the file, or peft's beside it; empty if there are none, so that alpha is the rank.

    Raises:
        ModelError: they are damaged, or peft's are missing.
    """
    try:
        text = open_tensors(adapter.path).metadata.get(METADATA) if adapter.path.suffix == ".safetensors" else None
        if text is not None:
            values = parse_json(text, f"{METADATA} of {place}")
            values = {k.removeprefix(NETWORK): v for k, v in values.items()} if isinstance(values, dict) else values
        elif adapter.path.name.startswith("adapter_model."):
            values = read_json(adapter.path.with_name(CONFIG))
        else:
            values = {}
    except DocumentError as error:
        raise ModelError(f"{place}: its settings, which hold alpha, cannot be read ({error})") from error
    if not isinstance(values, dict):
        raise ModelError(f"{place}: its settings are not a JSON object")
    return values


def _parameter(model: Any, name: str, place: str) -> Any:
    try:
        return model.get_parameter(name)
    except AttributeError as error:
        names = [item.removesuffix(".weight") for item, _ in model.named_parameters() if item.endswith(".weight")]
        module = name.removesuffix(".weight")
        raise ModelError(f"{place}: {shown(module, 120)} is not a module of the network.{nearest(module, names)}") from error
