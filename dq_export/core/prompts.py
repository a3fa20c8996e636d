"""Prompts: what pictures are drawn of, one a line of a text file."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path

from .documents import DocumentError, read_text, shown, shown_path

BYTES = 200_000
"""Of all prompts together: they stand in the recipe, a YAML file with a limit of its own."""
MAX_PROMPTS, MAX_CHARACTERS = 1000, 4000
"""Prompts, and characters of one. A tokenizer takes far fewer."""


def read_prompts(path: Path) -> tuple[str, ...]:
    """The prompts of a UTF-8 file: every line one, without the blanks around it. Empty lines at the end are passed over.

    Raises:
        DocumentError: no such file, not UTF-8, too large, none in it, or a line that is not a prompt.
    """
    lines = [line.strip() for line in read_text(path, BYTES).rstrip().split("\n")]
    if lines == [""]:
        raise DocumentError(f"{shown_path(path)}: empty; expected a prompt on every line")
    if reason := fault(lines, "line"):
        raise DocumentError(f"{shown_path(path)}: {reason}")
    return tuple(lines)


def fault(prompts: Sequence[str], word: str = "prompt") -> str:
    """Why texts cannot be prompts; empty if they can.

    Args:
        word: what a text is called in front of its number.
    """
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        return f"{len(prompts)} prompts; expected 1 to {MAX_PROMPTS}"
    for number, prompt in enumerate(prompts, start=1):
        if not prompt.strip():
            return f"{word} {number} is empty; expected a prompt"
        if len(prompt) > MAX_CHARACTERS:
            return f"{word} {number} has {len(prompt)} characters; expected {MAX_CHARACTERS} at most"
        # Cc: control characters; Cs: halves of surrogate pairs, which no file takes; and the mark in front of some files.
        wrong = next((sign for sign in prompt if unicodedata.category(sign) in ("Cc", "Cs") or sign == "\ufeff"), "")
        if wrong:
            return f"{word} {number} holds the character {shown(wrong)}; expected plain text"
    size = sum(len(prompt.encode()) for prompt in prompts)
    return f"{size} bytes of prompts; expected {BYTES} at most" if size > BYTES else ""
