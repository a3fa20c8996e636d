"""Every backend that --format can name."""

from __future__ import annotations

from .backend import Backend
from .ort import ORT

BACKENDS: tuple[Backend, ...] = (ORT,)
