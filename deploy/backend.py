"""The interface of a backend."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from dq_export.core.artifacts import CalibrationResult
from dq_export.core.network import Feed as Feed
from dq_export.core.progress import Advance, unwatched
from dq_export.core.recipe import Recipe, RecipeError
from dq_export.core.rule import Rule
from dq_export.core.scheme import Scheme
from dq_export.passes.base import GraphPass

from .audit import Audit
from .lowerings import Lowering, Refusal

Float32 = npt.NDArray[np.float32]
Reader = Callable[[Path], ir.Model]


class BackendError(Exception):
    """A backend is missing, or cannot build or run the graph; the message says what to install or change."""


class NotHereError(BackendError):
    """The engine cannot be built on this machine; all earlier stages are done, and the message says how to continue elsewhere."""


class Engine(Protocol):
    """A loaded graph, ready to run."""

    def runner(self, name: str) -> Any:
        """Polygraphy's runner of the loaded graph, not yet activated."""

    def __call__(self, feed: Feed) -> Float32:
        """One network call: `sample` float32."""

    def bound(self, feed: Feed) -> Callable[[], Float32]:
        """The call of one feed, whose inputs are copied once to where the engine computes; every call copies its output back."""


@dataclass(frozen=True, kw_only=True)
class Built:
    """An engine on disk. The backend that built it loads, audits and profiles it.

    Args:
        model: the graph from which the engine was built.
        folder: the backend's own files: a plan, a list of kernels. Empty if the runtime loads the graph as it is.
        note: a remark for the user about the engine; usually empty.
    """

    model: Path
    folder: Path
    note: str = ""


@dataclass(frozen=True)
class Backend(ABC):
    """Legalises, builds, loads and audits the engines of one runtime.

    Args:
        dtype: the value of --dtype: the float type of everything that is not quantized.
    """

    name: ClassVar[str]
    """The value of --format."""
    provider: ClassVar[str | None] = None
    """The value of --provider, for formats that have several."""
    title: ClassVar[str]
    """The name of the runtime in messages."""
    packages: ClassVar[tuple[str, ...]] = ()
    """Distributions, under all their names and in addition to ONNX Runtime, whose versions determine the engine."""
    triton: ClassVar[str] = ""
    """Triton's backend that serves its engine; empty if there is none."""
    attention: ClassVar[tuple[str, ...]] = ("float",)
    """The values of --attention that it runs."""
    device: ClassVar[str] = "cpu"
    """Where its engines run, by PyTorch's name."""

    dtype: str = "fp32"

    @property
    def runs(self) -> bool:
        """Whether an engine can run on this machine."""
        return True

    def configured(self, recipe: Recipe) -> Backend:
        """The backend with the recipe's options for it.

        Raises:
            RecipeError: an option has a value that the backend does not know.
        """
        return self

    @abstractmethod
    def require(self) -> None:
        """Check, before any costly work, that this machine has everything that a build and a run need.

        Raises:
            BackendError: a library is missing, or does not support this machine.
        """

    @abstractmethod
    def supports(self, scheme: Scheme) -> Lowering | Refusal:
        """How it runs a scheme, or why it does not."""

    def require_schemes(self, schemes: Iterable[Scheme]) -> None:
        """Check that it runs every scheme.

        Raises:
            RecipeError: it does not run some of them; the message has a line for each reason, with the nearest scheme that it
                runs.
        """
        refusals: dict[str, Scheme] = {}
        for scheme in schemes:
            answer = self.supports(scheme)
            if isinstance(answer, Refusal):
                refusals.setdefault(str(answer), scheme)
        if refusals:
            raise RecipeError("\n".join(f"{scheme} on {self.title}: {reason}" for reason, scheme in refusals.items()))

    def shared_timesteps(self, choice: str) -> bool:
        """Whether `choice` (`auto`, `shared` or `per-sample`) means one timestep for the batch.

        `auto` means shared: the direct form of a table has fewer operators than the factored form.
        """
        return choice != "per-sample"

    @abstractmethod
    def legalise(self, *, shared: bool, result: CalibrationResult) -> tuple[GraphPass, ...]:
        """The passes from the canonical graph to the graph that the backend runs on its low-precision kernels."""

    def greatest_batch(self, model: Path) -> int | None:
        """The greatest number of rows in one call of its engine; None for any number.

        Raises:
            BackendError: the recipe's shapes do not fit the graph.
        """
        return None

    def portable(self, model: Path, folder: Path) -> Path:
        """A graph that gives the engine's numbers when ONNX Runtime's CPU provider runs it node by node: `model`, or a copy in
        `folder`."""
        return model

    def baseline(self, model: Path, read: Reader, folder: Path) -> Built:
        """The float graph as an engine, for comparing speed.

        Args:
            read: loads the graph, whose weights may be a link to the checkpoint's.
            folder: for files of the build; it stays empty if the runtime loads the graph as it is.

        Raises:
            BackendError: see `build`.
        """
        return Built(model=model, folder=folder)

    @abstractmethod
    def build(self, model: Path, folder: Path, progress: Advance = unwatched) -> Built:
        """Build the engine of `model` in `folder`.

        Raises:
            BackendError: the runtime is missing or refuses the graph.
        """

    @abstractmethod
    def load(self, built: Built, *, batch: int | None = None) -> Engine:
        """Load an engine for any batch, or for one fixed batch, which some runtimes run faster.

        Raises:
            BackendError: the runtime is missing or refuses the engine.
        """

    def profile(self, built: Built, feed: Feed) -> dict[str, float]:
        """Milliseconds of one call by operator, the median of a few calls; empty if the runtime does not measure them."""
        return {}

    @abstractmethod
    def audit(self, built: Built, assigned: Mapping[str, Rule]) -> Audit:
        """Which GEMMs of an engine run on low-precision kernels.

        Raises:
            BackendError: the files of the build are damaged.
        """
