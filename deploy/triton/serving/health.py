"""The model `health` asks every other model for an answer. Before 25.12 the server's `ready` says nothing about programs."""

from __future__ import annotations

import json
from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt

PROBES_KEY = "asked"
"""The parameter of config.pbtxt that lists the models to ask, as JSON: [model, output, {input: [type, shape]}] of each."""
ROUNDS = 8
"""Rounds for which answers are kept. The server's library drops them in a thread of its own, without Python's lock; if that were
the last reference to their tensors, it would end this program from Python 3.12 on."""


class TritonPythonModel:
    """Asks each pipeline for a seed, for which nothing is drawn, and each network for one row."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the list of models from config.pbtxt."""
        parameters = json.loads(args["model_config"])["parameters"]
        probes = json.loads(parameters[PROBES_KEY]["string_value"])
        self.probes = [
            (model, output, {name: _smallest(kind, shape) for name, (kind, shape) in inputs.items()})
            for model, output, inputs in probes
        ]
        self.iterators: deque[Any] = deque(maxlen=ROUNDS * len(probes))

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request with `healthy`, or with the error of the first model that does not answer."""
        import triton_python_backend_utils as pb_utils

        answers = []
        for _ in requests:
            failure = self._failure()
            error = pb_utils.TritonError(failure, pb_utils.TritonError.INTERNAL) if failure else None
            healthy = [] if failure else [pb_utils.Tensor("healthy", np.array([True]))]
            answers.append(pb_utils.InferenceResponse(healthy, error=error))
        return answers

    def _failure(self) -> str:
        import triton_python_backend_utils as pb_utils

        for model, output, inputs in self.probes:
            tensors = [pb_utils.Tensor(name, value) for name, value in inputs.items()]
            memory = pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0)
            request = pb_utils.InferenceRequest(
                model_name=model, requested_output_names=[output], inputs=tensors, preferred_memory=memory
            )
            try:
                self.iterators.append(request.exec(decoupled=True))
                errors = [answer.error().message() for answer in self.iterators[-1] if answer.has_error()]
            except pb_utils.TritonModelException as error:
                errors = [str(error)]
            if errors:
                return f"{model}: {errors[0]}"
        return ""


def _smallest(kind: str, shape: list[int]) -> npt.NDArray[Any]:
    """Return empty texts, integer zeros, or float ones: a mask must not be all zeros."""
    if kind == "bytes":
        return np.full(shape, b"", dtype=np.object_)
    return np.full(shape, kind == "float32", dtype=kind)
