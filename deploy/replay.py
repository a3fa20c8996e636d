"""Recorded network calls on disk: written in the form of `polygraphy run`, read within bounds, and compared by polygraphy."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dq_export.core.compare import MAX_SQNR
from dq_export.core.documents import DocumentError, parse_json, read_text, shown, shown_path
from dq_export.core.network import output_name

from .backend import Engine, Feed, Float32

INPUTS, OUTPUTS, COMMAND = "inputs.json", "outputs.json", "command.txt"
LIMIT = 1 << 30
"""The greatest size of a file of recorded calls, in bytes."""
VALUES = 200_000
"""The greatest number of JSON values in such a file; an array counts as one."""
HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '(<[fi][248])', 'fortran_order': False, 'shape': \(([\d, ]*)\), \} *\n", re.DOTALL
)
"""An array as numpy's `save` writes it, version 1.0, without Python objects."""


def save_replay(folder: Path, feeds: Sequence[Feed], references: Sequence[Float32]) -> None:
    """Write `inputs.json` and `outputs.json` as `polygraphy run` loads them."""
    from polygraphy.json import save_json
    from polygraphy.logger import G_LOGGER

    with G_LOGGER.verbosity(G_LOGGER.ERROR):
        save_json([dict(feed) for feed in feeds], str(folder / INPUTS), description="parity inputs")
        _run_results("pytorch", references, output_name(feeds[0])).save(str(folder / OUTPUTS))


def load_replay(folder: Path) -> tuple[list[Feed], list[Float32]]:
    """Read what `save_replay` wrote: inputs and reference outputs of each call.

    Polygraphy's own reader is not used: it decodes whatever type the file names.

    Raises:
        DocumentError: a file is missing, too large or malformed, or has an array that is not a plain one or not finite.
    """
    inputs, outputs = folder / INPUTS, folder / OUTPUTS
    try:
        feeds: list[Feed] = [
            {str(name): _array(value, inputs) for name, value in call.items()} for call in _list(_json(inputs), inputs)
        ]
        ((_, calls),) = _json(outputs)["lst"]
        recorded = [value for call in _list(calls, outputs) for value in call["outputs"].values()]
        references = [_array(value["values"], outputs) for value in recorded]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DocumentError(f"{shown_path(folder)}: {INPUTS} or {OUTPUTS} is damaged; export again") from error
    if len(feeds) != len(references) or not feeds:
        raise DocumentError(f"{shown_path(folder)}: {len(feeds)} recorded inputs and {len(references)} recorded outputs")
    for feed in feeds:
        if feed.get("timestep", np.zeros(0)).size == 0:
            raise DocumentError(f"{shown_path(inputs)}: a call without a timestep")
    return feeds, [np.asarray(reference, dtype=np.float32) for reference in references]


def polygraphy_command(limit: float, model: str, folder: str = "parity") -> str:
    """The command that replays the recorded calls from the output folder, for people and CI. dq-export never reads it back.

    Args:
        limit: the lowest SQNR of a call, dB.
        model: path of the graph, relative to the output folder.
        folder: the folder of the recorded calls.
    """
    return (
        f"polygraphy run {model} --onnxrt --load-inputs {folder}/{INPUTS} --load-outputs {folder}/{OUTPUTS} "
        f"--compare snr --snr-threshold {limit:.2f}"
    )


def replay(engine: Engine, feeds: Sequence[Feed], references: Sequence[Float32], limit: float, *, verbose: bool) -> list[float]:
    """The SQNR of each call in dB, by polygraphy's comparison; -200 for an output that is not finite.

    Args:
        limit: dB, for polygraphy's own messages.
        verbose: whether polygraphy prints messages.

    Raises:
        DocumentError: the engine has other inputs or outputs than the recorded calls.
    """
    from polygraphy.comparator import Comparator, SnrCompareFunc
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    output = output_name(feeds[0])
    with G_LOGGER.verbosity(G_LOGGER.INFO if verbose else G_LOGGER.CRITICAL):
        try:
            results = _run_results("pytorch", references, output)  # the first one is the signal
            results.extend(Comparator.run([engine.runner("engine")], data_loader=[dict(feed) for feed in feeds]))
            (compared,) = Comparator.compare_accuracy(results, compare_func=SnrCompareFunc(snr_threshold={output: limit}))
        except PolygraphyException as error:
            raise DocumentError(f"the recorded calls do not fit the graph ({str(error).splitlines()[0]})") from error
    ((_, calls),) = compared.items()
    compared_calls = [call.get(output) for call in calls]
    if len(compared_calls) != len(feeds) or not all(hasattr(item, "snr") for item in compared_calls):
        raise DocumentError(f"the graph has no output '{output}' of the recorded shape")
    return [-MAX_SQNR if math.isnan(item.snr) else float(np.clip(item.snr, -MAX_SQNR, MAX_SQNR)) for item in compared_calls]


def _run_results(name: str, values: Sequence[Float32], output: str) -> Any:
    from polygraphy.comparator import IterationResult, RunResults

    results = RunResults()
    results.append((name, [IterationResult(outputs={output: value}, runtime=0.0, runner_name=name) for value in values]))
    return results


def _json(path: Path) -> Any:
    text = read_text(path, LIMIT, links=False)
    # Checked before parsing, because each value takes at least 60 bytes of memory. Base64 contains none of these characters.
    if sum(text.count(sign) for sign in "[{,") > VALUES:
        raise DocumentError(f"{shown_path(path)}: more than {VALUES} values")
    return parse_json(text, shown_path(path))


def _list(value: Any, path: Path) -> list[Any]:
    if not isinstance(value, list):
        raise DocumentError(f"{shown_path(path)}: expected a list of calls, found {shown(value)}")
    return value


def _array(value: Mapping[str, Any], path: Path) -> npt.NDArray[Any]:
    """The array of polygraphy's `{"array": base64 of numpy's format}`.

    Raises:
        DocumentError: another format, Python objects, more or fewer bytes than its shape, or NaN or infinity.
        ValueError: not base64.
    """
    content = base64.b64decode(value["array"], validate=True)
    head = HEADER.match(content[:1024])
    if head is None:
        raise DocumentError(f"{shown_path(path)}: an array that is not in numpy's format of plain numbers")
    shape = tuple(int(size) for size in head[2].replace(b" ", b"").split(b",") if size)
    dtype = np.dtype(head[1].decode())
    if math.prod(shape) * dtype.itemsize != len(content) - head.end():
        raise DocumentError(f"{shown_path(path)}: an array of shape {shown(shape)} with {len(content) - head.end()} bytes")
    array: npt.NDArray[Any] = (
        np.frombuffer(content, dtype=dtype, offset=head.end()).reshape(shape).copy()
    )  # PyTorch wants a writable one
    if not np.isfinite(array).all():
        raise DocumentError(f"{shown_path(path)}: an array with NaN or infinity")
    return array
