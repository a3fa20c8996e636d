"""The model `health`: whether the others answer, which the server's own `ready` does not tell of programs before 25.12."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt

PARAMETERS = ("pipelines", "network", "shape")
"""Names of models, parted by commas; that of the denoiser; (C, H, W) of its latents, parted by commas."""


class TritonPythonModel:
    """Asks each pipeline for a seed, which draws nothing, and the denoiser for one row."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the models to ask from config.pbtxt: its `parameters` PARAMETERS."""
        parameters = json.loads(args["model_config"])["parameters"]
        given = {key: value["string_value"] for key, value in parameters.items()}
        zero: npt.NDArray[Any] = np.zeros((1, 1), dtype=np.int64)
        states: npt.NDArray[Any] = np.zeros([1, *map(int, given["shape"].split(","))], dtype=np.float32)
        self.asked = [(name, "seed", {"class_labels": zero}) for name in given["pipelines"].split(",")]
        self.asked += [(given["network"], "sample", {"hidden_states": states, "timestep": zero, "class_labels": zero})]

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
