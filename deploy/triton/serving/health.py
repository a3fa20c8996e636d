"""The model `health`: whether the others answer, which the server's own `ready` does not tell of programs before 25.12."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt

ASKED = "asked"
"""The parameter of config.pbtxt with the models to ask, JSON: [model, output, {input: [type, shape]}] of each."""


class TritonPythonModel:
    """Asks each pipeline for a seed, which draws nothing, and each network for one row."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the models to ask from config.pbtxt: its parameter `asked`."""
        parameters = json.loads(args["model_config"])["parameters"]
        asked = json.loads(parameters[ASKED]["string_value"])
        self.asked = [
            (model, output, {name: _nothing(kind, shape) for name, (kind, shape) in inputs.items()})
            for model, output, inputs in asked
        ]

    def execute(self, requests: list[Any]) -> list[Any]:
        """Each request's `healthy`, or the error of the first model that does not answer."""
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

        for model, output, inputs in self.asked:
            tensors = [pb_utils.Tensor(name, value) for name, value in inputs.items()]
            memory = pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0)
            request = pb_utils.InferenceRequest(
                model_name=model, requested_output_names=[output], inputs=tensors, preferred_memory=memory
            )
            try:
                errors = [answer.error().message() for answer in request.exec(decoupled=True) if answer.has_error()]
            except pb_utils.TritonModelException as error:
                errors = [str(error)]
            if errors:
                return f"{model}: {errors[0]}"
        return ""


def _nothing(kind: str, shape: list[int]) -> npt.NDArray[Any]:
    """Empty texts, zeros as integers, and ones as numbers: a mask of zeros alone is no mask."""
    if kind == "bytes":
        return np.full(shape, b"", dtype=np.object_)
    return np.full(shape, kind == "float32", dtype=kind)
