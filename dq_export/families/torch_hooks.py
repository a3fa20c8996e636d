"""Observe and change the linears of a torch network while it computes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dq_export.core.network import Float32, InputSite, Observer
from dq_export.core.patches import Patches

if TYPE_CHECKING:
    import torch


@contextmanager
def moved(model: Any, device: str) -> Iterator[dict[str, torch.Tensor]]:
    """While active the network's tensors are on a device; gives those of the processor, which stay mapped, by name.

    On the processor itself, and without a network, it moves nothing and gives none.
    """
    tensors = {} if device == "cpu" or model is None else {**dict(model.named_parameters()), **dict(model.named_buffers())}
    host = {name: tensor.data for name, tensor in tensors.items()}
    try:
        for tensor in tensors.values():
            tensor.data = tensor.data.to(device)
        yield host
    finally:
        for name, tensor in tensors.items():
            tensor.data = host[name]


@contextmanager
def observed(model: Any, sites: Sequence[InputSite], observer: Observer) -> Iterator[None]:
    """See `Denoiser.observe`."""

    def watch(name: str) -> Any:
        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            value = inputs[0].detach()
            observer(name, Patches(value, module) if _convolves(module) else value.flatten(0, -2))

        return hook

    handles = [model.get_submodule(site.linears[0]).register_forward_pre_hook(watch(site.name), prepend=True) for site in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def parameters_replaced(model: Any, weights: Mapping[str, Float32], biases: Mapping[str, Float32]) -> Iterator[None]:
    """A context in which linears have other weights and biases. A linear without a bias gets one, as in the graph."""
    import torch

    changes = [(name, "weight", value) for name, value in weights.items()]
    changes += [(name, "bias", value) for name, value in biases.items()]
    before = [getattr(model.get_submodule(name), kind) for name, kind, _ in changes]
    try:
        for name, kind, value in changes:
            module = model.get_submodule(name)
            new = torch.from_numpy(value).to(module.weight.device).reshape(module.weight.shape if kind == "weight" else -1)
            setattr(module, kind, torch.nn.Parameter(new, requires_grad=False))
        yield
    finally:
        for (name, kind, _), parameter in zip(changes, before, strict=True):
            setattr(model.get_submodule(name), kind, parameter)


@contextmanager
def inputs_replaced(model: Any, sites: Sequence[InputSite], rounded: Callable[[str, Float32, float], Float32]) -> Iterator[None]:
    """A context in which every site's readers read `rounded(site.name, float32[rows, K], timestep)`."""
    import torch

    timestep = 0.0
    roundings: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def learn(module: torch.nn.Module, inputs: tuple[Any, ...], arguments: dict[str, Any]) -> None:
        nonlocal timestep
        timestep = float(arguments["timestep"][0])
        roundings.clear()

    def swap(name: str) -> Any:
        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            value = inputs[0]
            if name not in roundings or roundings[name][0] is not value:  # readers of one tensor get one rounding of it
                # A convolution's channels are the last axis for that, each as often as a patch has it.
                last, taps = value.detach().movedim(1, -1), math.prod(module.kernel_size) if _convolves(module) else 0
                rows = last.flatten(0, -2).repeat_interleave(taps, 1) if taps else value.detach().flatten(0, -2)
                replacement = torch.from_numpy(rounded(name, rows.cpu().numpy(), timestep)).to(value.device)
                whole = replacement[:, ::taps].reshape(last.shape).movedim(-1, 1) if taps else replacement.reshape(value.shape)
                roundings[name] = value, whole
            return (roundings[name][1],)

        return hook

    handles = [model.register_forward_pre_hook(learn, with_kwargs=True)]
    for site in sites:
        handles += [model.get_submodule(name).register_forward_pre_hook(swap(site.name)) for name in site.linears]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _convolves(module: Any) -> bool:
    import torch

    return isinstance(module, torch.nn.Conv2d)
