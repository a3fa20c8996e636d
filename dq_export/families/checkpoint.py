"""A network's folder and its pipeline, and the operations on both that all families share."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dq_export.core.documents import shown, shown_path
from dq_export.core.progress import Advance, unwatched

from .loading import read_config
from .reference import ModelError
from .weights import Weights, find_weights

NETWORKS = ("transformer", "unet")
"""Folders of a pipeline that may hold its network."""
SCHEDULER, VAE, CONTROLNET = "scheduler", "vae", "controlnet"
"""Folders of a pipeline's other parts."""
INDEX, CONFIG, SCHEDULER_CONFIG = "model_index.json", "config.json", "scheduler_config.json"
PROMPTS = "prompts.txt"
"""A file beside the index with the prompts that the model was trained to draw."""
RENAMED = {
    ("Transformer2DModel", "ada_norm_zero"): "DiTTransformer2DModel",
    ("Transformer2DModel", "ada_norm_single"): "PixArtTransformer2DModel",
}
"""Today's class of an old configuration, by its `_class_name` and `norm_type`. Source: diffusers' `LegacyModelMixin`, which
follows the same table when it loads."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A network's folder and its pipeline.

    Args:
        folder: the folder of the network's config.json and weights.
        home: the folder of the pipeline; the network's own if there is no pipeline.
        config: the content of config.json.
        index: the content of the pipeline's model_index.json; empty if there is none.
        scheduler: the folder of the pipeline's scheduler; None if it has none.
        vae: the folder of the pipeline's VAE, which is not checked here; None if there is none.
    """

    folder: Path
    home: Path
    config: Mapping[str, Any]
    index: Mapping[str, Any]
    weights: Weights
    scheduler: Path | None
    vae: Path | None

    @property
    def pipeline(self) -> str:
        """The pipeline's diffusers class; empty if the index names none."""
        name = self.index.get("_class_name")
        return name if isinstance(name, str) else ""


def architecture_of(config: Mapping[str, Any]) -> str | None:
    """The diffusers class of a configuration, with old names replaced as diffusers does; None if it names none."""
    name, norm = config.get("_class_name"), config.get("norm_type")
    if not isinstance(name, str):
        return None
    return RENAMED.get((name, norm), name) if isinstance(norm, str) else name


def network_config(folder: Path) -> dict[str, Any]:
    """The configuration of the network of a pipeline folder, or of a folder of only the network.

    Raises:
        ModelError: there is none; the message says what the folder is instead.
    """
    network = _network_folder(folder)
    if not os.path.lexists(network / CONFIG):
        raise ModelError(f"{shown_path(folder)}: {_instead(folder)}")
    return read_config(network / CONFIG)


def open_checkpoint(folder: Path, variant: str = "") -> Checkpoint:
    """Find the parts of a pipeline folder, or of a network's folder, which may be inside a pipeline.

    Raises:
        ModelError: the configuration, the weights, or the file of a scheduler's folder are missing.
    """
    network = _network_folder(folder)
    config = network_config(folder)
    pipeline = folder if network != folder else _pipeline_around(folder)
    index = read_config(pipeline / INDEX) if os.path.lexists(pipeline / INDEX) else {}
    return Checkpoint(
        folder=network,
        home=pipeline,
        config=config,
        index=index,
        weights=find_weights(network, variant),
        scheduler=_scheduler_folder(pipeline, index),
        vae=pipeline / VAE if os.path.lexists(pipeline / VAE) or _names(index, VAE) else None,
    )


def _network_folder(folder: Path) -> Path:
    return next((folder / part for part in NETWORKS if (folder / part).is_dir()), folder)


def _pipeline_around(network: Path) -> Path:
    """Return the pipeline's folder around a network's folder, which may be `.` or a link; the network's folder without one."""
    for place in (Path(os.path.abspath(network)), network.resolve()):
        if place.name in NETWORKS:
            return place.parent
    return network


