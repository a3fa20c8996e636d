"""The models `pipeline` and `pipeline_stream` of Triton's python backend: whole pictures from class labels or prompts."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .call import Call, CallError
from .conditions import BadRequestError, Conditions, Feed, Labels, Texts, load_tokenizers
from .request import Limits, UInt64, seeds_of
from .sampler import AbandonedError, BusyError, DenoiserError, Sampler
from .schedules import FILE, Float32, Float64, Schedules

PARAMETERS = (
    "denoiser", "decoder", "text_encoder", "classes", "max_rows", "max_requests", "denoiser_calls", "num_inference_steps",
    "guidance_scale", "scheduler", "schedulers",
)  # fmt: skip
"""The keys of `parameters` in config.pbtxt; all are needed."""
Paint = Callable[[Float32], npt.NDArray[np.uint8]]
EMPTY = f". Servers of 24.10 and before give out empty tensors under numpy {np.__version__}: install 'numpy<2' for their python3"


class TritonPythonModel:
    """What the server calls. One sampler serves all requests of an instance."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read config.pbtxt, the tables and, for prompts, the tokenizers.

        Raises:
            TritonModelException: a parameter is missing or of another kind, or a file is damaged.
        """
        import triton_python_backend_utils as pb_utils

        config = json.loads(args["model_config"])
        folder = Path(args["model_repository"]) / args["model_version"]
        try:
            self.call = Call.load(folder)
            given = {key: value["string_value"] for key, value in config["parameters"].items()}
            shape = next(output["dims"] for output in config["output"] if output["name"] == "latents")
            self.limits = Limits(
                shape=tuple(int(size) for size in shape),  # type: ignore[arg-type]
                max_rows=int(given["max_rows"]),
                num_inference_steps=int(given["num_inference_steps"]),
                guidance_scale=float(given["guidance_scale"]),
                scheduler=given["scheduler"],
            )
            most_jobs, lanes = (int(given[key]) for key in ("max_requests", "denoiser_calls"))
            self.text_encoder = given["text_encoder"]
            self.conditions = self._conditions(config, int(given["classes"]), folder)
        except CallError as error:
            raise pb_utils.TritonModelException(f"network.json of {args['model_name']}: {error}") from error
        except (KeyError, ValueError) as error:
            raise pb_utils.TritonModelException(f"config.pbtxt of {args['model_name']}: parameters: {error!r}") from error
        self.schedules = Schedules.load(folder / FILE, given["schedulers"].split(","))
        self.decoupled = pb_utils.using_decoupled_model_transaction_policy(config)
        self.shows = any(output["name"] == "images" for output in config["output"])
        self.denoiser, self.decoder = given["denoiser"], given["decoder"]
        self.answers = ThreadPoolExecutor(1)  # in order, and beside the sampling: a picture may take long to decode
        self.sampler = Sampler(self._denoise, most_rows=self.limits.max_rows, most_jobs=most_jobs, lanes=lanes)
        pb_utils.Logger.log_info(f"{args['model_name']}: numpy {np.__version__}, calls of up to {self.limits.max_rows} rows")

    def execute(self, requests: list[Any]) -> None:
        """Hand the requests to the sampler; responses are sent when there are any, in both transaction policies.

        A request for `seed` alone is checked and answered at once, and nothing is drawn: so `health` asks whether we live.
        """
        for request in requests:
            shown = self.shows and "images" in request.requested_output_names()
            images = (self._decode if self.decoder else images_of) if shown else None
            sender, slow = request.get_response_sender(), shown and bool(self.decoder)
            caller = Caller(sender, images=images, streams=self.decoupled, answers=self.answers, slow=slow)
            try:
                inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
                wanted = self.conditions.read(inputs)
                caller.seeds = seeds_of(inputs, wanted.count)
                job = self.limits.job(inputs, wanted, self.schedules, caller.seeds, caller)
                if set(request.requested_output_names()) == {"seed"}:
                    caller.checked()
                else:
                    self.sampler.submit(job)
            except (BadRequestError, BusyError) as error:
                caller.failed(error)

    def finalize(self) -> None:
        """Tell those who wait, and end."""
        self.sampler.close()
        self.answers.shutdown()

    def _conditions(self, config: dict[str, Any], classes: int, folder: Path) -> Conditions:
        import triton_python_backend_utils as pb_utils

        images = int(config["max_batch_size"])
        if not self.call.tokenizers:
            return Labels(next(iter(self.call.conditions)), classes, images)
        dims = {item["name"]: tuple(int(size) for size in item["dims"]) for item in config["input"]}
        shapes = {name: dims[name] for name in self.call.conditions.values()}
        try:
            tokenizers = load_tokenizers(folder, self.call.tokenizers)
        except ModuleNotFoundError as error:
            told = f"{error}: prompts need it in the server's python3: pip install tokenizers"
            raise pb_utils.TritonModelException(told) from error
        except Exception as error:  # tokenizers raises Exception itself
            raise pb_utils.TritonModelException(f"{', '.join(self.call.tokenizers)}: {error}") from error
        return Texts(self.call, shapes, tokenizers, self._encode, images)

    def _denoise(self, states: Float32, timesteps: Float64, conditions: Feed) -> Float32:
        feed: dict[str, npt.NDArray[Any]] = {self.call.state: states, "timestep": timesteps.astype(self.call.timestep)[:, None]}
        # A number a sample is a column to the server.
        feed |= {name: rows[:, None] if rows.ndim == 1 else rows for name, rows in conditions.items()}
        (sample,) = _call(self.denoiser, feed, [self.call.output])
        if len(sample) != len(states):
            raise DenoiserError(f"{self.denoiser}: {len(sample)} rows came back of {len(states)}")
        return sample

    def _encode(self, tokens: Feed) -> Feed:
        names = list(self.call.conditions)
        return dict(zip(names, _call(self.text_encoder, tokens, names), strict=True))

    def _decode(self, latents: Float32) -> npt.NDArray[np.uint8]:
        pictures = [_call(self.decoder, {"latents": latents[i : i + 1]}, ["sample"])[0] for i in range(len(latents))]
        return images_of(np.concatenate(pictures))


class Caller:
    """One request's way back. See `Client`.

    Args:
        images: makes uint8[n, H, W, C] of latents; None where the request does not want any.
        streams: whether several responses may be sent.
        answers: the thread that sends them, in order.
        slow: whether `images` may hold that thread for long.
    """

    def __init__(self, sender: Any, *, images: Paint | None, streams: bool, answers: Executor, slow: bool) -> None:
        self.sender, self.images, self.streams, self.answers, self.slow = sender, images, streams, answers, slow
        self.seeds: UInt64 = np.zeros((0, 1), dtype=np.uint64)
        self.ended, self.behind = False, False

    def checked(self) -> None:
        """Answer a request whose seeds alone are asked for."""
        self._respond({"seed": self.seeds}, last=True)

    def preview(self, step: int, latents: Float32) -> None:
        """See `Client`. Left out while the one before is still being decoded: others' pictures wait for the same thread."""
        if not (self.slow and self.behind):
            self.behind = True
            self._later(self._send, latents, step)

    def done(self, latents: Float32) -> None:
        """See `Client`. A stream's last response bears step 0: there is no other after it."""
        self._later(self._send, latents, 0)

    def failed(self, error: Exception) -> None:
        """See `Client`."""
        self._later(self._refuse, error)

    def gone(self) -> bool:
        """See `Client`. Also after an answer that ended it: a picture that could not be decoded."""
        return self.ended or bool(self.sender.is_cancelled())

    def _later(self, work: Callable[..., None], *arguments: Any) -> None:
        self.answers.submit(work, *arguments).add_done_callback(_report)

    def _send(self, latents: Float32, step: int) -> None:

        if self.ended:
            return
        found: dict[str, npt.NDArray[Any]] = {"latents": latents, "seed": self.seeds}
        try:
            if self.images:
                found["images"] = self.images(latents)
        except DenoiserError as error:
            self._refuse(error)
            return
        if self.streams:
            found["step"] = np.full((len(latents), 1), step, dtype=np.int32)
        self.behind = False
        self._respond(found, last=step == 0)

    def _respond(self, found: dict[str, npt.NDArray[Any]], *, last: bool) -> None:
        import triton_python_backend_utils as pb_utils

        response = pb_utils.InferenceResponse([pb_utils.Tensor(name, value) for name, value in found.items()])
        self.ended = last
        self.sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if last else 0)

    def _refuse(self, error: Exception) -> None:
        """Send an error; its kind becomes Triton's code, which is http's and grpc's status."""
        import triton_python_backend_utils as pb_utils

        if self.ended:
            return
        codes = {
            BadRequestError: pb_utils.TritonError.INVALID_ARG,
            BusyError: pb_utils.TritonError.UNAVAILABLE,
            AbandonedError: pb_utils.TritonError.CANCELLED,
        }
        code = codes.get(type(error), pb_utils.TritonError.INTERNAL)
        response = pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), code))
        self.ended = True
        self.sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _report(answer: Future[None]) -> None:
    """Into the server's log: an answer that could not be sent, as to a client that is gone."""
    import triton_python_backend_utils as pb_utils

    if answer.exception():
        pb_utils.Logger.log_warn(f"an answer was not sent: {answer.exception()!r}")


