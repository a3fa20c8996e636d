"""Read files of users within bounds: only regular files, with limits on bytes and levels and without duplicate keys."""

from __future__ import annotations

import json
import math
import os
import reprlib
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

TEXT_LIMIT = 16 << 20
"""The greatest size of a JSON file in bytes. The largest known, the index of a sharded checkpoint, has under one million."""
YAML_LIMIT = 1 << 20
"""The greatest size of a YAML file in bytes; a recipe with a rule for each of 500 linears has 60,000."""
YAML_NODES = 20_000
"""The greatest number of scalars, lists and mappings in a YAML file. PyYAML reads about 30,000 per second."""
DEPTH = 32
"""The greatest depth of nested lists and mappings."""
DIGITS = 400
"""The greatest number of digits of an integer: more than any float64 has, fewer than Python refuses to print."""


class DocumentError(Exception):
    """A file cannot be read; the message is one line with its path, the fault, and possibly the remedy."""


class MissingError(DocumentError):
    """The file does not exist."""


def read_bytes(path: Path, limit: int = TEXT_LIMIT, *, links: bool = True) -> bytes:
    """The content of a regular file.

    Args:
        limit: its greatest size in bytes.
        links: whether to follow a symbolic link.

    Raises:
        MissingError: the file does not exist.
        DocumentError: it is a folder, a device, a pipe or too large, or the system does not allow reading it.
    """
    # Opening a pipe waits for its other end unless the call must not block.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | (0 if links else getattr(os, "O_NOFOLLOW", 0))
    try:
        with open(os.open(path, flags), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise DocumentError(f"{shown_path(path)}: not a regular file")
            # The size is checked first, so that nothing of a large file is read. It may still grow, or be 0 as in /proc.
            content = file.read(limit + 1) if status.st_size <= limit else b""
    except FileNotFoundError as error:
        raise MissingError(f"{shown_path(path)}: no such file") from error
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise DocumentError(f"{shown_path(path)}: cannot be read ({reason})") from error
    if max(status.st_size, len(content)) > limit:
        raise DocumentError(f"{shown_path(path)}: larger than the {limit} bytes that such a file may have")
    return content


def read_text(path: Path, limit: int = TEXT_LIMIT, *, links: bool = True) -> str:
    """The content of a regular UTF-8 file.

    Raises:
        DocumentError: see `read_bytes`; or the bytes are not UTF-8.
    """
    try:
        return read_bytes(path, limit, links=links).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DocumentError(f"{shown_path(path)}: not UTF-8 (byte {error.start})") from error


def read_json(path: Path, limit: int = TEXT_LIMIT, *, links: bool = True, finite: bool = True) -> Any:
    """The value of a JSON file.

    Args:
        finite: refuse NaN and infinities, which JSON does not have but Python's writer produces.

    Raises:
        DocumentError: see `read_text` and `parse_json`.
    """
    return parse_json(read_text(path, limit, links=links), shown_path(path), finite=finite)


def parse_json(text: str, source: str, *, finite: bool = True) -> Any:
    """The value of a JSON text.

    Args:
        source: the name of the text in messages.

    Raises:
        DocumentError: it is not JSON, has a byte order mark, two equal keys, too many levels, or a number out of range.
    """

    def number(digits: str) -> int:
        if len(digits) > DIGITS:
            raise DocumentError(f"{source}: a number of {len(digits)} digits")
        return int(digits)

    def real(digits: str) -> float:
        value = float(digits)
        if finite and not math.isfinite(value):
            raise DocumentError(f"{source}: {shown(digits)} is not a finite number")
        return value

    if text.startswith("\ufeff"):
        raise DocumentError(f"{source}: starts with a byte order mark; save it as UTF-8 without one")
    try:
        value = json.loads(
            text,
            object_pairs_hook=lambda pairs: _unique(pairs, source),
            parse_int=number,
            parse_float=real,
            parse_constant=real,
        )
    except RecursionError as error:
        raise DocumentError(f"{source}: more than {DEPTH} levels of lists and objects") from error
    except ValueError as error:
        raise DocumentError(f"{source}: not readable as JSON ({error})") from error
    _require_plain(value, source)
    return value


def read_yaml(path: Path, limit: int = YAML_LIMIT) -> Any:
    """The value of a YAML file; see `parse_yaml`.

    Raises:
        DocumentError: see `read_text` and `parse_yaml`.
    """
    return parse_yaml(read_text(path, limit), shown_path(path))


def parse_yaml(text: str, source: str) -> Any:
    """The value of a YAML text: scalars, lists and mappings; dates are text.

    Args:
        source: the name of the text in messages.

    Raises:
        DocumentError: it is not YAML, or has an alias, a tag, two equal keys, too many values or too many levels.
    """
    try:
        value = yaml.load(text, _BoundedLoader)
    except yaml.YAMLError as error:
        line = f", line {mark.line + 1}" if (mark := getattr(error, "problem_mark", None)) else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise DocumentError(f"{source}: not readable as YAML ({printable(problem)}{line})") from error
    except ValueError as error:  # Python reads no integer of more than 4300 digits
        raise DocumentError(f"{source}: a number of too many digits") from error
    _require_plain(value, source)
    return value


def shown(value: object, width: int = 60) -> str:
    """`value` in the form of messages: its repr without control characters, cut to about `width` characters."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = width
    short.maxlevel, short.maxdict, short.maxlist, short.maxtuple = 3, 4, 6, 6
    try:
        text = short.repr(value)
    except ValueError:  # Python prints no integer of more than 4300 digits
        text = f"an integer of more than {DIGITS} digits"
    return text if len(text) <= 2 * width else f"{text[: 2 * width]}…"


def printable(text: str, width: int = 300) -> str:
    """One line for a message: control characters escaped, the middle of a text of more than `width` characters left out."""
    line = "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)
    half = (width - 1) // 2
    return line if len(line) <= width else f"{line[:half]}…{line[-half:]}"


def shown_path(path: Path) -> str:
    """A path in the form of messages; see `printable`."""
    return printable(str(path))


def _unique(pairs: Iterable[tuple[Any, Any]], source: str) -> dict[Any, Any]:
    mapping: dict[Any, Any] = {}
    for key, value in pairs:
        if key in mapping:
            raise DocumentError(f"{source}: key {shown(key)} stands there twice")
        mapping[key] = value
    return mapping


def _require_plain(value: Any, source: str) -> None:
    """Refuse values that are too deep, and texts with half a surrogate pair, which files and terminals do not take."""
    level = [value]
    for _ in range(DEPTH):
        for item in level:
            if isinstance(item, str) and not item.isascii() and any("\ud800" <= sign <= "\udfff" for sign in item):
                raise DocumentError(f"{source}: {shown(item)} is not valid Unicode text")
        level = [
            child
            for item in level
            if isinstance(item, (list, dict))
            for child in ((*item, *item.values()) if isinstance(item, dict) else item)
        ]
        if not level:
            return
    raise DocumentError(f"{source}: more than {DEPTH} levels of lists and objects")


class _BoundedLoader(yaml.SafeLoader):
    """SafeLoader without aliases, tags, dates and merge keys, and with bounds on values and levels."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - as in the base class
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":merge"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.nodes = self.depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        self.nodes += 1
        if isinstance(event, yaml.AliasEvent):
            self._refuse("aliases are not read: write the value itself", event)
        if getattr(event, "tag", None) is not None:
            self._refuse(f"tag {shown(event.tag)} is not read: write a plain value", event)
        if self.nodes > YAML_NODES:
            self._refuse(f"more than {YAML_NODES} values", event)
        if self.depth > DEPTH:
            self._refuse(f"more than {DEPTH} levels", event)
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        mapping: dict[Any, Any] = {}
        for name, value in node.value:
            key = self.construct_object(name, deep=True)
            if not isinstance(key, (str, int, float, bool, type(None))):
                self._refuse("a list or mapping as a key", name)
            if key in mapping:
                self._refuse(f"key {shown(key)} stands there twice", name)
            mapping[key] = self.construct_object(value, deep=True)
        return mapping

    @staticmethod
    def _refuse(problem: str, item: Any) -> None:
        raise yaml.composer.ComposerError(None, None, problem, item.start_mark)
