"""What is wrong with values that a user wrote, in one line each, with the nearest valid word."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from .documents import printable, shown

LONGEST_NAME = 200
"""Characters of a word that is compared with the valid ones."""
ERRORS = 10
"""Violations that one message lists."""


def nearest(word: str, valid: list[str]) -> str:
    """` Did you mean 'x'?` for a misspelt word, or nothing if no valid word is near."""
    close = difflib.get_close_matches(word[:LONGEST_NAME], valid, n=1, cutoff=0.5)  # its time grows with the square
    return f" Did you mean '{close[0]}'?" if close else ""


def violations(error: ValidationError, source: str, fields: Mapping[str, Sequence[str]]) -> str:
    """One line for each of pydantic's violations, the first ERRORS of them.

    Args:
        source: where the values come from.
        fields: by the name of a list of objects, the fields of one; under the empty name those of the whole.
    """
    items = error.errors(include_url=False)
    lines = [_line(item, source, fields) for item in items[:ERRORS]]
    more = len(items) - ERRORS
    return "\n".join(lines + [f"{source}: {more} more"] * (more > 0))


def _line(item: Any, source: str, fields: Mapping[str, Sequence[str]]) -> str:
    key = printable(".".join(str(part) for part in item["loc"] if not str(part).startswith(("literal[", "int"))), 100)
    value = item.get("input")
    if item["type"] == "extra_forbidden":
        valid = list(fields.get(key.split(".")[0], fields[""]))
        return f"{source}: unknown key '{key}'.{nearest(key.split('.')[-1], valid)} Valid: {', '.join(valid)}"
    if item["type"] == "literal_error":
        expected = item["ctx"]["expected"]
        hint = nearest(value, re.findall("'([^']+)'", expected)) if isinstance(value, str) else ""
        return f"{source}: {key} = {shown(value)}: expected {expected}.{hint}"
    if item["type"] == "missing":
        return f"{source}: '{key}' is missing"
    return f"{source}: {key} = {shown(value)}: {item['msg'].removeprefix('Value error, ')}"
