"""Two servers behind a load balancer, as the repository's README has it: nginx on this machine."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import server


@dataclass(frozen=True)
class Balanced:
    """Two servers and the address of the balancer before them."""

    servers: list[server.Server]
    http: str


@pytest.fixture
def balanced(exported: Path, tmp_path: Path) -> Iterator[Balanced]:
    program = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")
    if server.missing() or program is None:
        pytest.skip(server.missing() or "nginx is not installed: apt-get install nginx")
    readme = (exported / "triton" / "README.md").read_text()
    (config,) = re.findall(r"```nginx\n(.*?)```", readme, re.DOTALL)
    with ExitStack() as stack:
        servers = []
        for number in range(2):
            (tmp_path / str(number)).mkdir()
            servers.append(stack.enter_context(server.serving(exported / "triton", tmp_path / str(number), wait="ready")))
        (port,) = server._free_ports(1)
        for old, new in (("one:9000", servers[0].http), ("two:9000", servers[1].http), ("9200", f"127.0.0.1:{port}")):
            assert old in config
            config = config.replace(old, new)
        folders = "".join(f"{kind}_temp_path {kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        text = f"pid nginx.pid; error_log stderr; events {{}} http {{ access_log off; {folders} {config} }}"
        (tmp_path / "nginx.conf").write_text(text)
        command = [program, "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf"), "-e", "stderr", "-g", "daemon off;"]
        process = subprocess.Popen(command)
        try:
            end = time.monotonic() + 60
            while not server._answers(f"http://127.0.0.1:{port}/v2/health/live"):
                assert process.poll() is None
                assert time.monotonic() < end
                time.sleep(0.05)
            yield Balanced(servers, f"127.0.0.1:{port}")
        finally:
            process.terminate()
            process.wait(20)


def latents(address: str, seed: int, steps: int) -> Any:
    body = {"inputs": [
        {"name": "class_labels", "datatype": "INT64", "shape": [1, 1], "data": [seed % 10]},
        {"name": "num_inference_steps", "datatype": "INT32", "shape": [1, 1], "data": [steps]},
        {"name": "seed", "datatype": "UINT64", "shape": [1, 1], "data": [seed]}]}  # fmt: skip
    request = urllib.request.Request(f"http://{address}/v2/models/pipeline/infer", data=json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=120) as answer:
        outputs = {item["name"]: item["data"] for item in json.load(answer)["outputs"]}
    return np.float32(outputs["latents"])


@pytest.mark.slow
def test_two_servers_share_the_requests_and_one_that_dies_loses_none(balanced: Balanced) -> None:
    import tritonclient.grpc as grpc

    exact = [latents(balanced.servers[0].http, seed, 30) for seed in range(16)]
    with ThreadPoolExecutor(16) as pool:
        actual = list(pool.map(lambda seed: latents(balanced.http, seed, 30), range(16)))
        assert all(np.array_equal(a, b) for a, b in zip(exact, actual, strict=True))
        client = grpc.InferenceServerClient(balanced.servers[1].grpc)
        (stats,) = client.get_inference_statistics("pipeline").model_stats
        assert stats.inference_count == 8
        late = pool.map(lambda seed: latents(balanced.http, seed, 30), range(16))
        time.sleep(0.3)
        balanced.servers[1].process.kill()
        assert all(np.array_equal(a, b) for a, b in zip(exact, late, strict=True))
