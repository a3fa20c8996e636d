"""Requests that are meant to end the server, or to fill its memory: on a real tritonserver, with the options of its README.

Over http they go through the proxy of the repository, as nobody else's requests may reach the server. Meanwhile another
client goes on and gets the pictures that it gets alone.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import server
from serving_requests import ask, memory

ONE = (1).to_bytes(8, "little")
INFER = "/v2/models/pipeline/infer"
SECONDS = 60


@dataclass(frozen=True)
class Guarded:
    """A server, and the addresses of the proxy before it; the addresses are empty where there is no nginx."""

    server: server.Server
    http: str
    grpc: str


def options_of(readme: str) -> list[str]:
    """The restrictions of the README's command."""
    matches = re.findall(r'(--(?:http-restricted-api|grpc-restricted-protocol)=\S+:admin=)"\$\(openssl', readme)
    assert len(matches) == 2
    return [f"{option}0123456789abcdef" for option in matches]


def proxy_config(text: str, running: server.Server, ports: list[int]) -> str:
    """The repository's nginx.conf with the addresses of a test."""
    changes = {
        "listen 9000;": f"listen 127.0.0.1:{ports[0]};",
        "listen 9001 http2;": f"listen 127.0.0.1:{ports[1]} http2;",
        "127.0.0.1:9002": f"127.0.0.1:{ports[2]}",
        "127.0.0.1:8000": running.http,
        "127.0.0.1:8001": running.grpc,
    }
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    return text


@contextmanager
def proxied(repository: Path, running: server.Server, folder: Path) -> Iterator[Guarded]:
    """nginx before a server, ended afterwards."""
    program = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")
    if program is None:
        yield Guarded(running, "", "")
        return
    ports = server._free_ports(3)
    folder.mkdir()
    config = folder / "nginx.conf"
    config.write_text(proxy_config((repository / "nginx.conf").read_text(), running, ports))
    command = [program, "-p", str(folder), "-c", str(config), "-e", "stderr", "-g", "daemon off;"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stderr=log)
    try:
        end = time.monotonic() + SECONDS
        while not server._answers(f"http://127.0.0.1:{ports[0]}/v2/health/live"):
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < end
            time.sleep(0.05)
        yield Guarded(running, f"127.0.0.1:{ports[0]}", f"127.0.0.1:{ports[1]}")
    finally:
        process.terminate()
        process.wait(20)


@contextmanager
def guarded_server(repository: Path, folder: Path) -> Iterator[Guarded]:
    if server.missing():
        pytest.skip(server.missing())
    options = options_of((repository / "README.md").read_text())
    with (
        server.serving(repository, folder, *options, wait="ready") as running,
        proxied(repository, running, folder / "proxy") as proxy,
    ):
        yield proxy


@pytest.fixture(scope="module")
def guarded(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    with guarded_server(exported / "triton", tmp_path_factory.mktemp("guarded")) as running:
        yield running


@pytest.fixture
def proxy(guarded: Guarded) -> Guarded:
    if not guarded.http:
        pytest.skip("nginx is not installed: apt-get install nginx")
    return guarded


@pytest.fixture
def unharmed(guarded: Guarded) -> Iterator[None]:
    """Another client's pictures are the same meanwhile and afterwards, the server lives, and its memory is flat."""
    import tritonclient.grpc as grpc

    client = grpc.InferenceServerClient(guarded.server.grpc)
    process = guarded.server.process
    request = {"class_labels": [5, 2], "seed": [5, 6]}
    exact = ask(client, **request)["latents"]
    done, same, peak = threading.Event(), [], [0.0]

    def others() -> None:
        while not done.is_set():
            same.append(np.array_equal(ask(client, **request)["latents"], exact))

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], memory(process.pid))

    before = memory(process.pid)
    threads = [threading.Thread(target=work) for work in (others, watch)]
    for thread in threads:
        thread.start()
    yield
    time.sleep(0.3)
    done.set()
    for thread in threads:
        thread.join(SECONDS)
    assert process.poll() is None
    assert same
    assert all(same)
    assert peak[0] - before < 64  # MB: a request of the least harmful of these took 1,000
    client.close()


def rpc(address: str, inputs: list[tuple[str, str, list[int], bytes]], model: str = "pipeline") -> str:
    """grpc's status and message of a request that no client library would send."""
    import grpc
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    request = service_pb2.ModelInferRequest(model_name=model)
    for name, kind, shape, content in inputs:
        tensor = request.inputs.add()
        tensor.name, tensor.datatype = name, kind
        tensor.shape.extend(shape)
        request.raw_input_contents.append(content)
    with grpc.insecure_channel(address) as channel:
        try:
            service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request, timeout=SECONDS)
        except grpc.RpcError as error:
            return f"{error.code().name}: {error.details()}"
    return "OK"


