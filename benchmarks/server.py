"""A real tritonserver on this machine, from the nvidia-pytriton wheel, for the tests and the benchmarks.

Its backends are python and a stand-in for onnxruntime, because no wheel has the C++ backend. Set TRITON_BACKENDS to a
folder with a real `onnxruntime` backend to use that one.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import filelock

ROOT = Path(__file__).resolve().parent.parent
STAND_INS = ROOT / "tests" / "serving" / "backends"
REQUIREMENTS = ROOT / "tests" / "serving" / "requirements.txt"
HOME = ROOT / ".serving"
SECONDS = 60.0
"""The longest time of a start."""


def missing() -> str:
    """Return the reason why no server can run here; empty if one can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "nvidia-pytriton has a tritonserver only for Linux on x86-64"
    if not (3, 10) <= sys.version_info[:2] <= (3, 12):
        return "that server's python backend needs numpy 1, which has no wheel for this Python"
    version = tuple(map(int, platform.libc_ver()[1].split(".")))
    return "" if version >= (2, 35) else "that server needs glibc 2.35"


def prepare() -> Path:
    """Install the server and its backends in an environment in `.serving`, once."""
    contents = f"{REQUIREMENTS.read_text()}\n{sys.version_info[:2]}"
    mark = HOME / "made-of.txt"
    with filelock.FileLock(ROOT / ".serving.lock"):  # tests run in several processes
        if not mark.exists() or mark.read_text() != contents:
            shutil.rmtree(HOME, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", str(HOME / "venv")], check=True)
            pip = [str(HOME / "venv" / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            # The server imports few of the modules, and compiles these itself.
            subprocess.run([*pip, "--no-compile", "--no-deps", "-r", str(REQUIREMENTS)], check=True)
            mark.write_text(contents)
    return HOME


@dataclass(frozen=True)
class Server:
    """The addresses and the process of a running server, and when it was started, by `time.monotonic`."""

    http: str
    grpc: str
    metrics: str
    process: subprocess.Popen[bytes]
    log: Path
    started: float


@contextmanager
def serving(repository: Path, folder: Path, *options: str, wait: str = "live") -> Iterator[Server]:
    """Run a server with a repository on free ports of 127.0.0.1, and stop it afterwards.

    Args:
        folder: folder for its backends and its log.
        wait: `live`, or `ready` to wait for all its models.
    """
    prepare()
    site = next((HOME / "venv" / "lib").glob("python3.*")) / "site-packages"
    backends = _backends(site, folder / "backends")
    http, grpc, metrics = _free_ports(3)
    log = folder / "server.log"
    command = [
        str(site / "pytriton" / "tritonserver" / "bin" / "tritonserver"), f"--model-repository={repository}",
        f"--backend-directory={backends}", "--disable-auto-complete-config", "--allow-gpu-metrics=false",
        "--exit-timeout-secs=10", f"--backend-config=python,shm-region-prefix-name=dq{os.getpid()}_{http}",
        *(f"--{kind}-address=127.0.0.1" for kind in ("http", "grpc", "metrics")),
        f"--http-port={http}", f"--grpc-port={grpc}", f"--metrics-port={metrics}", *options,
    ]  # fmt: skip
    environment = {
        "LD_LIBRARY_PATH": f"{sysconfig.get_config_var('LIBDIR')}:{site / 'nvidia_pytriton.libs'}",
        "PATH": f"{HOME / 'venv' / 'bin'}:/usr/bin:/bin",
    }
    with log.open("wb") as file:
        started = time.monotonic()
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        server = Server(f"127.0.0.1:{http}", f"127.0.0.1:{grpc}", f"127.0.0.1:{metrics}", process, log, started)
        try:
            _await(server, f"http://{server.http}/v2/health/{wait}")
            yield server
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for path in Path("/dev/shm").glob(f"dq{os.getpid()}_{http}*"):
                path.unlink(missing_ok=True)


def _backends(site: Path, folder: Path) -> Path:
    """Copy the python backend with its stub, and the stand-ins or a real backend for the others."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(site / "pytriton" / "tritonserver" / "backends", folder)
    stubs = site / "pytriton" / "tritonserver" / "python_backend_stubs"
    shutil.copy(stubs / f"3.{sys.version_info.minor}" / "triton_python_backend_stub", folder / "python")
    shutil.copytree(os.environ.get("TRITON_BACKENDS", STAND_INS), folder, dirs_exist_ok=True)
    return folder


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for item in sockets:
        item.bind(("127.0.0.1", 0))
    ports = [item.getsockname()[1] for item in sockets]
    for item in sockets:
        item.close()
    return ports


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def _await(server: Server, address: str) -> None:
    end = time.monotonic() + SECONDS
    while not _answers(address):
        if server.process.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"tritonserver did not start:\n{server.log.read_text(errors='replace')[-4000:]}")
        time.sleep(0.05)
