"""Regular expressions of users, searched in linear time."""

from __future__ import annotations

import re
from functools import lru_cache

import re2

from .documents import shown

LENGTH = 2000
"""Characters of a pattern."""
REPEATED = re.compile(r"(?<!\\)\{\d*,?\d{5}")


class PatternError(ValueError):
    """A text is not a regular expression that RE2 takes; the message says why."""


def search(pattern: str, text: str) -> bool:
    """Whether `pattern` matches anywhere in `text`.

    RE2's syntax is Python's without look-around and backreferences. Its search takes time linear in the length of `text`
    whatever the pattern, where `re` needs centuries for `(\\w+\\.?)+!` on forty characters.

    Raises:
        PatternError: see `require_pattern`.

    Source: Cox, Regular expression matching in the wild, 2010.
    """
    return _compiled(pattern).search(text) is not None


def require_pattern(pattern: str) -> None:
    """Let a valid pattern pass.

    Raises:
        PatternError: not a regular expression, look-around or a backreference, more than LENGTH characters, or one whose
            program takes more than RE2's 8 MB.
    """
    _compiled(pattern)


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> re2._Regexp[str]:
    if len(pattern) > LENGTH:
        raise PatternError(f"{shown(pattern)} has {len(pattern)} characters; a pattern may have {LENGTH}")
    if REPEATED.search(pattern):  # RE2 takes it for literal text
        raise PatternError(f"{shown(pattern)} repeats more than 1000 times; RE2 repeats up to 1000")
    options = re2.Options()
    options.log_errors = False  # it would write to stderr itself
    try:
        return re2.compile(pattern, options)
    except (re2.error, UnicodeEncodeError) as error:
        reason = error.args[0].decode(errors="replace") if error.args and isinstance(error.args[0], bytes) else str(error)
        raise PatternError(f"{shown(pattern)} is not a regular expression of RE2's syntax: {shown(reason, 100)}") from error
