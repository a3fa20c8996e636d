"""The interface of a network to calibration, which every model family implements."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from .folds import Fold
from .patches import Patches

if TYPE_CHECKING:
    import torch

Float32 = npt.NDArray[np.float32]
Feed = Mapping[str, npt.NDArray[Any]]
"""Inputs of one network call by name. They have a row for each sample, except positions and a timestep for all samples."""
Role = Literal["gemm", "vector", "edge", "static"]
Observer = Callable[[str, "torch.Tensor | Patches"], None]


@dataclass(frozen=True)
class Axis:
    """A dimension that may change from call to call; inputs whose sizes change together share one.

    Args:
        name: the graph's name of the dimension.
        size: the size of sampled pictures and of examples.
        limit: the greatest size that the graph takes.
        multiple: a number that divides every size.
        divisor: the dimension has the size divided by this, which divides `multiple`. A UNet's deeper levels have a half, a
            quarter and an eighth of the height.
    """

    name: str
    size: int
    limit: int = 1024
    multiple: int = 1
    divisor: int = 1

    @property
    def unit(self) -> str:
        """The graph's name of the size divided by `multiple`."""
        return self.name if self.multiple == 1 else f"{self.name}_by_{self.multiple}"

    @property
    def length(self) -> int:
        """The dimension in sampled pictures and in examples."""
        return self.size // self.divisor

    def __str__(self) -> str:
        step, part = self.multiple // self.divisor, f"/{self.divisor}" if self.divisor > 1 else ""
        steps = f" in steps of {step}" if step > 1 else ""
        return f"{self.name}{part} up to {self.limit // self.divisor}{steps}"

    def takes(self, length: int) -> bool:
        """Whether the graph takes a dimension of this length."""
        size = length * self.divisor
        return 1 <= size <= self.limit and size % self.multiple == 0


BATCH = Axis("batch", 2)


@dataclass(frozen=True, kw_only=True)
class Input:
    """One input of a network. Its first dimension is the batch, except for positions, which all samples share.

    Args:
        name: diffusers' name, which is also the name of the graph's input.
        role: `state` is the value that a sampler changes, the first input of every network; `timestep` is the input of that
            name; `condition` says what the picture shows; `setting` is a further value of a pipeline that is the same in all
            calls of a picture: positions, the scale of a guidance that the network itself applies; `residual` is what a
            ControlNet makes in each call, for a sum inside the network.
        dtype: numpy's name of the element type.
        within: the argument of the network's `forward` that holds the input, a dictionary, or of residuals a tuple of all that
            have the same; empty if it is an argument itself.
        limit: the greatest index that the input takes, from 0; None if it does not hold indices.
    """

    name: str
    role: Literal["state", "timestep", "condition", "setting", "residual"]
    dtype: str
    shape: tuple[int | Axis, ...] = (BATCH,)
    within: str = ""
    limit: int | None = None

    @property
    def batched(self) -> bool:
        """Whether it has a row for each sample."""
        return isinstance(self.shape[0], Axis) and self.shape[0].name == BATCH.name

    def zeros(self, batch: int = BATCH.size) -> npt.NDArray[Any]:
        """An array of the input's shape and type."""
        first, *rest = [axis.length if isinstance(axis, Axis) else axis for axis in self.shape]
        return np.zeros((batch if self.batched else first, *rest), dtype=self.dtype)


