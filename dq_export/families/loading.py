"""Create a diffusers network from its configuration and its files of weights, in float32, mapped from the files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dq_export.core.documents import DocumentError, printable, read_json, shown, shown_path

from .config_values import Values, refused, require_values
from .reference import ModelError
from .tensors import read_tensors
from .weights import Weights
from .widened import widened

COUNTER = ".num_batches_tracked"
"""A batch norm's count of training steps, an integer that evaluation does not read."""


def read_config(path: Path, *, finite: bool = True) -> dict[str, Any]:
    """The JSON object in a configuration file.

    Args:
        finite: refuse NaN and infinities.

    Raises:
        ModelError: not regular, too large, or no JSON object.
    """
    try:
        config = read_json(path, finite=finite)
    except DocumentError as error:
        raise ModelError(str(error)) from error
    if not isinstance(config, dict):
        raise ModelError(f"{shown_path(path)}: expected a JSON object, found {type(config).__name__}")
    return config


def load_weights(model: Any, weights: Weights, place: Path | None = None, rename: Callable[[str], str] = str) -> Any:
    """The network of `make_empty` in evaluation mode, with the parameters of the files.

    Args:
        place: the folder for float32 copies of other weights, see `widened`.
        rename: maps the name of a tensor in a file to today's name.

    Raises:
        ModelError: a file is damaged, the files do not fit the network, or there is no room for float32.
    """
    state = _state(weights, place, rename)
    expected = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(COUNTER)}
    require_same(expected, state, shown_path(weights.files[0].parent))
    model.load_state_dict(state, assign=True, strict=False)  # counters alone are missing
    return model.eval()


def make_empty(architecture: Any, values: type[Values], path: Path, config: Mapping[str, Any]) -> Any:
    """The network without memory for its parameters. Buffers that must be computed, such as position embeddings, are real.

    Args:
        architecture: the class, under its present name.
        values: the possible values of the configuration.
        path: of the configuration, for messages.

    Raises:
        ModelError: the configuration does not describe such a network.
    """
    import torch
    from accelerate import init_empty_weights

    require_values(architecture, values, config, path)
    if config.get("quantization_config"):
        raise ModelError(
            f"{shown_path(path)}: these weights are quantized already (quantization_config); a float checkpoint is needed"
        )
    makes_none = f"{shown_path(path)}: makes no {architecture.__name__}"
    empty = torch.device("meta") if values.buffers_stored else init_empty_weights()
    with refused(makes_none, "a value is missing or wrong"), silent(), empty:
        return architecture.from_config(dict(config))


def _state(weights: Weights, place: Path | None, rename: Callable[[str], str]) -> dict[str, Any]:
    """float32 tensors by name, of all files."""
    import torch

    state: dict[str, Any] = {}
    for file in weights.files:
        for name, tensor in read_tensors(file).items():
            if name.endswith(COUNTER):
                continue
            if rename(name) in state:
                raise ModelError(f"{shown_path(file)}: tensor {shown(name)} stands twice in the checkpoint")
            if not tensor.is_floating_point():
                kind = str(tensor.dtype).removeprefix("torch.")
                raise ModelError(f"{shown_path(file)}: tensor {shown(name)} is {kind}; expected weights in floating point")
            state[rename(name)] = tensor
    if all(tensor.dtype == torch.float32 for tensor in state.values()):
        return {name: tensor.contiguous() for name, tensor in state.items()}
    return widened(state, place)  # those in float32, too: one alone would keep its whole file mapped


def require_same(expected: Mapping[str, Any], state: Mapping[str, Any], place: str) -> None:
    """Check that both have the same names and shapes.

    Args:
        expected: the tensors of a network; `state`: those of its files.
        place: the folder, for messages.

    Raises:
        ModelError: they differ; the message names the first three differences.
    """
    problems = []
    for names, text in (
        (expected.keys() - state.keys(), "the weights lack {} of the network's tensors ({})"),
        (state.keys() - expected.keys(), "the weights hold {} tensors that the network does not have ({})"),
    ):
        if names:
            first = ", ".join(printable(name, 80) for name in sorted(names)[:3]) + (" …" if len(names) > 3 else "")
            problems.append(text.format(len(names), first))
    for name in expected.keys() & state.keys():
        shape, present = tuple(expected[name].shape), tuple(state[name].shape)
        if shape != present:
            problems.append(f"{printable(name, 80)} has shape {shown(present)} in the weights and {shown(shape)} in the network")
    if problems:
        raise ModelError(f"{place}: config.json and weights do not fit each other: {'; '.join(sorted(problems)[:3])}")


@contextmanager
def silent() -> Iterator[None]:
    """A context without diffusers' warnings about keys of old configurations that today's classes do not take."""
    from diffusers.utils import logging

    with silenced(logging):
        yield


@contextmanager
def silenced(logging: Any) -> Iterator[None]:
    """A context without the warnings of a library. `logging`: its module of that name, diffusers' or transformers'."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
