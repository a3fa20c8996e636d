"""Finds the files of the hub's models that an export needs, in the local cache or over the network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dq_export.core.documents import DocumentError, printable, read_text, shown, shown_path

from .checkpoint import CONFIG, CONTROLNET, INDEX, NETWORKS, PROMPTS, SCHEDULER, SCHEDULER_CONFIG, VAE
from .reference import ModelError
from .weights import DIFFUSERS, TRANSFORMERS, choose

SMALL = (
    *(INDEX, PROMPTS, CONFIG, SCHEDULER_CONFIG),
    *(f"{SCHEDULER}/{SCHEDULER_CONFIG}", *(f"{part}/{CONFIG}" for part in (*NETWORKS, VAE, CONTROLNET))),
)
"""Small files that describe a model."""
TEXTS = (".json", ".model", ".txt")
"""Suffixes of a tokenizer's files and of an encoder's configuration."""


def fetch(hub_id: str, revision: str, variant: str, approve: Callable[[Path], tuple[str, ...]]) -> Path:
    """Download a model's files, or find them in the cache if there is no network, and return their folder.

    Only the files that an export reads are downloaded. `choose` selects one of several formats of the weights.

    Args:
        revision: branch, tag or commit; empty: the default branch.
        approve: checks the small files before gigabytes are downloaded, and raises if they are wrong. It returns the folders
            that encode prompts.

    Raises:
        ModelError: there is no such model or revision, no access, no weights, or neither network nor cache.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HTTPError

    try:
        with refusals(hub_id, revision):
            names = HfApi().list_repo_files(hub_id, revision=revision or None)
            folder = Path(snapshot_download(hub_id, revision=revision or None, allow_patterns=list(SMALL)))
            files = needed_files(names, variant, hub_id, approve(folder))
            return Path(snapshot_download(hub_id, revision=folder.name, allow_patterns=files))
    except (HTTPError, OSError) as error:
        return _from_cache(hub_id, revision, error)


@contextmanager
def refusals(hub_id: str, revision: str) -> Iterator[None]:
    """Turn the hub's refusals into errors of one line. Errors of the network stay those of huggingface_hub.

    Args:
        revision: branch, tag or commit; empty: the default branch.

    Raises:
        ModelError: there is no such model or revision, or no access.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except HFValidationError as error:
        raise ModelError(f"model {shown(hub_id)}: not a folder, and not a hub id ({printable(str(error))})") from error
    except GatedRepoError as error:
        raise ModelError(
            f"model '{hub_id}': accept its terms on its page of the hub, then log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"model '{hub_id}': the hub has no such model, or it is private; log in with `hf auth login`") from error
    except RevisionNotFoundError as error:
        raise ModelError(f"model '{hub_id}': it has no revision {shown(revision)}; give a branch, a tag or a commit") from error


def needed_files(names: list[str], variant: str, place: str, encoders: tuple[str, ...] = ()) -> list[str]:
    """Select the files of a model that an export reads.

    Args:
        names: all files of the model.
        place: name of the model, for messages.
        encoders: folders that encode prompts.

    Raises:
        ModelError: no weights of the network fit.
    """
    network = next((f"{part}/" for part in NETWORKS if f"{part}/{CONFIG}" in names), "")
    files = [*(name for name in names if name in SMALL), *_weights(names, network, variant, place)]
    if f"{VAE}/{CONFIG}" in names:
        with suppress(ModelError):  # a server refuses what is missing, and a report says that it has no pictures
            files += _weights(names, f"{VAE}/", variant, place, required=False)
    if f"{CONTROLNET}/{CONFIG}" in names:
        files += _weights(names, f"{CONTROLNET}/", variant, place, required=False)
    for part in encoders:
        files += [name for name in _inside(names, f"{part}/") if name.endswith(TEXTS)]
        if f"{part}/{CONFIG}" in names:
            files += _weights(names, f"{part}/", variant, place, required=False, stem=TRANSFORMERS)
    return files


def _inside(names: list[str], part: str) -> list[str]:
    return [name for name in names if name.startswith(part) and "/" not in name.removeprefix(part)]


def _weights(names: list[str], part: str, variant: str, place: str, *, required: bool = True, stem: str = DIFFUSERS) -> list[str]:
    inside = [name.removeprefix(part) for name in _inside(names, part)]
    entry = choose(inside, variant, f"{place}/{part}".rstrip("/"), required=required, stem=stem)
    return [part + name for name in (entry.name, *(entry.shards(inside) if entry.sharded else ()))]


def snapshot(folder: Path, revision: str) -> Path:
    """Return the folder of a revision's files in a model's cache folder (`models--owner--name`).

    Args:
        revision: branch, tag or commit; empty: `main`, or the only snapshot.

    Raises:
        ModelError: there is no snapshot of that revision, or there are several.
    """
    present = sorted(path.name for path in (folder / "snapshots").iterdir() if path.is_dir())
    commit = revision if revision in present else _commit(folder, revision or "main")
    if not commit and not revision and len(present) == 1:
        commit = present[0]
    if commit not in present:
        content = ", ".join(present[:3]) or "nothing"
        fault = f"revision {shown(revision)} is not in it" if revision else "no refs/main, and not exactly one snapshot"
        raise ModelError(f"{shown_path(folder)}: {fault}; there is {content}: choose with --revision")
    return folder / "snapshots" / commit


def _commit(folder: Path, name: str) -> str:
    """Return the commit of a branch or tag in a cache folder; empty if the cache does not have it."""
    path = folder / "refs" / name
    if ".." in Path(name).parts or Path(name).is_absolute():
        return ""
    try:
        return read_text(path, 1024).strip()
    except DocumentError:
        return ""


def _from_cache(hub_id: str, revision: str, reason: Exception) -> Path:
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{hub_id.replace('/', '--')}"
    if (folder / "snapshots").is_dir():
        return snapshot(folder, revision)
    raise ModelError(
        f"model '{hub_id}': neither in the local cache nor reachable on the hub. Either run `hf download {hub_id}` "
        "where there is a network, and copy the cache; or pass a local folder: --model path/to/folder"
    ) from reason