def http(address: str, path: str, body: bytes, headers: str = "") -> str:
    """The answer's status and body; a connection that ends without one is an empty text."""
    host, port = address.split(":")
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
    answer = b""
    with socket.create_connection((host, int(port)), timeout=SECONDS) as connection:
        try:
            connection.sendall(head.encode() + body)
            while part := connection.recv(65536):
                answer += part
        except ConnectionError:  # a proxy that has refused the head does not read the body
            pass
    first, _, content = answer.decode(errors="replace").partition("\r\n\r\n")
    return f"{first.split(' ')[1]} {content}" if answer else ""


def get(address: str, path: str) -> int:
    try:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=SECONDS) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def body(shape: list[int], data: Any = 1, name: str = "class_labels", **more: Any) -> bytes:
    """JSON of one input."""
    values = data if isinstance(data, list) else [data]
    return json.dumps({"inputs": [{"name": name, "datatype": "INT64", "shape": shape, "data": values}], **more}).encode()


SHAPES: dict[str, list[tuple[str, str, list[int], bytes]]] = {
    "elements that overflow to none": [("class_labels", "INT64", [2**61], b"")],
    "a batch that overflows to none": [("class_labels", "INT64", [2**61, 1], b"")],
    "a batch of which 32 bits are none": [("class_labels", "INT64", [2**32, 1], ONE)],
    "a batch of which 32 bits are none, without data": [("class_labels", "INT64", [2**32, 1], b"")],
    "a dimension that overflows": [("class_labels", "INT64", [8, 2**61], b"")],
    "a negative batch": [("class_labels", "INT64", [-1, 1], ONE)],
    "the greatest batch": [("class_labels", "INT64", [2**63 - 1, 1], ONE)],
    "no batch": [("class_labels", "INT64", [0, 1], b"")],
    "no dimension": [("class_labels", "INT64", [], ONE)],
    "many dimensions": [("class_labels", "INT64", [1] * 100, ONE)],
    "latents that overflow": [("class_labels", "INT64", [1, 1], ONE), ("latents", "FP32", [2**57 + 1, 2, 8, 8], bytes(512))],
    "a text longer than all": [("class_labels", "INT64", [1, 1], ONE), ("scheduler", "BYTES", [1, 1], b"\xff\xff\xff\xffabc")],
    "a text without its length": [("class_labels", "INT64", [1, 1], ONE), ("scheduler", "BYTES", [1, 1], b"\x04")],
    "no text": [("class_labels", "INT64", [1, 1], ONE), ("scheduler", "BYTES", [1, 1], b"")],
}


@pytest.mark.usefixtures("unharmed")
def test_a_shape_that_no_memory_holds_is_refused_by_the_server(guarded: Guarded) -> None:
    answers = {name: rpc(guarded.server.grpc, inputs) for name, inputs in SHAPES.items()}
    assert {name: answer for name, answer in answers.items() if not answer.startswith("INVALID_ARGUMENT")} == {}


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("batch", [0, -1, 2**32, 2**55, 2**63 - 1])
@pytest.mark.parametrize("content", [True, False])
def test_the_denoiser_refuses_shapes_that_no_memory_holds(guarded: Guarded, batch: int, content: bool) -> None:
    row = [
        ("hidden_states", "FP32", [1, 16, 16], bytes(1024)),
        ("timestep", "INT64", [1], ONE),
        ("class_labels", "INT64", [1], ONE),
    ]
    inputs = [(name, kind, [batch, *shape], data if content else b"") for name, kind, shape, data in row]
    assert rpc(guarded.server.grpc, inputs, "denoiser").startswith(("INVALID_ARGUMENT", "INTERNAL"))


@pytest.mark.usefixtures("unharmed")
def test_a_batch_of_which_32_bits_fit_is_that_batch(guarded: Guarded) -> None:
    """The server's core holds a batch in 32 bits, and then takes all sizes from there."""
    assert rpc(guarded.server.grpc, [("class_labels", "INT64", [2**57 + 1, 1], ONE)]) == "OK"
    latents = ("latents", "FP32", [2**57 + 1, 1, 16, 16], bytes(1024))
    assert rpc(guarded.server.grpc, [("class_labels", "INT64", [1, 1], ONE), latents]).startswith(("OK", "INVALID_ARGUMENT"))


@pytest.mark.usefixtures("unharmed")
def test_the_same_shapes_in_a_stream(guarded: Guarded) -> None:
    import grpc
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    requests = []
    for inputs in SHAPES.values():
        request = service_pb2.ModelInferRequest(model_name="pipeline_stream")
        for name, kind, shape, content in inputs:
            request.inputs.add(name=name, datatype=kind, shape=shape)
            request.raw_input_contents.append(content)
        requests.append(request)
    with grpc.insecure_channel(guarded.server.grpc) as channel:
        answers = list(service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(iter(requests), timeout=SECONDS))
    assert len(answers) == len(SHAPES)
    assert all(answer.error_message for answer in answers)


