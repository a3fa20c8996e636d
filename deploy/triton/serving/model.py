"""The models `pipeline` and `pipeline_stream`, for Triton's python backend: pictures of class labels or prompts."""

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
from .job import DenoiserError
from .positions import picture_positions, text_positions
from .request import Limits, UInt64, seeds_of
from .sampler import AbandonedError, BusyError, Sampler
from .schedules import FILE, Float32, Float64, Schedules
from .sizes import PARAMETERS as SIZES
from .sizes import Sizes

PARAMETERS = (
    "denoiser", "decoder", "text_encoder", "classes", "max_rows", "max_requests", "denoiser_calls", "num_inference_steps",
    "guidance_scale", "scheduler", "schedulers", *SIZES,
)  # fmt: skip
"""The keys of `parameters` in config.pbtxt; all are required."""
Paint = Callable[[Float32], npt.NDArray[np.uint8]]
EMPTY = f". Servers up to 24.10 return empty tensors under numpy {np.__version__}: install 'numpy<2' for their python3"


class TritonPythonModel:
    """The class that the server loads. One sampler serves all requests of an instance."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read config.pbtxt, the tables and, for prompts, the tokenizers.

        Raises:
            TritonModelException: a parameter is missing or has another type, or a file is damaged.
        """
        import triton_python_backend_utils as pb_utils

        config = json.loads(args["model_config"])
        folder = Path(args["model_repository"]) / args["model_version"]
        try:
            self.call = Call.load(folder)
            values = {key: value["string_value"] for key, value in config["parameters"].items()}
            shape = next(item["dims"] for item in config["input"] if item["name"] == "latents")
            self.limits = Limits(
                shape=tuple(int(size) for size in shape),  # type: ignore[arg-type]
                sizes=Sizes.of(values),
                call=self.call,
                max_rows=int(values["max_rows"]),
                num_inference_steps=int(values["num_inference_steps"]),
                guidance_scale=float(values["guidance_scale"]),
                scheduler=values["scheduler"],
            )
            max_jobs, lanes = (int(values[key]) for key in ("max_requests", "denoiser_calls"))
            self.text_encoder = values["text_encoder"]
            self.conditions = self._conditions(config, int(values["classes"]), folder)
        except CallError as error:
            raise pb_utils.TritonModelException(f"network.json of {args['model_name']}: {error}") from error
        except (KeyError, ValueError) as error:
            raise pb_utils.TritonModelException(f"config.pbtxt of {args['model_name']}: parameters: {error!r}") from error
        self.schedules = Schedules.load(folder / FILE, values["schedulers"].split(","))
        self.decoupled = pb_utils.using_decoupled_model_transaction_policy(config)
        self.gives_images = any(output["name"] == "images" for output in config["output"])
        self.denoiser, self.decoder = values["denoiser"], values["decoder"]
        self.answers = ThreadPoolExecutor(1)  # one thread keeps the order, and a slow decoder does not stop the sampling
        self.sampler = Sampler(self._denoise, max_rows=self.limits.max_rows, max_jobs=max_jobs, lanes=lanes)
        pb_utils.Logger.log_info(f"{args['model_name']}: numpy {np.__version__}, calls of up to {self.limits.max_rows} rows")

    def execute(self, requests: list[Any]) -> None:
        """Give the requests to the sampler. Responses are sent later, in both transaction policies.

        A request for `seed` alone is checked and answered at once, and nothing is drawn: the model `health` sends such requests.
        """
        for request in requests:
            wants_images = self.gives_images and "images" in request.requested_output_names()
            images = (self._decode if self.decoder else images_of) if wants_images else None
            sender, slow = request.get_response_sender(), wants_images and bool(self.decoder)
            caller = Caller(sender, images=images, streams=self.decoupled, answers=self.answers, slow=slow)
            try:
                inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
                conditions = self.conditions.read(inputs)
                caller.seeds = seeds_of(inputs, conditions.count)
                job = self.limits.job(inputs, conditions, self.schedules, caller.seeds, caller)
                if set(request.requested_output_names()) == {"seed"}:
                    caller.checked()
                else:
                    self.sampler.submit(job)
            except (BadRequestError, BusyError) as error:
                caller.failed(error)

    def finalize(self) -> None:
        """Answer the waiting clients with an error, and stop the threads."""
        self.sampler.close()
        self.answers.shutdown()

    def _conditions(self, config: dict[str, Any], classes: int, folder: Path) -> Conditions:
        import triton_python_backend_utils as pb_utils

        images = int(config["max_batch_size"])
        if self.call.labels:
            return Labels(next(iter(self.call.conditions)), classes, images)
        dims = {item["name"]: tuple(int(size) for size in item["dims"]) for item in config["input"]}
        shapes = {name: dims[name] for name in self.call.conditions.values()}
        try:
            tokenizers = load_tokenizers(folder, self.call.tokenizers)
        except ModuleNotFoundError as error:
            message = f"{error}: prompts need it in the server's python3: pip install tokenizers"
            raise pb_utils.TritonModelException(message) from error
        except Exception as error:  # tokenizers raises Exception itself
            raise pb_utils.TritonModelException(f"{', '.join(self.call.tokenizers)}: {error}") from error
        return Texts(self.call, shapes, tokenizers, self._encode, images)

    def _denoise(self, states: Float32, timesteps: Float64, conditions: Feed) -> Float32:
        call, (height, width) = self.call, states.shape[2:]
        feed: dict[str, npt.NDArray[Any]] = {"timestep": timesteps.astype(call.timestep), **conditions}
        if call.batched:  # the server takes one scalar per sample as a column
            feed = {name: rows[:, None] if rows.ndim == 1 else rows for name, rows in feed.items()}
        feed[call.state] = states.reshape(*states.shape[:2], -1).transpose(0, 2, 1) if call.tokens else states
        length = next((rows.shape[1] for rows in conditions.values() if rows.ndim == 3), 0)
        places = {name: picture_positions(columns, height, width) for name, columns in call.picture_positions.items()}
        places |= {name: text_positions(columns, length) for name, columns in call.text_positions.items()}
        rows = len(states)
        feed |= {name: np.repeat(array[None], rows, axis=0) if call.batched else array for name, array in places.items()}
        (sample,) = _call(self.denoiser, feed, [call.output])
        if len(sample) != len(states):
            raise DenoiserError(f"{self.denoiser}: it returned {len(sample)} rows, expected {len(states)}")
        return sample.transpose(0, 2, 1).reshape(len(sample), -1, height, width) if call.tokens else sample

    def _encode(self, tokens: Feed) -> Feed:
        names = list(self.call.conditions)
        return dict(zip(names, _call(self.text_encoder, tokens, names), strict=True))

    def _decode(self, latents: Float32) -> npt.NDArray[np.uint8]:
        pictures = [_call(self.decoder, {"latents": latents[i : i + 1]}, ["sample"])[0] for i in range(len(latents))]
        return images_of(np.concatenate(pictures))


