"""The blocks of a torch network, run one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

from dq_export.core.network import Feed, Input

from .reference import ModelError
from .torch_call import tensors_of

if TYPE_CHECKING:
    import torch

Outputs = tuple["torch.Tensor", ...]


class _Reached(Exception):
    """Ends a network call after the requested block."""


class TorchChain:
    """The blocks of a network one by one; see `core.network.Chain`.

    A call of one block is a call of the whole network in which earlier blocks do not compute: the preceding block returns
    the caller's values. So the network itself does the work between its blocks.

    Args:
        names: the blocks in execution order.
        feed: an example of a call, which gives the sizes of the blocks' outputs.

    Raises:
        ModelError: a block reads other values than the outputs of the preceding block and values that all blocks share.
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
                output = model(**tensors_of(model, inputs, feed), return_dict=False)
        finally:
            for handle in handles:
                handle.remove()
        if len(outputs) != len(names):
            raise ModelError(f"{type(model).__name__} calls its {len(names)} blocks {len(outputs)} times; they cannot be trained")
        outputs[-1], self.behind = output, tuple(behind)
        self.forms = [_empty(output) for output in outputs]
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

        enabled, outputs = torch.is_grad_enabled(), []
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
                values = iter(before) if place == index - 1 else None
                stack.enter_context(computing(block, _constant(_filled(self.forms[place], values, rows))))
            stack.enter_context(computing(self.blocks[index], last))
            stack.enter_context(suppress(_Reached))
            stack.enter_context(torch.set_grad_enabled(enabled and index == len(self.blocks) - 1))
            return _leaves(self.model(**tensors_of(self.model, self.inputs, feed), return_dict=False))
        return outputs[0]

    def whole(self, feed: Feed) -> Outputs:
        """See `core.network.Chain`."""
        return _leaves(self.model(**tensors_of(self.model, self.inputs, feed), return_dict=False))

    def _require_chain(self, feed: Feed, outputs: Sequence[Outputs]) -> None:
        import torch

        with torch.no_grad():
            for index in range(len(self.blocks)):
                second = self.run(index, feed, outputs[index - 1] if index else ())
                if not all(
                    torch.allclose(one, other, rtol=1e-3, atol=1e-5) for one, other in zip(second, outputs[index], strict=True)
                ):
                    raise ModelError(
                        f"{self.names[index]} of {type(self.model).__name__} reads more than the output of the block before it; "
                        "the network cannot be trained block by block"
                    )


def block_names(model: Any, linears: Iterable[str]) -> tuple[str, ...]:
    """The modules that stand in a list at the top of the network and hold a linear, in execution order."""
    import torch

    lists = [name for name, module in model.named_children() if isinstance(module, torch.nn.ModuleList)]
    parts = (name.split(".") for name in linears)
    return tuple(dict.fromkeys(".".join(part[:2]) for part in parts if part[0] in lists))


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


def _constant(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


def _leaves(output: Any) -> Outputs:
    """The tensors of a block's output: a tensor, or a tuple in which some entries may be None."""
    parts = output if isinstance(output, tuple) else (output,)
    return tuple(part for part in parts if part is not None)


def _empty(output: Any) -> Any:
    """The same form with a tensor of one sample of zeros in place of each tensor."""
    if isinstance(output, tuple):
        return tuple(map(_empty, output))
    return None if output is None else output[:1] * 0


def _filled(form: Any, values: Iterator[torch.Tensor] | None, rows: int) -> Any:
    """The form with the given tensors; zeros where there are none."""
    if isinstance(form, tuple):
        return tuple(_filled(part, values, rows) for part in form)
    if form is None:
        return None
    return form.expand(rows, *form.shape[1:]) if values is None else next(values)
