"""How many of its batches a process has finished."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from dq_export.core.documents import DocumentError, read_json


class Journal:
    """The number of finished batches of a process, stored in a file, or only in memory without a folder."""

    def __init__(self, folder: Path | None, rank: int, key: Mapping[str, object]) -> None:
        self._path = folder / f"journal.{rank}.json" if folder else None
        self._key = json.loads(json.dumps(key))
        self.done = 0
        self.timesteps: list[float] = []
        if folder and self._path:
            folder.mkdir(parents=True, exist_ok=True)
            self.done, self.timesteps = self._finished_batches(self._path)

    def _finished_batches(self, path: Path) -> tuple[int, list[float]]:
        """The content of the file if it has the same key; a damaged file counts as no finished batch."""
        try:
            state = read_json(path, links=False)
        except DocumentError:
            return 0, []
        if not isinstance(state, dict) or state.get("key") != self._key:
            return 0, []
        done, timesteps = state.get("done"), state.get("timesteps")
        if not isinstance(done, int) or done < 0 or not isinstance(timesteps, list):
            return 0, []
        return (done, timesteps) if all(isinstance(item, int | float) for item in timesteps) else (0, [])

    def finish(self, timesteps: list[float]) -> None:
        """Count another finished batch, whose calls had `timesteps`."""
        self.done, self.timesteps = self.done + 1, timesteps
        if self._path:
            new = self._path.with_suffix(".new")
            new.write_text(json.dumps({"key": self._key, "done": self.done, "timesteps": timesteps}))
            os.replace(new, self._path)
