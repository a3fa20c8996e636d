"""An images endpoint for OpenAI's clients, in front of this repository's Triton server.

    pip install "tritonclient[grpc]" starlette uvicorn
    python images.py --triton 127.0.0.1:8001 --port 9100
    curl 127.0.0.1:9100/v1/images/generations -H "content-type: application/json" -d '{"prompt": "a house", "seed": 7}'

Pictures are returned as base64 of PNG. `seed`, `negative_prompt`, `num_inference_steps`, `guidance_scale` and `scheduler`
are extensions, which the Python client sends as `extra_body`. A client that hangs up frees its rows of the network's calls.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import re
import struct
import time
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import tritonclient.grpc.aio as grpc
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from tritonclient.utils import InferenceServerException

BODY_BYTES = 64 << 10
SECONDS = 600
"""The longest time of a request."""
SEEDS = 2**64
FLOAT32_MAX = float(np.finfo(np.float32).max)
TYPES: Mapping[str, tuple[type, ...]] = {
    "prompt": (str,), "negative_prompt": (str,), "scheduler": (str,), "n": (int,), "seed": (int,), "num_inference_steps": (int,),
    "guidance_scale": (int, float), "model": (str,), "size": (str,), "response_format": (str,), "output_format": (str,),
    "background": (str,), "stream": (bool,), "user": (str,), "quality": (str,), "style": (str,), "moderation": (str,),
}  # fmt: skip
"""Types of the body's parameters. The last four are accepted and ignored."""
ONLY = {"response_format": ("b64_json",), "output_format": ("png",), "background": ("auto", "opaque"), "stream": (False,)}
"""Parameters with a fixed set of values."""
INPUTS: Mapping[str, tuple[str, Any]] = {
    "prompt": ("BYTES", np.object_), "negative_prompt": ("BYTES", np.object_), "scheduler": ("BYTES", np.object_),
    "num_inference_steps": ("INT32", np.int32), "guidance_scale": ("FP32", np.float32), "seed": ("UINT64", np.uint64),
    "height": ("INT32", np.int32), "width": ("INT32", np.int32),
}  # fmt: skip
"""Values that are passed to the server unchanged, with Triton's and numpy's types."""
SIZE = re.compile(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})")
"""Width and height in pixels."""
STATUS = {"INVALID_ARGUMENT": 400, "UNAVAILABLE": 503, "DEADLINE_EXCEEDED": 504}
"""The http status for each status of grpc; 500 for others."""


