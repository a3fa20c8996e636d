"""The user's folder of weights that judge pictures: LPIPS, CLIP, or both."""

from __future__ import annotations

import os
from pathlib import Path

from .clip_score import FOLDER, clip_files, require_clip
from .lpips import SUFFIXES, require_weights, weight_files


def has_clip(folder: Path) -> bool:
    """Whether a folder holds one for a CLIP."""
    return os.path.isdir(folder / FOLDER)  # which, unlike Path.is_dir, takes any name


def has_lpips(folder: Path) -> bool:
    """Whether LPIPS is expected: a folder with a CLIP may have no weights beside it."""
    return not has_clip(folder) or any(path.suffix in SUFFIXES for path in folder.iterdir())


def metric_files(folder: Path) -> list[Path]:
    """The files of all metrics.

    Raises:
        ModelError: see `weight_files`.
    """
    return [*(weight_files(folder) if has_lpips(folder) else ()), *clip_files(folder)]


def require_metrics(folder: Path) -> None:
    """Look whether a folder has the weights of a metric, without reading them.

    Raises:
        ModelError: see `require_weights` of LPIPS and `require_clip`.
    """
    if has_lpips(folder):
        require_weights(folder)
    if has_clip(folder):
        require_clip(folder / FOLDER)
