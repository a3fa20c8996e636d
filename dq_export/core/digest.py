"""The digest of a file."""

from __future__ import annotations

import hashlib
from pathlib import Path

PIECE = 1 << 22
"""Bytes that are read at once."""


def file_digest(path: Path) -> str:
    """sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()
