"""What a network architecture is to the rest of the product."""

from __future__ import annotations

from typing import Protocol

from dq_export.core.progress import Advance, unwatched

from .checkpoint import Checkpoint
from .reference import Reference


class Family(Protocol):
    """One network architecture."""

    @property
    def name(self) -> str:
        """As in the report."""

    @property
    def architecture(self) -> str:
        """The diffusers class of its networks, as `architecture_of` gives it."""

    @property
    def default_guidance(self) -> float:
        """Guidance scale for a checkpoint that has no better one."""

    def load(self, checkpoint: Checkpoint, guidance: float, progress: Advance = unwatched) -> Reference:
        """Load a checkpoint of this architecture in float32.

        Raises:
            ModelError: its files are damaged or do not fit each other, or weights that are not finite.
        """