HTTP: dict[str, tuple[bytes, str, str]] = {
    "a shape of 2 GB": (body([2**28]), "", "400 "),
    "a batch of 2 GB": (body([2**28, 1]), "", "400 "),
    "a shape of 16 GB": (body([2**31, 1]), "", "400 "),
    "a shape that overflows": (body([2**61, 1]), "", "400 "),
    "a dimension that overflows": (body([8, 2**31]), "", "400 "),
    "an input of no model": (body([2**28, 1], name="nonsense"), "", "400 "),
    "a shape twice": (body([1, 1]).replace(b'"shape"', b'"shape": [268435456], "shape"'), "", "400 "),
    "a shape in escapes": (body([2**28, 1]).replace(b'"shape"', b'"sh\\u0061pe"'), "", "400 "),
    "a verdict of one's own": (body([2**28, 1]), "Checked: yes\r\n", "400 "),
    "150,000 brackets": (b"[" * 150_000, "", "413 "),
    "40,000 brackets": (b"[" * 40_000, "", "400 "),
    "nested data": (b'{"inputs": [{"name": "class_labels", "data": ' + b"[" * 20_000 + b"]" * 20_000 + b"}]}", "", "400 "),
    "nested after empty lists": (b"[[]," * 16_000, "", "400 "),
    "brackets that strings close": (b'{"a": ' + b'["]", ' * 9 + b'"["' + b', "["]' * 9 + b"}", "", "400 "),
    "60 kB of gzip that are 60 MB": (gzip.compress(bytes(60_000_000)), "Content-Encoding: gzip\r\n", "415 "),
    "gzip behind another name": (gzip.compress(body([1, 1])), "Content-Encoding: \r\nContent-Encoding: gzip\r\n", "400 "),
    "binary tensors": (body([1, 1]), "Inference-Header-Content-Length: 60\r\n", "415 "),
    "a body without end": (b" " * (1 << 20), "", "413 "),
    "tensors of shared memory": (
        b'{"inputs": [{"name": "class_labels", "datatype": "INT64", "shape": [1, 1], "parameters": '
        b'{"shared_memory_region": "triton_python_backend_shm_region_1", "shared_memory_byte_size": 8}}]}', "", "404 ",
    ),
}  # fmt: skip


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("model", ["pipeline", "denoiser"])
def test_the_proxy_refuses_requests_that_crash_the_server(proxy: Guarded, model: str) -> None:
    answers = {name: http(proxy.http, f"/v2/models/{model}/infer", body, head) for name, (body, head, _) in HTTP.items()}
    assert {name: answer[:200] for name, answer in answers.items() if not answer.startswith(HTTP[name][2])} == {}


CLOSED = (
    "/v2/systemsharedmemory/region/x/register", "/v2/systemsharedmemory/status", "/v2/cudasharedmemory/region/x/register",
    "/v2/repository/index", "/v2/repository/models/pipeline/unload", "/v2/logging", "/v2/trace/setting",
    "/v2/models/pipeline/trace/setting",
)  # fmt: skip


def test_memory_models_and_settings_are_closed(guarded: Guarded) -> None:
    assert {path: http(guarded.server.http, path, b"{}")[:4] for path in CLOSED} == dict.fromkeys(CLOSED, "403 ")
    assert administration(guarded.server.grpc) == {"UNAVAILABLE"}


def test_other_paths_are_closed_at_the_proxy(proxy: Guarded) -> None:
    paths = (*CLOSED, "/v2/models/pipeline/../../repository/index", "//v2/logging", "/v2/models/pipeline_stream/generate")
    assert {path: http(proxy.http, path, b"{}")[:4] for path in paths} == dict.fromkeys(paths, "404 ")
    assert administration(proxy.grpc) == {"UNIMPLEMENTED"}