@dataclass(frozen=True, kw_only=True, eq=False)
class Conditions:
    """The conditions of pictures. A condition is an index into these arrays.

    Args:
        names: the name of each of the N conditions: the prompt, or the class label as text.
        arrays: for each input, [N, ...]: its row for each condition; empty if a network takes none.
        null: for each input, [1, ...]: the row of the empty condition for guidance; empty if there is none.
    """

    names: tuple[str, ...]
    arrays: Feed
    null: Feed

    def __len__(self) -> int:
        return len(self.names)

    @staticmethod
    def blank(inputs: Iterable[Input]) -> Conditions:
        """One condition of zeros, with a null of zeros: for calls whose results are not used."""
        rows = {item.name: item.zeros(1) for item in inputs if item.role == "condition"}
        return Conditions(names=("",), arrays=rows, null=rows)

    def only(self, names: Collection[str]) -> Conditions:
        """The same of some inputs."""
        arrays, null = ({name: rows[name] for name in names if name in rows} for rows in (self.arrays, self.null))
        return Conditions(names=self.names, arrays=arrays, null=null)

    def rows(self, chosen: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[Any]]:
        """The inputs of pictures, from the index of each one's condition."""
        return {name: rows[chosen] for name, rows in self.arrays.items()}

    def null_rows(self, count: int) -> dict[str, npt.NDArray[Any]]:
        """The inputs of `count` pictures without a condition."""
        return {name: np.repeat(row, count, axis=0) for name, row in self.null.items()}


