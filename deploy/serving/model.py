"""The models `pipeline` and `pipeline_stream` of Triton's python backend: whole pictures from class labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .request import BadRequestError, Limits, seed_of
from .sampler import AbandonedError, BusyError, DenoiserError, Sampler
from .schedules import FILE, Float32, Schedules

PARAMETERS = (
    "denoiser", "classes", "max_images", "max_rows", "max_requests", "denoiser_calls",
    "num_inference_steps", "guidance_scale", "scheduler", "schedulers",
)  # fmt: skip
"""The keys of `parameters` in config.pbtxt; all are needed."""
EMPTY = f". Servers of 24.10 and before give out empty tensors under numpy {np.__version__}: install 'numpy<2' for their python3"


class TritonPythonModel:
    """What the server calls. One sampler serves all requests of an instance."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read config.pbtxt and the tables.

        Raises:
            TritonModelException: a parameter is missing or of another kind.
        """
        import triton_python_backend_utils as pb_utils

        config = json.loads(args["model_config"])
        try:
            given = {key: value["string_value"] for key, value in config["parameters"].items()}
            shape = next(output["dims"] for output in config["output"] if output["name"] == "latents")
            self.limits = Limits(
                shape=tuple(int(size) for size in shape[1:]),  # type: ignore[arg-type]
                classes=int(given["classes"]),
                max_images=int(given["max_images"]),
                num_inference_steps=int(given["num_inference_steps"]),
                guidance_scale=float(given["guidance_scale"]),
                scheduler=given["scheduler"],
            )
            most_rows, most_jobs, lanes = (int(given[key]) for key in ("max_rows", "max_requests", "denoiser_calls"))
        except (KeyError, ValueError) as error:
            raise pb_utils.TritonModelException(f"config.pbtxt of {args['model_name']}: parameters: {error!r}") from error
        folder = Path(args["model_repository"]) / args["model_version"]
        self.schedules = Schedules.load(folder / FILE, given["schedulers"].split(","))
        self.decoupled = pb_utils.using_decoupled_model_transaction_policy(config)
        self.shows = any(output["name"] == "images" for output in config["output"])
        self.denoiser = given["denoiser"]
        self.sampler = Sampler(self._denoise, most_rows=most_rows, most_jobs=most_jobs, lanes=lanes)
        pb_utils.Logger.log_info(f"{args['model_name']}: numpy {np.__version__}, calls of up to {most_rows} rows")

    def execute(self, requests: list[Any]) -> None:
        """Hand the requests to the sampler; responses are sent when there are any, in both transaction policies."""
        for request in requests:
            caller = Caller(request.get_response_sender(), shows=self.shows, streams=self.decoupled)
            try:
                inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
                caller.seed = seed_of(inputs)
                self.sampler.submit(self.limits.job(inputs, self.schedules, caller.seed, caller))
            except (BadRequestError, BusyError) as error:
                caller.failed(error)

    def finalize(self) -> None:
        """Tell those who wait, and end."""
        self.sampler.close()

    def _denoise(self, states: Float32, timestep: npt.NDArray[np.int64], labels: npt.NDArray[np.int64]) -> Float32:
        import triton_python_backend_utils as pb_utils

        feed = {"hidden_states": states, "timestep": timestep[:, None], "class_labels": labels[:, None]}
        request = pb_utils.InferenceRequest(
            model_name=self.denoiser,
            requested_output_names=["sample"],
            inputs=[pb_utils.Tensor(name, value) for name, value in feed.items()],
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        )
        try:
            response = request.exec()
        except pb_utils.TritonModelException as error:
            raise DenoiserError(f"{self.denoiser}: {error}") from error
        if response.has_error():
            told = response.error().message()
            hint = EMPTY if told.endswith("got 0") and not np.__version__.startswith("1.") else ""
            raise DenoiserError(f"{self.denoiser}: {told}{hint}")
        sample: Float32 = np.array(pb_utils.get_output_tensor_by_name(response, "sample").as_numpy())
        if len(sample) != len(states):
            raise DenoiserError(f"{self.denoiser}: {len(sample)} rows came back of {len(states)}")
        return sample


class Caller:
    """One request's way back. See `Client`.

    Args:
        shows: whether latents are pictures, which are sent as bytes, too.
        streams: whether several responses may be sent.
    """

    def __init__(self, sender: Any, *, shows: bool, streams: bool) -> None:
        self.sender, self.shows, self.streams = sender, shows, streams
        self.seed = 0

    def preview(self, step: int, latents: Float32) -> None:
        """See `Client`."""
        self._send(latents, step, last=False)

    def done(self, latents: Float32) -> None:
        """See `Client`. A stream's last response bears step 0: there is no other after it."""
        self._send(latents, 0, last=True)

    def failed(self, error: Exception) -> None:
        """See `Client`. The error's kind becomes Triton's code, which is http's and grpc's status."""
        import triton_python_backend_utils as pb_utils

        codes = {
            BadRequestError: pb_utils.TritonError.INVALID_ARG,
            BusyError: pb_utils.TritonError.UNAVAILABLE,
            AbandonedError: pb_utils.TritonError.CANCELLED,
        }
        code = codes.get(type(error), pb_utils.TritonError.INTERNAL)
        response = pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), code))
        self.sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def gone(self) -> bool:
        """See `Client`."""
        return bool(self.sender.is_cancelled())

    def _send(self, latents: Float32, step: int, *, last: bool) -> None:
        import triton_python_backend_utils as pb_utils

        found: dict[str, npt.NDArray[Any]] = {"latents": latents, "seed": np.array([self.seed], dtype=np.uint64)}
        if self.shows:
            found["images"] = images_of(latents)
        if self.streams:
            found["step"] = np.array([step], dtype=np.int32)
        response = pb_utils.InferenceResponse([pb_utils.Tensor(name, value) for name, value in found.items()])
        self.sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if last else 0)


def images_of(latents: Float32) -> npt.NDArray[np.uint8]:
    """float32[n, C, H, W] in [-1, 1] -> uint8[n, H, W, C], what lies outside clipped."""
    scaled = np.clip(np.rint(latents * np.float32(127.5) + np.float32(127.5)), 0, 255)
    return np.ascontiguousarray(scaled.astype(np.uint8).transpose(0, 2, 3, 1))
