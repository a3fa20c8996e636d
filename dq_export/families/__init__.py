"""Network architectures, one file each."""

from __future__ import annotations

from .dit import DIT
from .reference import Family

FAMILIES: tuple[Family, ...] = (DIT,)
