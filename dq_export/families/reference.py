"""The interface of a loaded network: what an export needs from it in addition to what calibration needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from dq_export.core.network import Conditions, Denoiser, Feed
from dq_export.core.progress import Advance, unwatched
from dq_export.core.rule import Rule
from dq_export.deploy.triton.serving.schedules import Schedules

from .serving import Serving

Float32 = npt.NDArray[np.float32]
Network = Callable[[Feed], Float32]


class ModelError(Exception):
    """A model cannot be found, read or used; the message says which file and what to do."""


class MissingPackageError(ModelError):
    """The model's own pipeline needs a package that is not installed; the message says how to install it."""


@dataclass(frozen=True, kw_only=True)
class Samplers:
    """The samplers that a server can offer.

    Args:
        schedules: their tables.
        default: the name of the checkpoint's own sampler, or of its replacement.
        refused: the reasons why other samplers have no table.
    """

    schedules: Schedules
    default: str
    refused: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class PromptGraph:
    """What `export_encoders` wrote.

    Args:
        path: of the graph; its weights and the tokenizers lie beside it.
        tokenizers: names of the tokenizers' files.
        float_bytes, stored_bytes: of all tensors of the graph: in float32, and as it stores them.
    """

    path: Path
    tokenizers: tuple[str, ...]
    float_bytes: int
    stored_bytes: int


class Reference(Denoiser, Protocol):
    """The float PyTorch network of a checkpoint with its sampler. Every later stage is compared with it.

    Attributes:
        conditions: the conditions of its pictures. A network that draws prompts has none until they are set.
        shared: whether the graph that is traced for `linears` and `sites` has one timestep for all samples; both kinds have
            the same linears and sites, and `export_onnx` of the same kind does not trace again.
    """

    conditions: Conditions
    shared: bool

    @property
    def digest(self) -> str:
        """sha256 of configuration and weights, hexadecimal."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The network's config.json: its diffusers class as `_class_name`, and the values that the class takes."""

    @property
    def guidance(self) -> float:
        """The model's default classifier-free guidance scale."""

    @property
    def guided_by(self) -> Literal["null", "input", "nothing"]:
        """The kind of guidance that a scale above 1 uses; see `Family.guided_by`."""

    def draw_at(self, height: int, width: int) -> None:
        """Draw pictures of another size than the model's own, in pixels. Must be called before the network is used.

        Raises:
            ModelError: the network does not draw that size.
        """

    def at(self, size: tuple[int, int]) -> AbstractContextManager[None]:
        """While active, pictures have another height and width, in pixels, and the timesteps that go with them.

        Raises:
            ModelError: the network does not draw that size.
        """

    @property
    def unit(self) -> int:
        """The pixels that `draw_at` counts for a side of one latent; 0 for a network of one size."""

    @property
    def sampler(self) -> str:
        """The scheduler's class, and what else makes the network's inputs, for the report."""

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The family's default recipe rules; together they match every linear."""

    @property
    def feed_shape(self) -> tuple[int, ...]:
        """The shape of what is sampled of one picture: its state without channels that the sampler does not change."""

    def latents(self, sampled: Float32) -> Float32:
        """What `draw` returned as a VAE takes it, float32[N, C, h, w]."""

    @property
    def decoder(self) -> Path | None:
        """The folder of the checkpoint's VAE, whose latents this network samples; None if its latents are pictures."""

    def on(self, device: str) -> AbstractContextManager[None]:
        """A context in which the network computes on `device` (`cpu`, `cuda`, `cuda:1`); `weight` and `bias` do not change."""

    def encode(self, prompts: Sequence[str], device: str, progress: Advance = unwatched) -> Conditions:
        """Encode prompts. The text encoders are loaded, compute on `device`, and are freed.

        Raises:
            ModelError: a part of the pipeline is missing or damaged, or does not fit the network.
        """

    def encoding_files(self) -> list[tuple[str, int, int]]:
        """Name, size and time of change of each file of the tokenizers and text encoders.

        Raises:
            ModelError: see `encode`.
        """

    @property
    def serving(self) -> Serving:
        """How a server calls the network, at the present size."""

    def export_encoders(self, folder: Path, bits: int | None = None) -> PromptGraph | None:
        """Write what encodes prompts as one ONNX graph, and its tokenizers; None where the network draws no prompts.

        Args:
            bits: of the weights of its linears: 8, in blocks; None: float32.

        Raises:
            ModelError: see `encode`.
        """

    def forward(self, feed: Feed) -> Float32:
        """One float network call; a timestep of one row applies to every sample."""

    def parts(self, feed: Feed) -> list[Feed]:
        """Split the rows of a call into feeds whose activations are small compared with the weights."""

    def in_dtype(self, dtype: str) -> Network:
        """A copy of the network that computes in `bf16`, with float32 inputs and outputs like `forward`."""

    def timesteps(self, steps: int) -> list[float]:
        """The timesteps that a trajectory sends, in order.

        Raises:
            ModelError: the scheduler cannot sample in this number of steps.
        """

    def release(self) -> None:
        """Free the weights; afterwards `forward`, `weight`, `observe` and `export_onnx` must not be called."""

    def noise(self, samples: int, seed: int) -> Float32:
        """float32[samples, ...]; equal arguments give equal numbers on every machine."""

    def samplers(self, limit: int, progress: Advance = unwatched) -> Samplers:
        """The samplers that a server can offer, for up to `limit` steps.

        Raises:
            ModelError: no sampler of the checkpoint has a table.
        """

    def draw(
        self, network: Network, noise: Float32, conditions: npt.NDArray[np.int64], *, steps: int, guidance: float
    ) -> Float32:
        """The sampled latents, shape of `noise`, from the index of each picture's condition."""

    def export_onnx(self, path: Path, *, shared: bool) -> None:
        """Write the float network as ONNX (opset 21, external data); `timestep` has one row if it is shared."""