class RefusedError(Exception):
    """A request is refused.

    Args:
        status: http status.
        parameter: the parameter at fault; empty if there is none.
    """

    def __init__(self, status: int, message: str, parameter: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.parameter = status, message, parameter

    def response(self) -> Response:
        """Return the error in the form that OpenAI's clients read. They repeat the request after 503."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": self.message, "type": kind, "param": self.parameter or None, "code": None}
        headers = {"Retry-After": "1"} if self.status == 503 else None
        return JSONResponse({"error": error}, self.status, headers)


def max_pictures(config: Mapping[str, Any]) -> int:
    """Return the most pictures of one request, from config.pbtxt of the model `pipeline` as JSON.

    Raises:
        RefusedError: the model takes no prompts, or returns no pictures.
    """
    inputs, outputs = ([item["name"] for item in config[kind]] for kind in ("input", "output"))
    if "images" not in outputs or "prompt" not in inputs:
        raise RefusedError(500, "the server's pipeline makes no pictures of prompts")
    return int(config["max_batch_size"])


def parse_body(content: bytes, pictures: int, name: str) -> dict[str, Any]:
    """Return the parameters of a request's body, without those that are None. `size` becomes `height` and `width`.

    Args:
        pictures: the most pictures of one request.
        name: the model's name for clients.

    Raises:
        RefusedError: 400, or 404 for another model. The message names the parameter, the expected and the actual value.
    """
    try:
        body = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, "the body is not JSON") from error
    if not isinstance(body, dict):
        raise RefusedError(400, "expected a JSON object")
    values = {key: value for key, value in body.items() if value is not None}
    for key, value in values.items():
        if key not in TYPES:
            raise RefusedError(400, f"unknown parameter {key[:40]!r}", key[:40])
        if not isinstance(value, TYPES[key]) or (isinstance(value, bool) and key != "stream"):
            raise RefusedError(400, f"{key}: expected {TYPES[key][-1].__name__}, found {type(value).__name__}", key)
        if key in ONLY and value not in ONLY[key]:
            raise RefusedError(400, f"{key}: expected {' or '.join(map(str, ONLY[key]))}", key)
    if "prompt" not in values:
        raise RefusedError(400, "prompt: missing", "prompt")
    if values.get("model", name) != name:
        raise RefusedError(404, f"model: this server has only {name!r}", "model")
    size = values.pop("size", "auto")
    if size != "auto":
        sides = SIZE.fullmatch(size)
        if not sides:
            raise RefusedError(400, "size: expected auto, or WIDTHxHEIGHT in pixels, such as 512x768", "size")
        values["width"], values["height"] = map(int, sides.groups())
    for key, low, high in (("n", 1, pictures), ("seed", 0, SEEDS - 1), ("num_inference_steps", 1, 2**31 - 1)):
        if key in values and not low <= values[key] <= high:
            raise RefusedError(400, f"{key}: expected {low} to {high}", key)
    if not 0 <= values.get("guidance_scale", 0) <= FLOAT32_MAX:
        raise RefusedError(400, "guidance_scale: expected a finite number of 0 or more", "guidance_scale")
    return values


def tensors(values: Mapping[str, Any]) -> list[Any]:
    """Return the server's inputs with a row for each picture. Picture i has the seed `seed` + i."""
    rows, inputs = values.get("n", 1), []
    for key, (kind, dtype) in INPUTS.items():
        if key in values:
            value = values[key].encode("utf-8", "surrogatepass") if kind == "BYTES" else values[key]
            column = [[(value + i) % SEEDS if key == "seed" else value] for i in range(rows)]
            inputs.append(grpc.InferInput(key, [rows, 1], kind))
            inputs[-1].set_data_from_numpy(np.array(column, dtype=dtype))
    return inputs


def png(picture: npt.NDArray[np.uint8]) -> bytes:
    """Return uint8[H, W, 1 or 3] as a PNG file."""
    height, width, channels = picture.shape

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2 if channels == 3 else 0, 0, 0, 0)
    lines = np.concatenate([np.zeros((height, 1), dtype=np.uint8), picture.reshape(height, -1)], axis=1)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines.tobytes())) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@dataclass
