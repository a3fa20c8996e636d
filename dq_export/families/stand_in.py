"""An object for the denoiser's place in a diffusers pipeline: a network of arrays with the diffusers model's interface."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import starmap
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from dq_export.core.network import Axis, Feed, Input

from .reference import Float32, Network


@dataclass(frozen=True, eq=False, repr=False)
class StandIn:
    """Replaces the denoiser of a diffusers pipeline: `Pipeline(transformer=stand_in, ...)`, `pipe.unet = stand_in`.

    It is not a torch.nn.Module, so a pipeline's `to`, `save_pretrained` and offloading ignore it: its network computes where
    it was loaded, in its own precision. Tensors may lie on any device and have any floating type; the result has the device
    and the type of the state.

    Args:
        network: computes the output, from each input's array by name.
        inputs: the inputs of the network, the state first.
        config: the configuration of the diffusers model, whose keys are also attributes.
        architecture: the diffusers class whose `forward` defines the arguments.
        shared: whether the network takes one timestep for the whole batch, not one for each sample.
        part: the name of the denoiser in pipelines.
    """

    network: Network
    inputs: Sequence[Input]
    config: Any
    architecture: Any
    shared: bool
    part: str = "transformer"

    @property
    def dtype(self) -> Any:
        """torch.float32, the type of the latents that a pipeline creates."""
        import torch

        return torch.float32

    @property
    def device(self) -> Any:
        """The CPU, because the network takes arrays."""
        import torch

        return torch.device("cpu")

    def __repr__(self) -> str:
        # diffusers shows it where `from_pretrained(..., transformer=stand_in)` refuses what is not a torch module.
        return f"StandIn of {self.architecture.__name__}, to be set as pipe.{self.part}"

    @property
    def add_embedding(self) -> Any:
        """Stable Diffusion XL's pipeline asks its linear how many numbers it takes."""
        return SimpleNamespace(linear_1=SimpleNamespace(in_features=self.config["projection_class_embeddings_input_dim"]))

    def cache_context(self, name: str) -> AbstractContextManager[None]:
        """A context for calls that FLUX's pipeline uses with diffusers' caches; it does nothing here."""
        return nullcontext()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One network call with the arguments of the diffusers class's `forward`.

        Arguments that are None, and dictionaries without values, count as missing.

        Returns:
            The class's diffusers output, or with `return_dict=False` a tuple with its only tensor.

        Raises:
            TypeError: an argument is missing, or is one that the network does not take.
            ValueError: see `run`.
        """
        import torch

        values, return_dict = self._arguments(args, kwargs)
        output = torch.from_numpy(self.run({name: _array_of(value) for name, value in values.items()}))
        state = values[self.inputs[0].name]
        output = output.to(state.device, state.dtype)
        return _output_class(self.architecture)(sample=output) if return_dict else (output,)

    def run(self, feed: Feed) -> Float32:
        """One network call with arrays.

        Args:
            feed: for each input an array whose values the input's element type represents exactly; floating types are
                rounded to the input's. A timestep may also have no dimension, one row, or equal rows if the network takes one.

        Raises:
            TypeError: an input is missing or unknown.
            ValueError: an input of another shape, a number that is none of the input's type (a fractional timestep) or an
                index out of range, or different timesteps where the network takes one.
        """
        self._require(feed.keys(), {item.name for item in self.inputs})
        arrays = {item.name: _cast(item, feed[item.name]) for item in self.inputs}
        arrays["timestep"] = self._timesteps(arrays["timestep"], len(np.atleast_1d(arrays[self.inputs[0].name])))
        sizes: dict[str, int] = {}
        for item in self.inputs:
            if not (self.shared and item.role == "timestep"):
                _require_shape(item, arrays[item.name].shape, sizes)
        return self.network(arrays)

    def _arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
        """The pipeline's value for each input, and its `return_dict`."""
        try:
            bound = inspect.signature(self.architecture.forward).bind(None, *args, **kwargs).arguments
        except TypeError as error:
            raise TypeError(f"{self.architecture.__name__}: {error}; {self._remedy}") from error
        _, *arguments = bound.items()
        values: dict[tuple[str, str], Any] = {}
        for name, value in arguments:
            values |= {place: entry for place, entry in self._entries(name, value).items() if entry is not None}
        return_dict = bool(values.pop(("", "return_dict"), True))
        self._require(set(starmap(_shown, values)), {_shown(item.within, item.name) for item in self.inputs})
        return {name: value for (_, name), value in values.items()}, return_dict

    def _entries(self, argument: str, value: Any) -> dict[tuple[str, str], Any]:
        """What an argument holds, by the `within` and the name of its input."""
        if isinstance(value, Mapping):
            return {(argument, key): entry for key, entry in value.items()}
        if isinstance(value, (tuple, list)) and any(item.within == argument for item in self.inputs):
            return {(argument, f"{argument}_{number}"): entry for number, entry in enumerate(value)}
        return {("", argument): value}

    def _require(self, values: Any, names_of_inputs: set[str]) -> None:
        """Check that the inputs are those that the network takes; raises TypeError."""
        for names, problem in ((names_of_inputs - values, "misses"), (values - names_of_inputs, "does not take")):
            if names:
                raise TypeError(
                    f"this {self.architecture.__name__} {problem} {', '.join(sorted(names))} (it takes "
                    f"{', '.join(sorted(names_of_inputs))}); {self._remedy}"
                )

    @property
    def _remedy(self) -> str:
        return "use a pipeline that is for this network"

    def _timesteps(self, timesteps: npt.NDArray[Any], rows: int) -> npt.NDArray[Any]:
        """The timesteps in the network's form: one row for the whole batch, or one for each sample."""
        timesteps = np.atleast_1d(timesteps)
        if not self.shared:
            return np.repeat(timesteps, rows) if timesteps.shape == (1,) else timesteps
        if timesteps.shape not in ((1,), (rows,)):
            raise ValueError(f"timestep has shape {list(timesteps.shape)}, and the network takes [{rows}] or [1]")
        if (timesteps != timesteps[0]).any():
            examples = ", ".join(f"{value:g}" for value in np.unique(timesteps)[:3])
            raise ValueError(
                f"different timesteps in one call ({examples}), and the network takes one for the whole batch; export it with "
                "--timesteps per-sample"
            )
        return timesteps[:1]


