"""What the export needs from a backend."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from dq_export.core.artifacts import CalibrationResult
from dq_export.core.progress import Advance, unwatched
from dq_export.core.recipe import Recipe, Rule
from dq_export.passes.base import GraphPass

from .audit import Audit
from .lowerings import Target

Float32 = npt.NDArray[np.float32]
Feed = Mapping[str, npt.NDArray[np.generic]]
Reader = Callable[[Path], ir.Model]


class BackendError(Exception):
    """A backend is missing, or cannot build or run the graph; the message says what to install or change."""


class NotHereError(BackendError):
    """The engine cannot be built on this machine; all before it is done, and the message says how to go on elsewhere."""


class Engine(Protocol):
    """A loaded graph, ready to run."""

    def runner(self, name: str) -> Any:
        """Polygraphy's runner of the loaded graph, not activated."""

    def __call__(self, feed: Feed) -> Float32:
        """One network call: `sample` float32."""


class Backend(Protocol):
    """Legalises, builds and runs."""

    @property
    def name(self) -> str:
        """As given to --format."""

    @property
    def provider(self) -> str | None:
        """As given to --provider, for formats that have several."""

    @property
    def dtype(self) -> str:
        """As given to --dtype: the float type of what is not quantized."""

    @property
    def target(self) -> Target:
        """Its column of the table of lowerings."""

    @property
    def title(self) -> str:
        """What runs its engine, for people."""

    @property
    def packages(self) -> tuple[str, ...]:
        """Distributions beside ONNX Runtime, of any name under which they are published, whose version decides the engine."""

    @property
    def triton(self) -> str:
        """Triton's backend that serves its engine; empty: none does."""

    @property
    def runs(self) -> bool:
        """Whether an engine can be run on this machine."""

    def configured(self, recipe: Recipe) -> Backend:
        """With what else a recipe says to it.

        Raises:
            RecipeError: something that it does not know.
        """

    def require(self) -> None:
        """Ask for all that a build and a run need, before anything costly is done.

        Raises:
            BackendError: a library is missing, or does not serve this machine.
        """

    def require_rules(self, rules: Iterable[Rule]) -> None:
        """Ask that it runs every rule.

        Args:
            rules: completed, as `Recipe.assign` gives them.

        Raises:
            RecipeError: some that it does not run, with the nearest that it does.
        """

    def shared_timesteps(self, wanted: str) -> bool:
        """Whether `auto`, `shared` or `per-sample` means one timestep for the batch."""

    def legalise(self, *, shared: bool, result: CalibrationResult) -> tuple[GraphPass, ...]:
        """Passes from the canonical graph to the one that the backend runs on its low-precision kernels."""

    def greatest_batch(self, model: Path) -> int | None:
        """Rows that one call of its engine can take; None: any number.

        Raises:
            BackendError: the recipe's shapes do not fit the graph.
        """

    def portable(self, model: Path, folder: Path) -> Path:
        """A graph that ONNX Runtime's CPU provider runs node by node with the engine's numbers: `model`, or one in `folder`."""

    def baseline(self, model: Path, read: Reader, folder: Path) -> Path:
        """The float graph as `load` takes it, to compare an engine's speed with: `model`, or a copy built in `folder`.

        Args:
            read: loads the graph, whose weights may be a link to the checkpoint's.

        Raises:
            BackendError: as `build`.
        """

    def build(self, model: Path, folder: Path, progress: Advance = unwatched) -> str:
        """Build `model` into `folder`; returns what its user should know about the engine, mostly nothing.

        Raises:
            BackendError: the runtime is missing or refuses the graph.
        """

    def load(self, model: Path, *, batch: int | None = None) -> Engine:
        """Load a graph as it will run, for any batch or for one of fixed size, which some runtimes run faster."""

    def profile(self, model: Path, feed: Feed) -> dict[str, float]:
        """Milliseconds of one call by operator, median of a few."""

    def audit(self, model: Path, folder: Path, assigned: Mapping[str, Rule]) -> Audit:
        """Which GEMMs of the engine built into `folder` run on low-precision kernels."""