class Images:
    """The endpoint.

    Args:
        triton: the server's grpc address.
        name: the model's name for clients.
        max_requests: the most requests at a time; others get 503.
    """

    triton: str
    name: str
    max_requests: int
    counts: Counter[int] = field(default_factory=Counter)
    seconds: float = 0.0
    pictures: int = 0
    waiting: int = 0
    limit: int | None = None
    client: Any = None

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = [
            Route("/v1/images/generations", self.generate, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
        ]
        return Starlette(routes=routes, lifespan=self._lifespan)

    async def generate(self, request: Request) -> Response:
        """Answer a request with pictures or an error."""
        start = time.monotonic()
        self.waiting += 1
        try:
            response = await self._answer(request)
        except RefusedError as error:
            response = error.response()
        finally:
            self.waiting -= 1
        self.counts[response.status_code] += 1
        self.seconds += time.monotonic() - start
        return response

    async def models(self, request: Request) -> Response:
        """Return the list of models, which has one entry."""
        return JSONResponse({"object": "list", "data": [{"id": self.name, "object": "model", "owned_by": "dq-export"}]})

    async def health(self, request: Request) -> Response:
        """Return whether every model of the server answers; see its model `health`."""
        probe = grpc.InferInput("probe", [1], "BOOL")
        probe.set_data_from_numpy(np.array([True]))
        try:
            await self.client.infer("health", [probe], client_timeout=60)
        except InferenceServerException as error:
            return RefusedError(503, f"the server is not healthy: {_first_line(error)}").response()
        return JSONResponse({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        """Return the counters in Prometheus' format."""
        lines = [f'images_requests_total{{status="{status}"}} {count}' for status, count in sorted(self.counts.items())]
        lines += [f"images_request_seconds_total {self.seconds:g}", f"images_pictures_total {self.pictures}"]
        return PlainTextResponse("\n".join([*lines, f"images_requests_in_flight {self.waiting}", ""]))

    async def _answer(self, request: Request) -> Response:
        if self.waiting > self.max_requests:
            raise RefusedError(503, f"{self.max_requests} requests are in progress; try again later")
        content = await _body(request)
        values = parse_body(content, await self._limit(), self.name)
        # After the body, the only message that can still arrive is the client's disconnect.
        drawing, disconnect = asyncio.ensure_future(self._draw(values)), asyncio.ensure_future(request.receive())
        try:
            await asyncio.wait({drawing, disconnect}, return_when=asyncio.FIRST_COMPLETED)
            if not drawing.done():
                raise RefusedError(499, "the client is gone")
            pictures = drawing.result()
        finally:
            drawing.cancel()
            disconnect.cancel()
        encoded = await asyncio.to_thread(lambda: [base64.b64encode(png(picture)).decode() for picture in pictures])
        self.pictures += len(encoded)
        data = [{"b64_json": text} for text in encoded]
        size = f"{pictures.shape[2]}x{pictures.shape[1]}"
        return JSONResponse({"created": int(time.time()), "data": data, "size": size, "output_format": "png"})

    async def _draw(self, values: Mapping[str, Any]) -> npt.NDArray[np.uint8]:
        """Call the server, and return the pictures as uint8[n, H, W, C]."""
        outputs = [grpc.InferRequestedOutput("images")]
        try:
            result = await self.client.infer("pipeline", tensors(values), outputs=outputs, client_timeout=SECONDS)
        except InferenceServerException as error:
            status = STATUS.get(str(error.status()).removeprefix("StatusCode."), 500)
            message = _first_line(error)
            raise RefusedError(status, message, "size" if message.startswith(("height ", "width ")) else "") from error
        images: npt.NDArray[np.uint8] = result.as_numpy("images")
        return images

    async def _limit(self) -> int:
        """Return `max_pictures`. The first request reads it, since the server may start after the endpoint."""
        try:
            self.limit = self.limit or max_pictures((await self.client.get_model_config("pipeline", as_json=True))["config"])
        except InferenceServerException as error:
            raise RefusedError(503, f"the server does not answer: {_first_line(error)}") from error
        return self.limit

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.client = grpc.InferenceServerClient(self.triton)
        yield
        await self.client.close()


async def _body(request: Request) -> bytes:
    content = b""
    try:
        async for part in request.stream():
            content += part
            if len(content) > BODY_BYTES:
                raise RefusedError(413, f"the body: more than {BODY_BYTES} bytes")
    except ClientDisconnect as error:
        raise RefusedError(499, "the client is gone") from error
    return content


def _first_line(error: InferenceServerException) -> str:
    return (str(error.message() or "no reason given").splitlines() or [""])[0][:500]


def main() -> None:
    """Parse the command line and serve."""
    import uvicorn

    parser = argparse.ArgumentParser(description=str(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--triton", default="127.0.0.1:8001", help="the server's grpc address")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=9100)
    parser.add_argument("--model-name", default="pipeline", help="the model's name for clients")
    parser.add_argument("--requests", type=int, default=64, help="the most requests at a time; others get 503")
    options = parser.parse_args()
    images = Images(options.triton, options.model_name, options.requests)
    uvicorn.run(images.app(), host=options.host, port=options.port, log_level="warning", timeout_keep_alive=30)


if __name__ == "__main__":
    main()
