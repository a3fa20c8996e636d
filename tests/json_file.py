"""A JSON file of a checkpoint or an export, with other values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def edit(path: Path, **changes: Any) -> None:
    """Replace or add some of its keys."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
