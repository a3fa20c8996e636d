"""Publishes the folder of a finished export on the hub, and fetches published ones."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dq_export.core.documents import printable, shown, shown_path
from dq_export.core.recipe import Recipe

from .families.config_values import values_of
from .families.float_graph import link
from .families.hub import refusals
from .families.loading import read_config
from .families.reference import ModelError
from .families.source import HUB_ID, MODELS, family_of
from .finished_folder import ENGINE, FLOAT_CONFIG, MODEL, REPLAY, REPORT, FinishedFolder
from .ledger import RECIPE
from .output_folder import OutputError, require_free
from .report.card import Origin, model_card
from .report.report import FRONT
from .stages.triton import REPOSITORY
from .stages.verify import PICTURES

NEEDED = (RECIPE, REPORT, MODEL, FLOAT_CONFIG)
"""Files of every finished export."""
TABLES = ("calibration.safetensors", "distilled.safetensors", "conditions.safetensors")
FILES = (*NEEDED, f"{MODEL}.data", "report.html", FRONT, *TABLES)
FOLDERS = (f"{ENGINE}/", f"{REPLAY}/", f"{REPOSITORY}/")
"""Folders that are published. The float weights and the ledger are not: the base model has the weights."""
LOADED = (*NEEDED, f"{MODEL}.data", f"{ENGINE}/*")
"""Files that `dq_export.load` reads."""
CARD = "README.md"
LOGIN = "log in with `hf auth login`"


class HubError(Exception):
    """The hub does not accept an export's folder; the message gives the reason."""


def push(out: Path, name: str) -> str:
    """Publish a finished export with a model card, as one commit on the default branch.

    A repository that does not exist is created. Files of an earlier export that the new one lacks are deleted; other files
    stay.

    Args:
        name: owner/name on the hub.

    Returns:
        The address of the commit.

        Raises:
        OutputError, RecipeError, ModelError: `out` is not a finished export, or it did not pass; nothing was sent.
        HubError: `name` is not owner/name, there is no token or no network, or the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    folder = _finished(out)
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise HubError(f"{shown(name)} is not an owner/name of the hub ({printable(str(error))})") from error
    if not HUB_ID.fullmatch(name):
        raise HubError(f"{shown(name)}: expected owner/name, the end of a model page's address")
    if not get_token():
        raise HubError(f"there is no token for the hub: {LOGIN}")
    files, card = _files(out), _card(folder, name)
    hub = HfApi()
    with _reasons(name):
        hub.create_repo(name, exist_ok=True)
        stale = [file for file in hub.list_repo_files(name) if _published(file) and file not in files]
        additions = [CommitOperationAdd(file, out / file) for file in files]
        commit: Any = hub.create_commit(
            name,
            [CommitOperationAdd(CARD, card.encode()), *additions, *map(CommitOperationDelete, stale)],
            commit_message="Export by dq-export",
        )
    return str(commit.commit_url)


def fetch(name: str) -> Path:
    """Download the files of a published export that `dq_export.load` reads, and return their folder.

    The hub's cache holds symbolic links, which an output folder must not have. So the folder holds hard links to its files.

    Args:
        name: owner/name, or owner/name@revision.

    Raises:
        ModelError: there is no such repository or revision, no access, no export in it, or neither network nor cache.
    """
    from huggingface_hub import cached_assets_path, snapshot_download
    from huggingface_hub.errors import HTTPError

    hub_id, _, revision = name.partition("@")
    try:
        with refusals(hub_id, revision):
            snapshot = Path(snapshot_download(hub_id, revision=revision or None, allow_patterns=list(LOADED)))
    except ModelError as error:
        raise ModelError(f"{shown(name)}: not a local folder. {error}") from error
    except (HTTPError, OSError) as error:
        raise ModelError(
            f"{shown(name)}: not a local folder, not in the hub's cache, and the hub cannot be reached ({_reason(error)})"
        ) from error
    missing = [file for file in NEEDED if not (snapshot / file).is_file()]
    if missing:
        raise ModelError(f"model '{hub_id}': not a finished export, because it has no {', '.join(missing)}")
    folder = Path(cached_assets_path("dq-export", hub_id, snapshot.name))
    for file in (path for path in snapshot.rglob("*") if path.is_file()):
        _place(file, folder / file.relative_to(snapshot))
    return folder


def is_hub_id(name: str) -> bool:
    """Whether a text can name a repository of the hub, with or without a revision, and is not a local path."""
    return bool(HUB_ID.fullmatch(name.partition("@")[0])) and not os.path.lexists(name)


def _place(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it if the file system cannot. An existing target is kept: it is of the same commit."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        return
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.new")
    try:
        link(source, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _finished(out: Path) -> FinishedFolder:
    """Open a folder whose export passed.

    Raises:
        OutputError: the export is not finished, or did not pass.
    """
    folder = FinishedFolder.open(out, *NEEDED)
    require_free(out)
    verdict = folder.report().verdict
    place = shown_path(out)
    if verdict is None:
        raise OutputError(f"{place}: the export is not finished; run `dq-export --recipe {place}/{RECIPE} -o {place}`")
    if verdict.outcome == "unfinished":
        raise OutputError(f"{place}: its engine is not built yet; run `dq-export finish {place}` where its GPU is")
    if verdict.outcome == "failed":
        reason = printable(verdict.reasons[0]) if verdict.reasons else "see its report"
        raise OutputError(f"{place}: the export did not pass ({reason}); `dq-export explain {place}` shows where it differs")
    return folder


def _files(out: Path) -> list[str]:
    """Return the relative paths of the folder's published files."""
    names = (str(path.relative_to(out)) for path in sorted(out.rglob("*")) if path.is_file())
    return [name for name in names if _published(name)]


def _published(name: str) -> bool:
    return name in FILES or name.startswith(FOLDERS)


def _card(folder: FinishedFolder, name: str) -> str:
    origin = _origin(folder.recipe(), folder.path)
    return model_card(folder.report(), origin, name, pictures=(folder.path / PICTURES).is_file())


def _origin(recipe: Recipe, out: Path) -> Origin:
    """Describe the checkpoint's origin. Only a checkpoint from the hub has a revision."""
    place, _ = MODELS.get(recipe.model, (recipe.model, 0.0))
    config = read_config(out / FLOAT_CONFIG)
    family = family_of(config, out / "float")
    from_hub = bool(recipe.revision and HUB_ID.fullmatch(place))
    return Origin(
        name=Path(place).name,
        hub_id=place if from_hub else "",
        revision=recipe.revision or "",
        part=family.part,
        task=family.task(values_of(family.values, config, out / FLOAT_CONFIG)),
        adapters=tuple(Path(text.rpartition(":")[0] or text).name for text in recipe.lora or ()),
    )


@contextmanager
def _reasons(name: str) -> Iterator[None]:
    """Turn errors of the hub into errors of one line."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    owner = name.partition("/")[0]
    try:
        yield
    except HfHubHTTPError as error:
        remedies = {401: f"it does not know the token; {LOGIN}", 403: f"the token may not write for {shown(owner)}"}
        reason = remedies.get(error.response.status_code) or _reason(error)
        raise HubError(f"the hub refuses '{name}': {reason}") from error
    except (HTTPError, OSError) as error:
        raise HubError(f"the hub cannot be reached, nothing was published ({_reason(error)})") from error
    except ValueError as error:  # the library raises it for an answer that it cannot read, and for a card that the hub refuses
        raise HubError(f"the hub refuses '{name}': {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Return the first line of a library's message."""
    return printable(next(iter(str(error).splitlines()), "") or type(error).__name__)
