"""The blocks of a torch network, run one at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

from dq_export.core.network import Feed, Input

from .reference import ModelError
from .torch_call import tensors_of

if TYPE_CHECKING:
    import torch

Outputs = tuple["torch.Tensor", ...]
UNET_LISTS = ("resnets", "attentions", "downsamplers", "upsamplers")
"""What diffusers calls the lists inside a UNet's levels, whose modules read what earlier levels put out."""


class _Reached(Exception):
    """Ends a network call after the requested block."""


class TorchChain:
    """The blocks of a network one by one; see `core.network.Chain`.

    A call of one block is a call of the whole network in which earlier blocks do not compute: those that the block reads return
    the caller's values. So the network itself does the work between its blocks.

    Args:
        names: the blocks in execution order.
        feed: an example of a call, which gives the sizes of the blocks' outputs, and what reads them.

    Raises:
        ModelError: a block reads other values than the outputs of earlier blocks and values that all blocks share.
    """

    def __init__(self, model: Any, inputs: Sequence[Input], names: Sequence[str], feed: Feed) -> None:
        import torch

        self.model, self.inputs, self.names = model, inputs, tuple(names)
        self.blocks = [model.get_submodule(name) for name in names]
        model.requires_grad_(False)  # the trained parameters replace the network's own
        outputs, behind, count = list[Any](), list[str](), len(names)
        handles = [block.register_forward_hook(lambda module, args, output: outputs.append(output)) for block in self.blocks]
        handles += [
            module.register_forward_pre_hook(lambda module, args, n=name: behind.append(n) if len(outputs) == count else None)
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear)
        ]
        try:
            with torch.no_grad():
                output = self._call(feed)
        finally:
            for handle in handles:
                handle.remove()
        if len(outputs) != len(names):
            raise ModelError(f"{type(model).__name__} calls its {len(names)} blocks {len(outputs)} times; they cannot be trained")
        forms = [_empty(output) for output in outputs]
        self.sources = _sources([self._readers(feed, forms, index) for index in range(count)])
        outputs[-1], self.behind = output, tuple(behind)
        self.forms = [*forms[:-1], _empty(output)]
        self._require_chain(feed, [_leaves(output) for output in outputs])

    @property
    def shapes(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """For each block, the shapes of a sample's outputs."""
        return tuple(tuple(tuple(leaf.shape[1:]) for leaf in _leaves(form)) for form in self.forms)

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        device: torch.device = self.model.device
        return device

    def run(self, index: int, feed: Feed, before: Sequence[torch.Tensor]) -> Outputs:
        """See `core.network.Chain`."""
        import torch

        enabled, outputs, values = torch.is_grad_enabled(), [], iter(before)
        forward = self.blocks[index].forward

        def last(*args: Any, **kwargs: Any) -> Any:
            with torch.set_grad_enabled(enabled):
                output = forward(*args, **kwargs)
            outputs.append(_leaves(output))
            if index == len(self.blocks) - 1:
                return output
            raise _Reached

        rows = len(feed[self.inputs[0].name])
        with ExitStack() as stack:
            for place, block in enumerate(self.blocks[:index]):
                leaves = values if place in self.sources[index] else None
                stack.enter_context(computing(block, _constant(_filled(self.forms[place], leaves, rows))))
            stack.enter_context(computing(self.blocks[index], last))
            stack.enter_context(suppress(_Reached))
            stack.enter_context(torch.set_grad_enabled(enabled and index == len(self.blocks) - 1))
            return self.whole(feed)
        return outputs[0]

    def whole(self, feed: Feed) -> Outputs:
        """See `core.network.Chain`."""
        return _leaves(self._call(feed))

    def _call(self, feed: Feed) -> Any:
        """The output of the network, in its own form."""
        return self.model(**tensors_of(self.model, self.inputs, feed), return_dict=False)

    def _readers(self, feed: Feed, forms: Sequence[Any], source: int) -> list[int]:
        """The blocks that read a block's output, perhaps through work that the network does between them.

        All blocks return zeros, and this one NaN: those whose arguments then hold a NaN read it. The last block counts as the
        reader of what the network reads after it.
        """
        import torch

        rows, readers = len(feed[self.inputs[0].name]), []

        def watched(place: int) -> Callable[..., Any]:
            output = _filled(forms[place], None, rows)

            def forward(*args: Any, **kwargs: Any) -> Any:
                if _has_nan((args, tuple(kwargs.values()))):
                    readers.append(place)
                return _map_leaves(lambda leaf: leaf * float("nan"), output) if place == source else output

            return forward

        with ExitStack() as stack:
            for place, block in enumerate(self.blocks):
                stack.enter_context(computing(block, watched(place)))
            stack.enter_context(torch.no_grad())
            output = self._call(feed)
        last = len(self.blocks) - 1
        return [*readers, last] if source < last and _has_nan(output) else readers

    def _require_chain(self, feed: Feed, outputs: Sequence[Outputs]) -> None:
        import torch

        with torch.no_grad():
            for index, sources in enumerate(self.sources):
                second = self.run(index, feed, [leaf for source in sources for leaf in outputs[source]])
                if not all(
                    torch.allclose(one, other, rtol=1e-3, atol=1e-5) for one, other in zip(second, outputs[index], strict=True)
                ):
                    raise ModelError(
                        f"{self.names[index]} of {type(self.model).__name__} reads more than the outputs of blocks before it; "
                        "the network cannot be trained block by block"
                    )


def block_names(linears: Iterable[str], lists: Collection[str]) -> tuple[str, ...]:
    """The modules that stand in one of these lists of the network and hold a linear, in execution order.

    Args:
        linears: names of linears in execution order.
        lists: the last part of the names of the lists. The outermost one counts where they hold each other.
    """
    names = dict.fromkeys(_block_of(name.split("."), lists) for name in linears)
    return tuple(name for name in names if name)


def _block_of(path: Sequence[str], lists: Collection[str]) -> str:
    """The name of the block that holds a module, or an empty one."""
    place = next((place for place, part in enumerate(path[:-1]) if part in lists), None)
    return "" if place is None else ".".join(path[: place + 2])


def _sources(readers: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """For each block the earlier ones that it reads, from the readers of each."""
    return tuple(tuple(i for i in range(index) if index in readers[i]) for index in range(len(readers)))


@contextmanager
def computing(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """A context in which a module computes another function."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


@contextmanager
def linears_computing(model: Any, functions: Mapping[str, Callable[[torch.Tensor], torch.Tensor]]) -> Iterator[None]:
    """A context in which linears compute other functions of their inputs."""
    with ExitStack() as stack:
        for name, function in functions.items():
            stack.enter_context(computing(model.get_submodule(name), function))
        yield


def product_of(module: Any) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """What a linear or a convolution computes of its input, a weight [out, in] and a bias [out]."""
    from torch.nn import Conv2d
    from torch.nn.functional import conv2d, linear

    def convolution(value: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        kernels = weight.unflatten(1, module.weight.shape[1:])
        return conv2d(value, kernels, bias, module.stride, module.padding, module.dilation, module.groups)

    return convolution if isinstance(module, Conv2d) else linear


def _constant(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


def _leaves(output: Any) -> Outputs:
    """The tensors of a block's output: a tensor, or a tuple in which some entries may be None."""
    parts = output if isinstance(output, tuple) else (output,)
    return tuple(part for part in parts if part is not None)


def _has_nan(value: Any) -> bool:
    """Whether a tensor, or one in nested tuples and lists, holds a NaN."""
    if isinstance(value, (tuple, list)):
        return any(map(_has_nan, value))
    return hasattr(value, "isnan") and bool(value.isnan().any())


def _map_leaves(change: Callable[[torch.Tensor], torch.Tensor], form: Any) -> Any:
    """The form with each tensor changed."""
    if isinstance(form, tuple):
        return tuple(_map_leaves(change, part) for part in form)
    return None if form is None else change(form)


def _empty(output: Any) -> Any:
    """The same form with a tensor of one sample of zeros in place of each tensor."""
    return _map_leaves(lambda leaf: leaf[:1] * 0, output)


def _filled(form: Any, values: Iterator[torch.Tensor] | None, rows: int) -> Any:
    """The form with the given tensors; zeros where there are none."""
    if isinstance(form, tuple):
        return tuple(_filled(part, values, rows) for part in form)
    if form is None:
        return None
    return form.expand(rows, *form.shape[1:]) if values is None else next(values)
