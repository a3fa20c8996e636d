"""Stands in for Triton's onnxruntime backend, whose library no package holds: the same repository runs unchanged.

Triton gives a folder `backends/<name>` with a model.py to its python backend for every model of that backend. Server,
config.pbtxt, batching, warm-up and calls between models are then the real ones; the backend's own checks are not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """One ONNX model, run by ONNX Runtime's CPU provider."""

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        folder = Path(args["model_repository"]) / args["model_version"]
        options = ort.SessionOptions()
        options.log_severity_level = 3
        threads = config["parameters"].get("intra_op_thread_count")
        if threads:
            options.intra_op_num_threads = int(threads["string_value"])
        self.session = ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
        inputs = {item["name"]: item for item in config["input"]}
        for kind, expected, present in (
            ("input", inputs, self.session.get_inputs()),
            ("output", {item["name"] for item in config["output"]}, self.session.get_outputs()),
        ):
            names = {item.name for item in present}
            if names != set(expected):
                allowed = sorted(names)
                raise pb_utils.TritonModelException(f"unexpected inference {kind}s {sorted(expected)}, allowed are {allowed}")
        self.outputs = [item["name"] for item in config["output"]]
        self.flat = {name for name, item in inputs.items() if item.get("reshape", {}).get("shape") == []}

    def execute(self, requests: list[Any]) -> list[Any]:
        feeds = [{tensor.name(): tensor.as_numpy() for tensor in request.inputs()} for request in requests]
        whole = {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}
        whole = {name: value.reshape(len(value)) if name in self.flat else value for name, value in whole.items()}
        try:
            actual = self.session.run(self.outputs, whole)
        except Exception as error:  # noqa: BLE001 - as the real one does: every request of the batch fails with the library's message
            return [pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error))) for _ in requests]
        ends = np.cumsum([len(next(iter(feed.values()))) for feed in feeds])[:-1]
        split = [np.split(value, ends) for value in actual]
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor(name, part) for name, part in zip(self.outputs, parts, strict=True)])
            for parts in zip(*split, strict=True)
        ]
