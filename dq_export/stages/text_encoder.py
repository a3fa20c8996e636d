"""How near a server's quantized text encoders are to PyTorch's."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from dq_export.core.compare import decibels
from dq_export.core.network import Conditions, Feed
from dq_export.core.progress import Advance
from dq_export.deploy.backend import BackendError
from dq_export.deploy.onnxruntime.cpu import open_graph, session_errors
from dq_export.deploy.triton.serving.call import Call
from dq_export.deploy.triton.serving.conditions import PROMPT, Texts, load_tokenizers

from ..families.reference import PromptGraph
from ..report.report import EncoderReport

Rows = Mapping[str, npt.NDArray[np.float32]]


def compare_encoder(graph: PromptGraph, call: Call, conditions: Conditions, progress: Advance) -> EncoderReport:
    """Encode every prompt of an export as its server will, on ONNX Runtime's CPU provider.

    Args:
        conditions: what PyTorch made of the prompts, and of the empty one.
        progress: called with (prompts encoded, all prompts).

    Raises:
        BackendError: ONNX Runtime does not run the graph.
    """
    session, names = open_graph(graph.path).session, list(call.conditions)

    def encode(feed: Feed) -> Feed:
        try:
            return dict(zip(names, session.run(names, dict(feed)), strict=True))
        except session_errors() as error:
            raise BackendError(f"ONNX Runtime cannot run the text encoder: {' '.join(str(error).split())}") from error

    tokenizers = load_tokenizers(graph.path.parent, graph.tokenizers)
    texts = Texts(call, dict.fromkeys(call.conditions.values(), ()), tokenizers, encode, 1)
    exact = [(name, conditions.rows(np.array([index]))) for index, name in enumerate(conditions.names)]
    exact += [("", conditions.null_rows(1))] if conditions.null else []
    distances = []
    for done, (prompt, rows) in enumerate(exact, 1):
        rounded = texts.read({PROMPT: np.array([[prompt.encode()]], dtype=np.object_)}).rows(False)
        distances.append((distance(rows, rounded), prompt))
        progress(done, len(exact), "prompts")
    worst, prompt = min(distances)
    return EncoderReport(float_bytes=graph.float_bytes, stored_bytes=graph.stored_bytes, sqnr=worst, prompt=prompt)


def distance(exact: Rows, rounded: Rows) -> float:
    """SQNR in dB of the farthest of a prompt's conditions, [1, ...] each; tokens that a mask hides do not count."""
    masks = [rows for name, rows in exact.items() if name.endswith("_mask")]
    values = []
    for name, rows in exact.items():
        mask_of_rows = next((mask for mask in masks if rows.shape[: mask.ndim] == mask.shape and rows.ndim > mask.ndim), None)
        weight = 1.0 if mask_of_rows is None else np.expand_dims(mask_of_rows, tuple(range(mask_of_rows.ndim, rows.ndim)))
        signal, noise = (np.square(value * weight, dtype=np.float64).sum() for value in (rows, rows - rounded[name]))
        values.append(float(decibels(signal, noise)))
    return min(values)