def _scheduler_folder(pipeline: Path, index: Mapping[str, Any]) -> Path | None:
    """Return the scheduler's folder; None if there is none and the pipeline's index names none. As in diffusers, a file beside
    the index replaces a folder.

    The default scheduler draws other pictures, so a lost file must not lead to it.
    """
    folder = pipeline / SCHEDULER
    if (folder / SCHEDULER_CONFIG).is_file():
        return folder
    if os.path.lexists(folder):
        raise ModelError(
            f"{shown_path(folder)}: no {SCHEDULER_CONFIG} in it; copy or download it again, or remove {shown_path(folder)}"
        )
    if (pipeline / SCHEDULER_CONFIG).is_file():
        return pipeline
    if _names(index, SCHEDULER):
        place = f"{SCHEDULER}/{SCHEDULER_CONFIG}"
        raise ModelError(
            f"{shown_path(pipeline / INDEX)}: names a {SCHEDULER}, and there is no {place}; copy or download it again"
        )
    return None


def _names(index: Mapping[str, Any], part: str) -> bool:
    """Whether a pipeline's index names a class for a part; a part that is left out has `[null, null]`."""
    entry = index.get(part)
    return isinstance(entry, list) and any(isinstance(word, str) for word in entry)


def _instead(folder: Path) -> str:
    """A description of a folder without a network's configuration."""
    if (folder / SCHEDULER_CONFIG).is_file():
        return "a scheduler's folder; pass that of the pipeline"
    network = _network_folder(folder)
    if network != folder or not (folder / INDEX).is_file():
        part = NETWORKS[0] if network == folder else network.name
        return f"no {part}/{CONFIG} and no {CONFIG}; is it a diffusers folder?"
    index = read_config(folder / INDEX)
    if named := [part for part in NETWORKS if _names(index, part)]:
        return f"{INDEX} names a {named[0]}, and there is no {named[0]}/{CONFIG}; copy or download the folder again"
    parts = [f"{name}: {index[name][-1]}" for name in index if _names(index, name)]
    return f"a {shown(index.get('_class_name'))} of {shown(', '.join(parts), 200)}, without a {' or a '.join(NETWORKS)}"


def configuration(model: Any) -> Any:
    """The configuration of a diffusers model with its class, as a config.json has it; keys are attributes, too."""
    from diffusers.configuration_utils import FrozenDict

    return FrozenDict({"_class_name": type(model).__name__, **_accepted(model)})


def digest(models: Sequence[Any], scheduler: Any, progress: Advance = unwatched) -> str:
    """sha256 of the configurations and weights of diffusers models and of their scheduler's configuration, hexadecimal.

    It does not depend on the folder's place. Tensors are hashed in parallel, which releases the interpreter's lock.

    Args:
        progress: called with (tensors hashed, all tensors).
    """
    settings = [*map(_accepted, models), type(scheduler).__name__, _accepted(scheduler)]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    names, values = zip(*(item for model in models for item in model.state_dict().items()), strict=True)
    with ThreadPoolExecutor() as pool:
        for done, (name, content) in enumerate(zip(names, pool.map(_content_hash, values), strict=True), start=1):
            digest.update(name.encode())
            digest.update(content)
            progress(done, len(names))
    return digest.hexdigest()


def broken_weights(model: Any) -> list[str]:
    """Names of the weights with NaN or Inf."""
    import torch

    # A sum is one quick pass. Only if it is not finite (it may also have overflowed) is every element checked.
    suspect = {name: value for name, value in model.state_dict().items() if not torch.isfinite(value.sum())}
    return [name for name, value in suspect.items() if not torch.isfinite(value).all()]


def _accepted(part: Any) -> dict[str, Any]:
    """Return the values of a configuration that the diffusers class takes. Old files have more values."""
    names = inspect.signature(type(part).__init__).parameters
    return {key: value for key, value in part.config.items() if key in names}


def _content_hash(value: Any) -> bytes:
    return hashlib.sha256(memoryview(value.contiguous().numpy()).cast("B")).digest()
