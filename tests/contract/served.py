"""A client of a tritonserver that serves an export."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import server


@contextmanager
def serving_client(out: Path, place: Path) -> Iterator[Any]:
    """Skip the test where no server can run. `place` is a folder for the server."""
    import tritonclient.grpc as grpc

    if server.missing():
        pytest.skip(server.missing())
    with server.serving(out / "triton", place, "--disable-auto-complete-config", wait="ready") as running:
        client = grpc.InferenceServerClient(running.grpc)
        yield client
        client.close()
