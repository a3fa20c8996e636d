"""A finished export's folder on the hub: published from here, and fetched to be loaded."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dq_export.core.documents import printable, shown, shown_path
from dq_export.core.recipe import Recipe

from .families.float_graph import link
from .families.hub import refusals
from .families.loading import read_config
from .families.reference import ModelError
from .families.source import HUB_ID, NAMED, family_of
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
"""What is published. The float weights are the base model's, and the ledger is of use where they are."""
LOADED = (*NEEDED, f"{MODEL}.data", f"{ENGINE}/*")
"""What `dq_export.load` reads."""
CARD = "README.md"
LOGIN = "log in with `hf auth login`"


class HubError(Exception):
    """The hub does not take an export's folder; the message says why."""


def push(out: Path, name: str) -> str:
    """Publish a finished export with a model card, as one commit on the default branch.

    A repository that does not exist is made. Of one that holds an earlier export, what the new one has not is deleted;
    files that no export has stay.

    Args:
        name: owner/name on the hub.

    Returns:
        The address of the commit.

    Raises:
        OutputError, RecipeError, ModelError: `out` is no finished export, or not one that passed; nothing was sent.
        HubError: no owner/name, no token, no network, or the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    folder = _finished(out)
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise HubError(f"{shown(name)} is no owner/name of the hub ({printable(str(error))})") from error
    if not HUB_ID.fullmatch(name):
        raise HubError(f"{shown(name)}: expected owner/name, as the address of a page of the hub ends")
    if not get_token():
        raise HubError(f"no token of the hub: {LOGIN}")
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
    """The files of a published export that `dq_export.load` reads, as a folder of its own.

    The hub's cache holds links, which an output folder may not have: so the folder holds hard links to the cache's files.

    Args:
        name: owner/name, or owner/name@revision.

    Raises:
        ModelError: no such repository or revision, no access, no export in it, or neither network nor cache.
    """
    from huggingface_hub import cached_assets_path, snapshot_download
    from huggingface_hub.errors import HTTPError

    hub_id, _, revision = name.partition("@")
    try:
        with refusals(hub_id, revision):
            snapshot = Path(snapshot_download(hub_id, revision=revision or None, allow_patterns=list(LOADED)))
    except ModelError as error:
        raise ModelError(f"{shown(name)}: no such folder here. {error}") from error
    except (HTTPError, OSError) as error:
        raise ModelError(
            f"{shown(name)}: no such folder here, not in the hub's cache, and the hub cannot be reached ({_reason(error)})"
        ) from error
    missing = [file for file in NEEDED if not (snapshot / file).is_file()]
    if missing:
        raise ModelError(f"model '{hub_id}': no finished export, for it has no {', '.join(missing)}")
    folder = Path(cached_assets_path("dq-export", hub_id, snapshot.name))
    for file in (path for path in snapshot.rglob("*") if path.is_file()):
        _place(file, folder / file.relative_to(snapshot))
    return folder


def is_hub_id(name: str) -> bool:
    """Whether a text names a repository of the hub, with or without a revision, and nothing on this machine."""
    return bool(HUB_ID.fullmatch(name.partition("@")[0])) and not os.path.lexists(name)


def _place(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it where the file system cannot. A target that is there is of the same commit, so the same."""
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
    """The folder, if its export passed.

    Raises:
        OutputError: it did not.
    """
    folder = FinishedFolder.open(out, *NEEDED)
    require_free(out)
    verdict = folder.report().verdict
    place = shown_path(out)
    if verdict is None:
        raise OutputError(f"{place}: the export is not finished; go on with `dq-export --recipe {place}/{RECIPE} -o {place}`")
    if verdict.outcome == "unfinished":
        raise OutputError(f"{place}: its engine is not built yet; run `dq-export finish {place}` where its GPU is")
    if verdict.outcome == "failed":
        reason = printable(verdict.reasons[0]) if verdict.reasons else "see its report"
        raise OutputError(f"{place}: the export did not pass ({reason}); `dq-export explain {place}` says where it is far off")
    return folder


def _files(out: Path) -> list[str]:
    """The published files of a folder, by path in it."""
    listed = (str(path.relative_to(out)) for path in sorted(out.rglob("*")) if path.is_file())
    return [name for name in listed if _published(name)]


def _published(name: str) -> bool:
    return name in FILES or name.startswith(FOLDERS)


def _card(folder: FinishedFolder, name: str) -> str:
    origin = _origin(folder.recipe(), folder.path)
    return model_card(folder.report(), origin, name, pictures=(folder.path / PICTURES).is_file())


def _origin(recipe: Recipe, out: Path) -> Origin:
    """Where the checkpoint is from. Only what came from the hub has a revision."""
    place, _ = NAMED.get(recipe.model, (recipe.model, 0.0))
    family = family_of(read_config(out / FLOAT_CONFIG), out / "float")
    from_hub = bool(recipe.revision and HUB_ID.fullmatch(place))
    return Origin(
        name=Path(place).name,
        hub_id=place if from_hub else "",
        revision=recipe.revision or "",
        part=family.part,
        prompted=bool(family.encoders),
        adapters=tuple(Path(text.rpartition(":")[0] or text).name for text in recipe.lora or ()),
    )


@contextmanager
def _reasons(name: str) -> Iterator[None]:
    """While active, what the hub refuses is one line."""
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
    except ValueError as error:  # of the library, on an answer that it does not understand, and on a card that the hub refuses
        raise HubError(f"the hub refuses '{name}': {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The first line of a library's message."""
    return printable(next(iter(str(error).splitlines()), "") or type(error).__name__)