def arguments(inputs: Sequence[Input], values: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of the network's `forward`, from the values of its inputs by name."""
    by_name: dict[str, Any] = {}
    for item in inputs:
        if item.within and item.role == "residual":
            by_name[item.within] = (*by_name.get(item.within, ()), values[item.name])
        else:
            (by_name.setdefault(item.within, {}) if item.within else by_name)[item.name] = values[item.name]
    return by_name


def axes_of(inputs: Iterable[Input]) -> list[Axis]:
    """The dimensions, other than the batch, that may change; each once, undivided."""
    axes = [axis for item in inputs for axis in item.shape if isinstance(axis, Axis) and axis is not BATCH]
    return list({axis.name: replace(axis, divisor=1) for axis in axes}.values())


def sized(inputs: Sequence[Input], conditions: Conditions) -> tuple[Input, ...]:
    """The inputs with the sizes that conditions have, such as their number of tokens."""
    sizes = {
        axis.name: size * axis.divisor
        for item in inputs
        for axis, size in zip(item.shape, getattr(conditions.arrays.get(item.name), "shape", ()), strict=False)
        if isinstance(axis, Axis) and axis is not BATCH
    }
    return resized(inputs, sizes)


def resized(inputs: Iterable[Input], sizes: Mapping[str, int]) -> tuple[Input, ...]:
    """The inputs with other sizes of some axes, by name."""

    def fitted(size: int | Axis) -> int | Axis:
        return replace(size, size=sizes[size.name]) if isinstance(size, Axis) and size.name in sizes else size

    return tuple(replace(item, shape=tuple(map(fitted, item.shape))) for item in inputs)


def output_name(inputs: Iterable[str]) -> str:
    """The graph's name of the network's output: diffusers' `sample`, or `out_sample` if an input has that name."""
    return "out_sample" if "sample" in inputs else "sample"


def batch_of(feed: Feed) -> int:
    """The number of samples of a network call: the rows of its first input other than the timestep."""
    return len(next(rows for name, rows in feed.items() if name != "timestep"))


@dataclass(frozen=True, kw_only=True)
class InputSite:
    """One tensor that quantized linears read, and the fold of its equivalent scaling.

    Args:
        name: the first reader's module name, which is unique and stable.
        linears: module names of all readers; they share one activation scale, in_scale and in_shift.
        fold: the parts that absorb (x - in_shift) / in_scale.
        shares: the site whose in_scale and in_shift apply here, because one fold scales both; empty if it has a fold.
    """

    name: str
    linears: tuple[str, ...]
    fold: Fold
    shares: str = ""

    @property
    def target(self) -> str:
        """What takes up the scaling, in words."""
        return f"what '{self.shares}' folds into" if self.shares else self.fold.target


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A linear layer of the network, or a convolution of its blocks, which is a linear layer on patches.

    Args:
        name: its module name, which is also the name of the quantized GEMM's node.
        role: `gemm`: works on all tokens; `vector`: on one row per sample; `edge`: embedders and final layers; `static`: on
            tokens that are constant along a trajectory.
        width: number of its inputs; for a convolution those of a patch, with each channel's elements side by side.
        convolution: whether it reads patches of an image.
    """

    name: str
    role: Role
    width: int
    convolution: bool = False


class Chain(Protocol):
    """The blocks of a network; each reads outputs of earlier blocks, and values that all blocks share."""

    @property
    def shapes(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """For each block, the shapes of a sample's outputs."""

    @property
    def sources(self) -> tuple[tuple[int, ...], ...]:
        """For each block, the ascending indices of the earlier blocks whose outputs it reads: of a UNet's often several."""

    @property
    def behind(self) -> tuple[str, ...]:
        """Linears that the network calls after its last block."""

    @property
    def device(self) -> torch.device:
        """The device of the network."""

    def run(self, index: int, feed: Feed, before: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The output of a block, with gradients of this block only, if they are enabled. The last block runs together with the
        rest of the network after it: its output is the network's.

        Args:
            feed: the network's inputs; each sample may have its own timestep.
            before: the outputs of its `sources`, one after the other.
        """

    def whole(self, feed: Feed) -> tuple[torch.Tensor, ...]:
        """The output of the network, with gradients through all blocks if they are enabled."""


class Denoiser(Protocol):
    """A float reference network with its sampler. Tensors are float32 unless stated otherwise."""

    @property
    def inputs(self) -> tuple[Input, ...]:
        """The network's inputs, in the graph's order."""

    @property
    def sites(self) -> tuple[InputSite, ...]:
        """Inputs of the linears whose role is `gemm` or `static`, in execution order."""

    @property
    def linears(self) -> Mapping[str, Linear]:
        """Every linear of the network by module name, in execution order."""

    @property
    def attention(self) -> tuple[tuple[str, ...], ...]:
        """Module names of the linears whose results bound the query, key and value of each attention."""

    @property
    def batch(self) -> int:
        """The number of pictures that are sampled together: at most 8, and few enough to keep activations small beside the
        weights."""

    def weight(self, linear: str) -> Float32:
        """float32[out, in]; a view where possible."""

    def bias(self, linear: str) -> Float32:
        """float32[out]; zeros if it has no bias."""

    def trajectory(
        self, conditions: npt.NDArray[np.int64], *, steps: int, seed: int, guidance: float, before: Callable[[Feed], None]
    ) -> None:
        """Sample a picture of each condition on the reference; `before` is called with the inputs of each network call."""

    def drawing(self, size: tuple[int, int] | None) -> AbstractContextManager[None]:
        """While active, pictures have another height and width, in pixels, and are sampled at the same timesteps as before;
        None: it changes nothing."""

    def replace(
        self, weights: Mapping[str, Float32], biases: Mapping[str, Float32], rounded: Callable[[str, Float32, float], Float32]
    ) -> AbstractContextManager[None]:
        """While active, linears have other weights and biases, and every site's readers read
        `rounded(site.name, float32[rows, K], timestep)` in place of the input; observers see what came before it."""

    def observe(self, observer: Observer) -> AbstractContextManager[None]:
        """While active, every site's input goes to `observer(site.name, float32[rows, K])` at each network call; that of
        convolutions as `Patches`."""

    @property
    def blocks(self) -> tuple[str, ...]:
        """Module names of the blocks that hold linears, in execution order; none where the network is not made of blocks."""

    @property
    def tower(self) -> tuple[str, ...]:
        """The same where the blocks stand on each other; none in a UNet, whose last blocks read the first."""

    def chain(self, feed: Feed) -> Chain:
        """The blocks one by one; `feed`: an example of a network call.

        Raises:
            Exception: the family's own, where a block reads more than what earlier ones put out and what all share.
        """

    def product(self, linear: str) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
        """What a linear or a convolution computes of its input, a weight [out, in] and a bias [out]."""

    def computing(self, linears: Mapping[str, Callable[[torch.Tensor], torch.Tensor]]) -> AbstractContextManager[None]:
        """While active, linears compute something else of their input."""
