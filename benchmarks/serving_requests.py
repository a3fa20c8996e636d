"""Sends requests to a server, and measures the memory of its processes."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

LONGEST = 300.0
"""Seconds after which a request counts as lost. A server whose program died may never answer."""
KINDS: dict[str, tuple[str, Any]] = {
    "class_labels": ("INT64", np.int64), "seed": ("UINT64", np.uint64), "num_inference_steps": ("INT32", np.int32),
    "guidance_scale": ("FP32", np.float32), "scheduler": ("BYTES", np.object_), "latents": ("FP32", np.float32),
    "prompt": ("BYTES", np.object_), "negative_prompt": ("BYTES", np.object_), "prompt_embeds": ("FP32", np.float32),
    "prompt_attention_mask": ("FP32", np.float32), "negative_prompt_embeds": ("FP32", np.float32),
    "negative_prompt_attention_mask": ("FP32", np.float32), "preview_every": ("INT32", np.int32),
    "pooled_prompt_embeds": ("FP32", np.float32), "negative_pooled_prompt_embeds": ("FP32", np.float32),
    "height": ("INT32", np.int32), "width": ("INT32", np.int32),
    "hidden_states": ("FP32", np.float32), "timestep": ("INT64", np.int64),
}  # fmt: skip


def tensors(**inputs: Any) -> list[Any]:
    """Return a request's grpc inputs. One value becomes a row for each picture, n values become n rows, arrays stay."""
    import tritonclient.grpc as grpc

    inputs_of_request, rows = [], _pictures(inputs)
    for name, value in inputs.items():
        kind, dtype = KINDS[name]
        array = np.asarray(value, dtype=dtype)
        array = np.full((rows, 1), array, dtype=dtype) if array.ndim == 0 else array
        array = array[:, None] if array.ndim == 1 else array
        inputs_of_request.append(grpc.InferInput(name, list(array.shape), kind))
        inputs_of_request[-1].set_data_from_numpy(array)
    return inputs_of_request


def _pictures(inputs: dict[str, Any]) -> int:
    conditions = (inputs[name] for name in ("class_labels", "prompt", "prompt_embeds") if name in inputs)
    return int(np.atleast_1d(next(conditions, 0)).shape[0])


def ask(client: Any, model: str = "pipeline", **inputs: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Send a request, and return its outputs by name."""
    result = client.infer(model, tensors(**inputs), client_timeout=LONGEST)
    return {item.name: result.as_numpy(item.name) for item in result.get_response().outputs}


def ask_together(client: Any, requests: Sequence[dict[str, Any]]) -> tuple[list[dict[str, np.ndarray[Any, Any]]], int, int]:
    """Send all requests at once. Return their outputs by name, and rows and calls of the denoiser meanwhile."""
    (before,) = client.get_inference_statistics("denoiser").model_stats
    with ThreadPoolExecutor(len(requests)) as pool:
        answers = list(pool.map(lambda request: ask(client, **request), requests))
    (after,) = client.get_inference_statistics("denoiser").model_stats
    return answers, after.inference_count - before.inference_count, after.execution_count - before.execution_count


def healthy(client: Any) -> bool:
    """Return whether every model of the server answers the model `health`."""
    import tritonclient.grpc as grpc

    probe = grpc.InferInput("probe", [1], "BOOL")
    probe.set_data_from_numpy(np.array([True]))
    return bool(client.infer("health", [probe], client_timeout=LONGEST).as_numpy("healthy").all())


def memory(process: int) -> float:
    """Return the memory of a process and its children in MB."""
    total = 0.0
    for path in Path("/proc").glob("[0-9]*/status"):
        try:
            lines = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
        except OSError:
            continue
        if str(process) in (lines["Pid"].strip(), lines["PPid"].strip()):
            total += float(lines.get("VmRSS", "0 kB").split()[0]) / 1e3
    return total