def _shown(within: str, name: str) -> str:
    """The name of an input for messages; that in a tuple begins with the tuple's."""
    return name if name.startswith(within) else f"{within}.{name}"


def _output_class(architecture: Any) -> Any:
    """The class of a `forward`'s output: UNet2DConditionOutput for UNet2DConditionModel, and one class for all transformers."""
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    name = f"{architecture.__name__.removesuffix('Model')}Output"
    return getattr(sys.modules[architecture.__module__], name, Transformer2DModelOutput)


def _array_of(value: Any) -> npt.NDArray[Any]:
    """A tensor of any device and type, or a number, as an array."""
    import torch

    if not isinstance(value, torch.Tensor):
        return np.asarray(value)
    value = value.detach().cpu()
    array: npt.NDArray[Any] = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    return array


def _cast(item: Input, value: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """An input in its element type; integers and booleans must hold the values exactly."""
    with np.errstate(invalid="ignore"):
        cast = value.astype(item.dtype, copy=False)
    if item.limit is not None and ((cast < 0) | (cast > item.limit)).any():
        # A runtime may read whatever lies behind a table.
        outside = cast[(cast < 0) | (cast > item.limit)].flat[0]
        raise ValueError(f"{item.name} holds {outside}, and the network takes 0 to {item.limit}")
    if np.issubdtype(cast.dtype, np.floating) or np.array_equal(cast, value):
        return cast
    wrong = float(value[cast != value].flat[0])
    if item.role == "timestep":
        raise ValueError(f"the scheduler sends the fractional timestep {wrong:g}, and the network takes integers")
    raise ValueError(f"{item.name} holds {wrong:g}, and the network takes {item.dtype}")


def _require_shape(item: Input, shape: tuple[int, ...], sizes: dict[str, int]) -> None:
    """Raise ValueError unless an input has its shape; `sizes` gets those of the axes, by name."""
    expected = [
        sizes[axis.name] // axis.divisor if isinstance(axis, Axis) and axis.name in sizes else axis for axis in item.shape
    ]
    if len(shape) == len(expected) and all(
        dim.takes(size) if isinstance(dim, Axis) else dim == size for dim, size in zip(expected, shape, strict=True)
    ):
        sizes.update(
            {axis.name: size * axis.divisor for axis, size in zip(item.shape, shape, strict=True) if isinstance(axis, Axis)}
        )
        return
    raise ValueError(f"{item.name} has shape {list(shape)}, and the network takes [{', '.join(map(str, expected))}]")
