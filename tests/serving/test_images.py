"""The images endpoint with OpenAI's own client, in front of a real tritonserver."""

from __future__ import annotations

import base64
import io
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import server
from serving_requests import ask


@pytest.fixture(scope="module")
def address(texts: server.Server, prompted: Path) -> Iterator[str]:
    with endpoint(texts, prompted / "triton") as started:
        yield started


@contextmanager
def endpoint(running: server.Server, repository: Path) -> Iterator[str]:
    """Start the service of a repository that takes two requests at a time, and return its address."""
    (port,) = server._free_ports(1)
    command = [sys.executable, str(repository / "images.py"), "--triton", running.grpc, "--port", str(port), "--requests", "2"]
    process = subprocess.Popen(command)
    try:
        end = time.monotonic() + 60
        while not server._answers(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture
def images(address: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"http://{address}/v1", api_key="none", max_retries=0) as client:
        yield client.images


def pixels(data: str) -> Any:
    from PIL import Image

    with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture)


def test_openais_client_gets_the_pictures_that_the_server_draws(images: Any, text_client: Any) -> None:
    more = {"seed": 7, "num_inference_steps": 6, "guidance_scale": 3.0, "negative_prompt": "an eight"}
    actual = images.generate(prompt="a seven", n=2, size="16x16", response_format="b64_json", extra_body=more)
    exact = ask(
        text_client,
        prompt=["a seven"] * 2,
        negative_prompt=["an eight"] * 2,
        seed=[7, 8],
        num_inference_steps=6,
        guidance_scale=3.0,
    )
    assert len(actual.data) == 2
    for item, picture in zip(actual.data, exact["images"], strict=True):
        assert np.array_equal(pixels(item.b64_json), picture[..., 0])


def test_a_prompt_needs_no_other_parameter(images: Any) -> None:
    assert pixels(images.generate(prompt="siebzehn Füße 七").data[0].b64_json).shape == (16, 16)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "a", "n": 9}, "n: expected 1 to 8"),
    ({"prompt": "a", "n": True}, "n: expected int, found bool"),
    ({"prompt": "a", "size": "1024x1024"}, "height 1024: expected 16, the only height that this model was exported for"),
    ({"prompt": "a", "size": "0x16"}, "size: expected auto, or WIDTHxHEIGHT in pixels"),
    ({"prompt": "a", "size": "16"}, "size: expected auto, or WIDTHxHEIGHT in pixels"),
    ({"prompt": "a", "response_format": "url"}, "response_format: expected b64_json"),
    ({"prompt": "a", "stream": True}, "stream: expected False"),
    ({"prompt": "a " * 300}, "prompt: more than 300 tokens"),
    ({"prompt": ["a"]}, "prompt: expected str, found list"),
    ({"n": 1}, "prompt: missing"),
    ({"prompt": "a", "seed": -1}, "seed: expected 0 to"),
    ({"prompt": "a", "guidance_scale": float("nan")}, "guidance_scale: expected a finite number"),
    ({"prompt": "a", "guidance_scale": 10**400}, "guidance_scale: expected a finite number of 0 or more"),
    ({"prompt": "a", "num_inference_steps": 1000}, "num_inference_steps 1000: expected 1 to 100"),
    ({"prompt": "a", "scheduler": "pndm"}, "scheduler 'pndm': expected"),
    ({"prompt": "a", "colour": "red"}, "unknown parameter 'colour'"),
    ({"prompt": "\ud800"}, "prompt: expected UTF-8"),
]


def post(address: str, content: bytes) -> tuple[int, Any]:
    request = urllib.request.Request(f"http://{address}/v1/images/generations", data=content)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


@pytest.mark.parametrize(("body", "message"), BAD, ids=[row[1] for row in BAD])
def test_a_bad_request_gets_an_error_that_names_the_fault(address: str, body: dict[str, Any], message: str) -> None:
    status, answer = post(address, json.dumps(body).encode())
    assert status == 400
    assert message in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(("content", "status"), [(b"{", 400), (b"[" * 60_000, 400), (b"[]", 400), (b" " * 70_000, 413)])
def test_a_body_that_is_not_a_request_is_refused(address: str, content: bytes, status: int) -> None:
    assert post(address, content)[0] == status


def test_openais_client_reads_errors_and_another_model_is_refused(images: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="height 1024: expected 16"):
        images.generate(prompt="a", size="1024x1024")
    with pytest.raises(openai.NotFoundError, match="this server has only 'pipeline'"):
        images.generate(prompt="a", model="gpt-image-1")


def test_a_client_that_hangs_up_frees_its_rows_and_too_many_are_sent_away(address: str, text_client: Any) -> None:
    def calls() -> int:
        (stats,) = text_client.get_inference_statistics("denoiser").model_stats
        return int(stats.execution_count)

    body = json.dumps({"prompt": "a one", "n": 8, "num_inference_steps": 100}).encode()
    head = f"POST /v1/images/generations HTTP/1.1\r\nHost: {address}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    host, port = address.split(":")
    before = calls()
    connections = [socket.create_connection((host, int(port))) for _ in range(2)]
    for connection in connections:
        connection.sendall(head + body)
    while calls() < before + 3:
        time.sleep(0.01)
    status, answer = post(address, b'{"prompt": "a"}')
    assert (status, answer["error"]["type"]) == (503, "server_error")
    for connection in connections:
        connection.close()
    time.sleep(1)
    settled = calls()
    time.sleep(1)
    assert calls() == settled
    assert settled < before + 150
    assert post(address, b'{"prompt": "a", "num_inference_steps": 2}')[0] == 200


def test_metrics_count_answers(address: str) -> None:
    def counted() -> dict[str, float]:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
            lines = [line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in lines}

    before = counted()
    post(address, b'{"prompt": "a", "n": 2, "num_inference_steps": 2}')
    post(address, b"{")
    after = counted()
    changed = {name: after[name] - before.get(name, 0) for name in after if "seconds" not in name}
    assert {name: value for name, value in changed.items() if value} == {
        'images_requests_total{status="200"}': 1, 'images_requests_total{status="400"}': 1, "images_pictures_total": 2,
    }  # fmt: skip


def test_compose_starts_both_with_the_readmes_options(prompted: Path) -> None:
    import re

    import yaml

    services = yaml.safe_load((prompted / "triton" / "compose.yaml").read_text())["services"]
    readme = (prompted / "triton" / "README.md").read_text()
    options = set(re.findall(r"--[a-z-]+=[a-z,/-]+", readme[readme.index("docker run --rm") : readme.index("The last two")]))
    assert options
    assert options - {"--shm-size"} <= set(re.findall(r"--[a-z-]+=[a-z,/-]+", services["triton"]["command"]))
    assert "--triton triton:8001" in services["images"]["command"]
    assert all(port.startswith("127.0.0.1:") for service in services.values() for port in service["ports"])
