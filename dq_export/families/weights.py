"""Find the files of a folder that hold a network's weights: safetensors or pickles, whole or in shards, by variant."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dq_export.core.documents import DocumentError, read_json, shown, shown_path
from dq_export.core.violations import nearest

from .reference import ModelError

DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model", "(?:pytorch_)?model"
"""Regular expressions for the beginning of the names of weights in the folders of either library."""
SUFFIXES = (".safetensors", ".bin")
"""In order of preference: a pickle is read only if there are no safetensors of the same variant."""
SHARD = r"(\.[\w-]+?)?-\d+-of-\d+\.(safetensors|bin)"
WHOLE = r"(?:\.(?P<variant>[\w-]+))?(?P<suffix>\.safetensors|\.bin)"
INDEX = r"(?P<suffix>\.safetensors|\.bin)(?:\.index\.(?P<variant>[\w-]+)|\.(?P<old>[\w-]+)\.index|\.index)\.json"
"""Name of a weights file after the stem."""
OTHERS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".gguf", ".onnx", ".h5")
"""Suffixes of files that a message about missing weights lists."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A file that represents all weights of a network: one file with all of them, or the index of its shards.

    Args:
        variant: `fp16`, `ema` …; empty for a file without one.
    """

    name: str
    suffix: str
    variant: str
    sharded: bool

    def shards(self, names: Iterable[str]) -> list[str]:
        """Return the names that look like shards of this index."""
        stem = self.name.partition(".")[0]
        start = f"{stem}.{self.variant}-" if self.variant else f"{stem}-"
        fitting = (name for name in names if name.startswith(start) and name.endswith(self.suffix))
        return [name for name in fitting if re.fullmatch(re.escape(stem) + SHARD, name)]


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The files that hold a network's weights, and their variant."""

    files: tuple[Path, ...]
    variant: str


def choose(names: Iterable[str], variant: str, place: str, *, required: bool = True, stem: str = DIFFUSERS) -> Entry:
    """The file that a network is loaded from, of all files in its folder.

    Safetensors go before pickles, an index before a whole file (as in diffusers), files without a variant before others.

    Args:
        variant: the variant to use; empty for none, or for the only one.
        place: the folder, for messages.
        required: whether a missing variant is an error; otherwise it is ignored.
        stem: DIFFUSERS or TRANSFORMERS.

    Raises:
        ModelError: there are no weights, none of the variant, or several variants without a choice.
    """
    names = list(names)
    entries = [entry for name in names if (entry := _entry(name, stem))]
    if not entries:
        others = sorted(name for name in names if name.endswith(OTHERS))
        present = f"; there is {', '.join(others[:3])}" if others else ""
        first, second = (DIFFUSERS, DIFFUSERS) if stem == DIFFUSERS else ("model", "pytorch_model")
        raise ModelError(f"{place}: no weights; expected {first}.safetensors or {second}.bin, whole or with an index{present}")
    variants = sorted({entry.variant for entry in entries})
    choices = ", ".join(item or "one without a variant" for item in variants)
    if variant not in variants and not required:
        variant = ""
    if variant and variant not in variants:
        raise ModelError(f"{place}: no weights of variant {shown(variant)}; there is {choices}.{nearest(variant, variants)}")
    if not variant and "" not in variants and len(variants) > 1:
        raise ModelError(f"{place}: weights of several variants ({choices}); choose one with --variant")
    chosen = variant or ("" if "" in variants else variants[0])
    fitting = [entry for entry in entries if entry.variant == chosen]
    return min(fitting, key=lambda entry: (SUFFIXES.index(entry.suffix), not entry.sharded, entry.name))


def find_weights(folder: Path, variant: str = "", *, required: bool = True, stem: str = DIFFUSERS) -> Weights:
    """The weights in a network's folder. See `choose`.

    Raises:
        ModelError: there are none, or an index is damaged or names files that are missing or outside the folder.
    """
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise ModelError(f"{shown_path(folder)}: cannot be read ({error.strerror})") from error
    entry = choose(names, variant, shown_path(folder), required=required, stem=stem)
    if not entry.sharded:
        return Weights(files=(folder / entry.name,), variant=entry.variant)
    shards = _shards(folder / entry.name)
    absent = [name for name in shards if name not in names]
    if absent:
        raise ModelError(
            f"{shown_path(folder / entry.name)}: names {', '.join(map(shown, absent[:3]))}, {len(absent)} of {len(shards)} files "
            "that are not there; copy or download the folder again"
        )
    return Weights(files=tuple(folder / name for name in shards), variant=entry.variant)


def _entry(name: str, stem: str) -> Entry | None:
    if re.fullmatch(stem + SHARD, name):
        return None
    if match := re.fullmatch(stem + INDEX, name):
        variant = match["variant"] or match["old"] or ""
        return Entry(name=name, suffix=match["suffix"], variant=variant, sharded=True)
    if match := re.fullmatch(stem + WHOLE, name):
        return Entry(name=name, suffix=match["suffix"], variant=match["variant"] or "", sharded=False)
    return None


def _shards(index: Path) -> list[str]:
    """File names of an index, each once. A name with a folder in it could lead out of the checkpoint."""
    try:
        content = read_json(index)
    except DocumentError as error:
        raise ModelError(str(error)) from error
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places:
        raise ModelError(f"{shown_path(index)}: expected a weight_map of tensor names to file names, found {shown(places)}")
    for tensor, name in places.items():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(SUFFIXES):
            raise ModelError(
                f"{shown_path(index)}: tensor {shown(tensor)} lies in {shown(name)}; expected the name of a .safetensors or .bin "
                "file in the same folder"
            )
    return sorted(set(places.values()))