class Caller:
    """Sends the responses of one request. See `Client`.

    Args:
        images: turns latents into uint8[n, H, W, C]; None if the request does not ask for pictures.
        streams: whether the request may get several responses.
        answers: the thread that sends the responses in order.
        slow: whether `images` may occupy that thread for long.
    """

    def __init__(self, sender: Any, *, images: Paint | None, streams: bool, answers: Executor, slow: bool) -> None:
        self.sender, self.images, self.streams, self.answers, self.slow = sender, images, streams, answers, slow
        self.seeds: UInt64 = np.zeros((0, 1), dtype=np.uint64)
        self.ended, self.preview_pending = False, False

    def checked(self) -> None:
        """Answer a request that asks for its seeds alone."""
        self._respond({"seed": self.seeds}, last=True)

    def preview(self, step: int, latents: Float32) -> None:
        """See `Client`. A slow preview is skipped while the one before is decoded: other pictures wait for the same thread."""
        if not (self.slow and self.preview_pending):
            self.preview_pending = True
            self._later(self._send, latents, step)

    def done(self, latents: Float32) -> None:
        """See `Client`. The last response of a stream has step 0."""
        self._later(self._send, latents, 0)

    def failed(self, error: Exception) -> None:
        """See `Client`."""
        self._later(self._refuse, error)

    def disconnected(self) -> bool:
        """See `Client`. True also after an error that ended the request, such as a picture that could not be decoded."""
        return self.ended or bool(self.sender.is_cancelled())

    def _later(self, work: Callable[..., None], *arguments: Any) -> None:
        self.answers.submit(work, *arguments).add_done_callback(_report)

    def _send(self, latents: Float32, step: int) -> None:
        if self.ended:
            return
        outputs: dict[str, npt.NDArray[Any]] = {"latents": latents, "seed": self.seeds}
        try:
            if self.images:
                outputs["images"] = self.images(latents)
        except DenoiserError as error:
            self._refuse(error)
            return
        if self.streams:
            outputs["step"] = np.full((len(latents), 1), step, dtype=np.int32)
        self.preview_pending = False
        self._respond(outputs, last=step == 0)

    def _respond(self, outputs: dict[str, npt.NDArray[Any]], *, last: bool) -> None:
        import triton_python_backend_utils as pb_utils

        # `send` gives up Python's lock and then drops the tensors that the client did not ask for. The last reference to them
        # must be here: freed without the lock they end this program from Python 3.12 on, and spoil its memory before.
        tensors = [pb_utils.Tensor(name, value) for name, value in outputs.items()]
        response = pb_utils.InferenceResponse(tensors)
        self.ended = last
        self.sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if last else 0)

    def _refuse(self, error: Exception) -> None:
        """Send an error. Its class selects Triton's code, which becomes the status of http and grpc."""
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
    """Log an answer that could not be sent, for example because the client is gone."""
    import triton_python_backend_utils as pb_utils

    if answer.exception():
        pb_utils.Logger.log_warn(f"an answer was not sent: {answer.exception()!r}")


def images_of(pictures: Float32) -> npt.NDArray[np.uint8]:
    """Convert float32[n, C, H, W] in [-1, 1] to uint8[n, H, W, C]. Values outside the range are clipped."""
    scaled = np.clip(np.rint(pictures * np.float32(127.5) + np.float32(127.5)), 0, 255)
    return np.ascontiguousarray(scaled.astype(np.uint8).transpose(0, 2, 3, 1))


def _call(model: str, feed: Feed, outputs: list[str]) -> list[Float32]:
    """Call another model of this server, and return its outputs in the order of `outputs`.

    Raises:
        DenoiserError: the model fails, or the server does not have it.
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
        message = response.error().message()
        hint = EMPTY if message.endswith("got 0") and not np.__version__.startswith("1.") else ""
        raise DenoiserError(f"{model}: {message}{hint}")
    return [np.array(pb_utils.get_output_tensor_by_name(response, name).as_numpy()) for name in outputs]
