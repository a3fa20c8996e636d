"""Find and load the model that the user names with --model."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dq_export.core.documents import shown, shown_path
from dq_export.core.progress import Advance, unwatched
from dq_export.core.recipe import Recipe
from dq_export.core.violations import nearest

from . import all_families
from .checkpoint import Checkpoint, architecture_of, network_config, open_checkpoint
from .family import Family
from .hub import fetch, snapshot
from .lora import Adapter, settle_adapters
from .prompts import settle
from .reference import ModelError, Reference
from .torch_network import TorchNetwork

PACKAGED = Path(__file__).parent.parent / "models"
MODELS: dict[str, tuple[str, float]] = {
    "dit": ("facebook/DiT-XL-2-256", 4.0),
    "pixart": ("PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", 4.5),
    "pixart-alpha": ("PixArt-alpha/PixArt-XL-2-1024-MS", 4.5),
    "sd3": ("stabilityai/stable-diffusion-3-medium-diffusers", 7.0),
    "sd3.5-medium": ("stabilityai/stable-diffusion-3.5-medium", 4.5),
    "sd3.5-large": ("stabilityai/stable-diffusion-3.5-large", 3.5),
    "flux-dev": ("black-forest-labs/FLUX.1-dev", 3.5),
    "flux-schnell": ("black-forest-labs/FLUX.1-schnell", 1.0),
    "flux2-klein": ("black-forest-labs/FLUX.2-klein-4B", 1.0),
    "sd1.5": ("stable-diffusion-v1-5/stable-diffusion-v1-5", 7.5),
    "sd2.1": ("stabilityai/stable-diffusion-2-1", 7.5),
    "sdxl": ("stabilityai/stable-diffusion-xl-base-1.0", 5.0),
    "sdxl-turbo": ("stabilityai/sdxl-turbo", 1.0),
    "dit-digits": (str(PACKAGED / "dit-digits"), 2.0),
    "pixart-digits": (str(PACKAGED / "pixart-digits"), 2.0),
}
"""Short names: a folder or hub id, and the guidance scale that suits it."""
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
URL = re.compile(r"https?://[^/]+/(?P<id>[^/?#]+/[^/?#]+)")


@dataclass(frozen=True, kw_only=True)
class Source:
    """The location of a model.

    Args:
        model, revision, variant: values that find it again from any folder; see the recipe's keys.
        guidance: the guidance scale that suits it; 0: its family's.
        family: the family of its network.
        adapters: adapters that are fused into its weights.
    """

    model: str
    revision: str | None
    variant: str | None
    guidance: float
    family: Family
    checkpoint: Checkpoint
    adapters: tuple[Adapter, ...] = ()


def load_reference(
    model: str,
    progress: Advance = unwatched,
    *,
    revision: str = "",
    variant: str = "",
    lora: Sequence[str] = (),
    place: Path | None = None,
) -> Reference:
    """Load a short name, a local folder or a hub id.

    Args:
        progress: called with (tensors read, tensors in all).
        revision: of a hub id: branch, tag or commit; empty: the default branch.
        variant: the weights' variant, `fp16` …; empty: weights without a variant, or the only ones.
        lora: adapters that are fused, FILE[:SCALE].
        place: see `load`.

    Raises:
        ModelError: nothing by that name, no network, or a checkpoint or an adapter that cannot be used.
        RecipeError: the file of an adapter is missing.
    """
    adapters = tuple(Adapter.of(text) for text in lora)
    return load(replace(locate(model, revision, variant), adapters=adapters), progress, place)


def load(source: Source, progress: Advance = unwatched, place: Path | None = None) -> Reference:
    """Load a located model.

    Args:
        place: where weights that are not float32 are written as such, see `load_weights`.

    Raises:
        ModelError: the checkpoint cannot be used.
    """
    return TorchNetwork.load(source.family, source.checkpoint, source.guidance, progress, source.adapters, place)


def pin(recipe: Recipe) -> tuple[Recipe, Source]:
    """The recipe's model, and a recipe that finds the same files and draws the same from any folder at any time.

    Raises:
        ModelError: see `locate`.
        RecipeError: see `settle` and `settle_adapters`.
    """
    encoders = recipe.conditions is None or recipe.layout == "diffusers"
    source = locate(recipe.model, recipe.revision or "", recipe.variant or "", encoders=encoders)
    pinned = recipe.model_copy(update={key: getattr(source, key) for key in ("model", "revision", "variant")})
    settled, adapters = settle_adapters(settle(pinned, source.family, source.checkpoint))
    return settled, replace(source, adapters=adapters)


def locate(model: str, revision: str = "", variant: str = "", *, encoders: bool = False) -> Source:
    """Find a short name, a folder or a hub id, downloaded if need be.

    Args:
        encoders: also download the text encoders.

    Raises:
        ModelError: nothing by that name, no network, a network that no family knows, or one without weights.
    """
    name, _, behind = model.rpartition("@")
    if (name in MODELS or HUB_ID.fullmatch(name)) and not os.path.lexists(model):
        if revision not in ("", behind):
            raise ModelError(f"model {shown(model)}: another revision than --revision {shown(revision)}; give one")
        model, revision = name, behind
    place, guidance = MODELS.get(model, (model, 0.0))
    path = Path(os.path.expanduser(place))
    if os.path.isdir(path):
        folder = _local(path, model, revision)
        recorded = model if model in MODELS else str(folder.resolve())
        return _source(folder, recorded, None, variant, guidance)
    if not HUB_ID.fullmatch(place) or os.path.lexists(path):
        raise ModelError(f"model {shown(model, 200)}: {_no_folder(model, path)}")

    def approve(folder: Path) -> tuple[str, ...]:
        family = family_of(network_config(folder), folder)
        return family.encoders if encoders else ()

    folder = fetch(place, revision, variant, approve)
    return _source(folder, model, folder.name, variant, guidance)


def require_device(device: str) -> None:
    """Check that a device is usable before anything is loaded.

    Raises:
        ModelError: PyTorch does not compute on it.
    """
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ModelError(f"--device '{device}': expected cpu, cuda or cuda:N")
    if reason := missing_device(device):
        raise ModelError(f"--device {device}: {reason}; pass --device cpu, or install a CUDA build of PyTorch")


def missing_device(device: str) -> str:
    """The reason that PyTorch does not compute on `cpu`, `cuda` or `cuda:N`; empty if it does."""
    import torch

    count, index = torch.cuda.device_count(), int(device.partition(":")[2] or 0)
    return f"PyTorch {torch.__version__} sees {count} CUDA devices" if device != "cpu" and count <= index else ""


def _source(folder: Path, model: str, revision: str | None, variant: str, guidance: float) -> Source:
    family = family_of(network_config(folder), folder)  # first: another class's weights may have other names
    checkpoint = open_checkpoint(folder, variant)
    chosen = checkpoint.weights.variant or None
    return Source(model=model, revision=revision, variant=chosen, guidance=guidance, family=family, checkpoint=checkpoint)


def family_of(config: Mapping[str, Any], folder: Path) -> Family:
    """The family of a network, from its configuration.

    Args:
        folder: the network's folder, for messages.

    Raises:
        ModelError: no family knows its architecture.
    """
    architecture = architecture_of(config)
    families = all_families()
    for family in families:
        if architecture in family.architectures:
            return family
    supported = ", ".join(f"{', '.join(family.architectures)} (family {family.name})" for family in families)
    raise ModelError(f"{shown_path(folder)}: architecture {shown(architecture)} is not supported; supported: {supported}")


def _local(folder: Path, model: str, revision: str) -> Path:
    """The folder itself, or the snapshot of a folder of the hub's cache."""
    if (folder / "snapshots").is_dir():
        return snapshot(folder, revision)
    if revision:
        raise ModelError(f"model {shown(model, 200)} is a folder, which has no revision {shown(revision)}; leave it out")
    return folder


def _no_folder(model: str, path: Path) -> str:
    """The reason that a text which is neither a folder nor a hub id is not a model."""
    if url := URL.match(model):
        return f"a URL; pass the hub id: --model {url['id']}"
    if os.path.isfile(path):
        return (
            "a file; pass its diffusers folder, or make one: `DiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)`"
        )
    expected = f"expected {', '.join(MODELS)}, a hub id (owner/name) or a local folder"
    return f"no such model or folder; {expected}.{nearest(model, list(MODELS))}"
