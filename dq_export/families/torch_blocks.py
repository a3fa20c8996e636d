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
    """Ends a network call behind the block that was wanted."""


class TorchChain:
    """The blocks of a network one by one; see `core.network.Chain`.

    A call of one block is a call of the whole network in which earlier blocks do not compute: the one before puts out what
    the caller gives it. So what a network does between its blocks is done by the network itself.

    Args:
        names: of the blocks in execution order.
        feed: an example of a call, for the sizes of what blocks put out.

    Raises:
        ModelError: a block reads more than what the one before puts out and what all blocks share.
    """

    def __init__(self, model: Any, inputs: Sequence[Input], names: Sequence[str], feed: Feed) -> None:
        import torch

        self.model, self.inputs, self.names = model, inputs, tuple(names)
        self.blocks = [model.get_submodule(name) for name in names]
        model.requires_grad_(False)  # what is trained stands in the place of the network's own
        seen, behind = list[Any](), list[str]()
        handles = [block.register_forward_hook(lambda module, args, output: seen.append(output)) for block in self.blocks]
        handles += [
            module.register_forward_pre_hook(lambda module, args, n=name: behind.append(n) if len(seen) == len(names) else None)
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear)
        ]
        try:
            with torch.no_grad():
                output = model(**tensors_of(model, inputs, feed), return_dict=False)
        finally:
            for handle in handles:
                handle.remove()
        if len(seen) != len(names):
            raise ModelError(f"{type(model).__name__} calls its {len(names)} blocks {len(seen)} times; they cannot be trained")
        seen[-1], self.behind = output, tuple(behind)
        self.forms = [_empty(output) for output in seen]
        self._require_chain(feed, [_leaves(output) for output in seen])

    @property
    def shapes(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """By block, the shapes of a sample's outputs."""
        return tuple(tuple(tuple(leaf.shape[1:]) for leaf in _leaves(form)) for form in self.forms)

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        device: torch.device = self.model.device
        return device

    def run(self, index: int, feed: Feed, before: Sequence[torch.Tensor]) -> Outputs:
        """See `core.network.Chain`."""
        import torch

        enabled, found = torch.is_grad_enabled(), []
        kept = self.blocks[index].forward

        def last(*args: Any, **kwargs: Any) -> Any:
            with torch.set_grad_enabled(enabled):
                output = kept(*args, **kwargs)
            found.append(_leaves(output))
            if index == len(self.blocks) - 1:
                return output
            raise _Reached

        rows = len(feed[self.inputs[0].name])
        with ExitStack() as stack:
            for place, block in enumerate(self.blocks[:index]):
                given = iter(before) if place == index - 1 else None
                stack.enter_context(computing(block, _constant(_filled(self.forms[place], given, rows))))
            stack.enter_context(computing(self.blocks[index], last))
            stack.enter_context(suppress(_Reached))
            stack.enter_context(torch.set_grad_enabled(enabled and index == len(self.blocks) - 1))
            return _leaves(self.model(**tensors_of(self.model, self.inputs, feed), return_dict=False))
        return found[0]

    def whole(self, feed: Feed) -> Outputs:
        """See `core.network.Chain`."""
        return _leaves(self.model(**tensors_of(self.model, self.inputs, feed), return_dict=False))

    def _require_chain(self, feed: Feed, outputs: Sequence[Outputs]) -> None:
        import torch

        with torch.no_grad():
            for index in range(len(self.blocks)):
                again = self.run(index, feed, outputs[index - 1] if index else ())
                if not all(
                    torch.allclose(one, other, rtol=1e-3, atol=1e-5) for one, other in zip(again, outputs[index], strict=True)
                ):
                    raise ModelError(
                        f"{self.names[index]} of {type(self.model).__name__} reads more than what the block before it puts out; "
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
    """While active a module computes something else."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


@contextmanager
def linears_computing(model: Any, functions: Mapping[str, Callable[[torch.Tensor], torch.Tensor]]) -> Iterator[None]:
    """While active, linears compute something else of their input."""
    with ExitStack() as stack:
        for name, function in functions.items():
            stack.enter_context(computing(model.get_submodule(name), function))
        yield


def _constant(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


def _leaves(output: Any) -> Outputs:
    """The tensors of what a block puts out: one, or a tuple in which some may be None."""
    parts = output if isinstance(output, tuple) else (output,)
    return tuple(part for part in parts if part is not None)


def _empty(output: Any) -> Any:
    """The same form with a tensor of one sample of zeros in place of each tensor."""
    if isinstance(output, tuple):
        return tuple(map(_empty, output))
    return None if output is None else output[:1] * 0


def _filled(form: Any, given: Iterator[torch.Tensor] | None, rows: int) -> Any:
    """The form with the given tensors; zeros where there are none."""
    if isinstance(form, tuple):
        return tuple(_filled(part, given, rows) for part in form)
    if form is None:
        return None
    return form.expand(rows, *form.shape[1:]) if given is None else next(given)
