"""Network architectures, one file each."""

from __future__ import annotations

from .dit import DIT
from .family import Family

FAMILIES: tuple[Family, ...] = (DIT,)