def images_of(pictures: Float32) -> npt.NDArray[np.uint8]:
    """float32[n, C, H, W] in [-1, 1] -> uint8[n, H, W, C], what lies outside clipped."""
    scaled = np.clip(np.rint(pictures * np.float32(127.5) + np.float32(127.5)), 0, 255)
    return np.ascontiguousarray(scaled.astype(np.uint8).transpose(0, 2, 3, 1))


def _call(model: str, feed: Feed, outputs: list[str]) -> list[Float32]:
    """Outputs of another model on this server, in the order of their names.

    Raises:
        DenoiserError: it fails, or is not there.
    """
    import triton_python_backend_utils as pb_utils

    request = pb_utils.InferenceRequest(
        model_name=model,
        requested_output_names=outputs,
        inputs=[pb_utils.Tensor(name, value) for name, value in feed.items()],
        preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
    )
    try:
        response = request.exec()
    except pb_utils.TritonModelException as error:
        raise DenoiserError(f"{model}: {error}") from error
    if response.has_error():
        told = response.error().message()
        hint = EMPTY if told.endswith("got 0") and not np.__version__.startswith("1.") else ""
        raise DenoiserError(f"{model}: {told}{hint}")
    return [np.array(pb_utils.get_output_tensor_by_name(response, name).as_numpy()) for name in outputs]
