"""An output folder's files: no link in it is followed, so nothing outside it is written; and one process writes at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from dq_export.core.documents import printable, shown_path

LOCK, PARTIAL, GATHERED, TRAINING = ".lock", ".partial", ".calibration", ".training"
FOLDERS = frozenset({"float", "engine", "parity", "triton", "diffusers", "bisect", "choices", "statistics"})
FOLDERS |= {PARTIAL, GATHERED, TRAINING}
FILES = frozenset({"recipe.yaml", "stages.json", "report.json", "report.html", "search.svg", "calibration.safetensors"})
FILES |= {"conditions.safetensors", "distilled.safetensors"}
FILES |= {"model.onnx", "model.onnx.data", "winner.yaml", "search.json", "evaluations.jsonl", LOCK}
"""What must be a folder, and what a file, at the top of the output folder of an export or a search."""
WRITTEN_IN_PLACE = (
    LOCK,
    GATHERED,
    TRAINING,
    "statistics",
    "choices",
    "evaluations.jsonl",
    "held-back-evaluations.jsonl",
    "timing.cache",
)
"""What is not replaced by renaming: a hard link there would lead a write out of the folder."""
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
ENTRIES = 20_000
"""Files and folders that an output folder may hold; an export makes about 40."""


class OutputError(Exception):
    """The output folder cannot be used; the message says why. Nothing in it was changed."""


def require_plain(folder: Path) -> None:
    """Refuse an output folder that an archive or another user prepared to lead reads or writes out of it.

    The folder itself may be a link: the user typed its name.

    Raises:
        OutputError: anywhere inside is a link, a pipe, a socket or a device; a file stands where a folder belongs, or the
            reverse; a file that is written in place has a second name; or the folder cannot be read.
    """
    entries = 0
    try:
        for path, status in _walk(folder):
            entries += 1
            if entries > ENTRIES:
                raise OutputError(f"{shown_path(folder)} holds more than {ENTRIES} files, so it is not an output folder")
            wrong = _fault(path.relative_to(folder), status)
            if wrong:
                raise OutputError(f"{shown_path(path)}: {wrong}. Remove it, or pass another folder")
    except OSError as error:
        raise OutputError(f"{shown_path(Path(error.filename or folder))}: cannot be read ({error.strerror})") from error


def _walk(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Everything inside, without following links. What another process removes meanwhile is passed over."""
    queue = [folder]
    while queue:
        with os.scandir(queue.pop()) as entries:
            batch = list(islice(entries, ENTRIES + 1))
        for entry in batch:
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            yield Path(entry.path), status
            if stat.S_ISDIR(status.st_mode):
                queue.append(Path(entry.path))


def _fault(name: Path, status: os.stat_result) -> str:
    """Why an entry of an output folder is refused; empty if it is not."""
    mode = status.st_mode
    if stat.S_ISLNK(mode):
        return "a link; links inside an output folder are not followed"
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        return "neither a file nor a folder, but a pipe, a socket or a device"
    if str(name) in FOLDERS and not stat.S_ISDIR(mode):
        return "a file where an export has a folder"
    if str(name) in FILES and stat.S_ISDIR(mode):
        return "a folder where an export has a file"
    if name.parts[0] in WRITTEN_IN_PLACE and stat.S_ISREG(mode) and status.st_nlink > 1:
        return "a hard link: writing to it would change the other file, too"
    return ""


def make(folder: Path) -> None:
    """Make an output folder where there is none.

    Raises:
        OutputError: a file stands there, or the system does not let us.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in NO_SPACE:
            raise
        if isinstance(error, FileExistsError):
            raise OutputError(f"{shown_path(folder)} is a file; pass a folder with -o") from error
        raise OutputError(f"{shown_path(folder)}: cannot be made ({error.strerror}); pass another folder with -o") from error


def standing(folder: Path) -> Path:
    """The folder, or the nearest around it that there is: the disk that it will lie on."""
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.isdir(place))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """While active, no other run writes to the folder.

    Raises:
        OutputError: it cannot be written, or another run writes to it.
    """
    try:
        # Not truncated, no link followed, and no waiting for the other end of a pipe.
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in NO_SPACE:
            raise
        raise OutputError(f"{shown_path(folder)}: cannot be written ({error.strerror}); pass another folder with -o") from error
    with os.fdopen(descriptor, "rb") as lock:  # closing it unlocks
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(
                f"{shown_path(folder)} is being written by another dq-export; wait for it, or pass another folder"
            ) from error
        except OSError as error:
            raise OutputError(f"{shown_path(folder)}: its file system has no locks ({error.strerror})") from error
        yield


def require_free(folder: Path) -> None:
    """Notice another run early: like `locked`, but nothing is made or held.

    Raises:
        OutputError: another run writes to the folder.
    """
    if (folder / LOCK).is_file() and os.access(folder / LOCK, os.W_OK):
        with locked(folder):
            pass


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file, see `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: under a name that nobody can have prepared, then renamed."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.new")
    try:
        with temporary.open("xb") as file:  # x: neither an existing file nor a link
            file.write(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def is_leftover(name: str) -> bool:
    """Whether a file's name is that of a `write_bytes` that was killed."""
    return name.startswith(".") and name.endswith(".new")


def move(source: Path, target: Path) -> None:
    """Rename a file or folder; what stands at the target, file or folder, is replaced."""
    target.parent.mkdir(exist_ok=True)
    if target.is_dir() or source.is_dir():
        remove(target)
    os.replace(source, target)


def remove(path: Path) -> None:
    """Delete a file or a folder with all that it holds; nothing happens where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def names(folder: Path) -> list[str]:
    """Names of what is at the top of an output folder, without the lock and the remains of a killed run."""
    return sorted(printable(path.name, 80) for path in folder.iterdir() if path.name != LOCK and not is_leftover(path.name))