def administration(address: str) -> set[str]:
    """grpc's status of every method that no client needs."""
    import grpc
    from tritonclient.grpc import service_pb2 as messages
    from tritonclient.grpc import service_pb2_grpc

    codes = set()
    with grpc.insecure_channel(address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        for call, message in (
            (stub.SystemSharedMemoryRegister, messages.SystemSharedMemoryRegisterRequest(name="x", key="/x", byte_size=1)),
            (stub.SystemSharedMemoryStatus, messages.SystemSharedMemoryStatusRequest()),
            (stub.CudaSharedMemoryRegister, messages.CudaSharedMemoryRegisterRequest(name="x", byte_size=1)),
            (stub.RepositoryModelUnload, messages.RepositoryModelUnloadRequest(model_name="pipeline")),
            (stub.RepositoryIndex, messages.RepositoryIndexRequest()),
            (stub.LogSettings, messages.LogSettingsRequest()),
            (stub.TraceSetting, messages.TraceSettingRequest()),
        ):
            with pytest.raises(grpc.RpcError) as error:
                call(message, timeout=SECONDS)
            codes.add(error.value.code().name)
    return codes


@pytest.mark.usefixtures("unharmed")
def test_the_proxy_takes_no_body_in_chunks(proxy: Guarded) -> None:
    """Servers before 25.07 take room on the stack for each chunk."""
    host, port = proxy.http.split(":")
    head = f"POST {INFER} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    for content in (body([1, 1]), b" " * 1_000_000):
        with socket.create_connection((host, int(port)), timeout=SECONDS) as connection:
            with contextlib.suppress(ConnectionError):  # a proxy that has read enough does not read on
                connection.sendall(head + b"".join(b"1\r\n%c\r\n" % sign for sign in content) + b"0\r\n\r\n")
            assert connection.recv(12)[-3:] == b"411"


@pytest.mark.usefixtures("unharmed")
def test_the_proxy_forwards_requests_of_the_documented_clients(proxy: Guarded, exported: Path) -> None:
    import tritonclient.grpc as grpc

    readme = (exported / "triton" / "README.md").read_text()
    example = re.search(r"infer -d '(\{.*?\})'", readme, re.DOTALL)
    assert example
    answer = http(proxy.http, INFER, example[1].encode())
    assert answer.startswith("200 ")
    outputs = {item["name"]: item for item in json.loads(answer[4:])["outputs"]}
    client = grpc.InferenceServerClient(proxy.grpc)
    exact = ask(client, class_labels=[0, 1], num_inference_steps=20, seed=[7, 8])
    assert outputs["images"]["data"] == exact["images"].ravel().tolist()
    for latents in (exact["latents"], np.round(exact["latents"], 3)):
        actual = ask(client, class_labels=[0, 1], latents=latents, num_inference_steps=2)["latents"]
        tensor = {"name": "latents", "datatype": "FP32", "shape": [2, 1, 16, 16], "data": latents.tolist()}
        steps = {"name": "num_inference_steps", "datatype": "INT32", "shape": [2, 1], "data": [2, 2]}
        labels = {"name": "class_labels", "datatype": "INT64", "shape": [2, 1], "data": [[0], [1]]}
        request = {"inputs": [labels, tensor, steps], "outputs": [{"name": "latents"}]}
        answer = http(proxy.http, INFER, json.dumps(request).encode())
        assert np.array_equal(np.float32(json.loads(answer[4:])["outputs"][0]["data"]), actual.ravel())
    client.close()


@pytest.mark.usefixtures("unharmed")
def test_the_proxy_takes_no_compression_and_no_long_calls(proxy: Guarded) -> None:
    import grpc
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    with grpc.insecure_channel(proxy.grpc) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        for kind in (grpc.Compression.Gzip, grpc.Compression.Deflate):
            with pytest.raises(grpc.RpcError, match="or compressed"):
                stub.ModelInfer(service_pb2.ModelInferRequest(model_name="pipeline"), compression=kind, timeout=SECONDS)
    assert "413" in rpc(proxy.grpc, [("class_labels", "INT64", [8, 1], bytes(30_000_000))])


def test_health_reports_a_program_that_died(exported: Path, tmp_path: Path) -> None:
    """A supervisor restarts a server in the same way; here it stays down."""
    command = re.search(r'health/infer \\\n +-d "(\{.*?\})"', (exported / "triton" / "README.md").read_text())
    assert command
    probe = command[1].replace('\\"', '"').encode()
    with guarded_server(exported / "triton", tmp_path) as running:
        assert http(running.server.http, "/v2/models/health/infer", probe).startswith("200 ")
        if running.http:
            assert get(running.http, "/health") == 200
        os.kill(program_of(running.server.process.pid, "/pipeline_stream/1/model.py"), signal.SIGKILL)
        time.sleep(1)
        answer = http(running.server.http, "/v2/models/health/infer", probe)
        assert answer.startswith("500 ")
        assert "pipeline_stream: " in answer
        assert get(running.server.http, "/v2/health/ready") == 200  # why `health` is needed
        if running.http:
            assert get(running.http, "/health") == 500
        running.server.process.terminate()
        running.server.process.wait(SECONDS)  # a server with a dead program still ends when it is asked to


def program_of(parent: int, model: str) -> int:
    """The process of a model's program."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words, status = (path / "cmdline").read_bytes().decode(), (path / "status").read_text()
        except OSError:
            continue
        if model in words and f"PPid:\t{parent}\n" in status:
            return int(path.name)
    raise AssertionError(f"no process runs {model}")
