"""The inputs of a calibration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from dq_export.core.folding import work_bytes
from dq_export.core.network import Denoiser
from dq_export.core.progress import Advance, unwatched
from dq_export.core.recipe import Recipe
from dq_export.core.rule import Rule

from .collect.calls import Calls
from .collect.sampling import Sampling
from .group import ALONE, ProcessGroup
from .hessians import SPACE
from .parallel import parallel
from .plugin import UNCHANGED, WeightPlugin
from .tables import NO_TABLES, Tables

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True, eq=False)
class Calibration:
    """The network, recipe and settings of one calibration.

    Args:
        assigned: the deciding rule of every linear, from `Recipe.assign`.
        folder: for statistics during the calibration; the caller deletes it.
        provenance: the origin of the artifacts, stored with them.
        progress: called with (done, total) of each phase in turn: network calls, inputs, weights. Methods that clip
            sample the same pictures twice.
        group: the processes that share the sampling.
        plugin: the user's own weights and Hessians.
        tables: imported decisions.
        space: bytes for second moments and the rounding by them, see `stream_hessians`; more space saves runs over the
            pictures.
    """

    denoiser: Denoiser
    recipe: Recipe
    assigned: Mapping[str, Rule]
    sampling: Sampling
    folder: Path
    provenance: Mapping[str, str] = field(default_factory=dict)
    progress: Advance = unwatched
    group: ProcessGroup = ALONE
    plugin: WeightPlugin = UNCHANGED
    tables: Tables = NO_TABLES
    space: int = SPACE

    @property
    def calls(self) -> Calls:
        """The network calls that draw its pictures."""
        return Calls(denoiser=self.denoiser, sampling=self.sampling, progress=self.progress, group=self.group)

    def for_each(self, work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """`work(item)` for every item, in order, on several threads; an item takes about the memory of one linear's weight."""
        return parallel(work, items, self.progress, work_bytes(self.denoiser))
