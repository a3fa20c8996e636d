"""The exported repository on a real tritonserver: what it draws, how requests share it, and what it withstands."""

from __future__ import annotations

import json
import queue
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import server
from conftest import SERVED_STEPS, Nobody, sqnr
from serving_requests import LONGEST, ask, memory, tensors

from dq_export.deploy.check.ort_unpacking import BYTES_SINCE
from dq_export.deploy.onnxruntime.cpu import open_graph, version
from dq_export.deploy.triton.serving.call import Call
from dq_export.deploy.triton.serving.conditions import Labels
from dq_export.deploy.triton.serving.request import Limits
from dq_export.deploy.triton.serving.schedules import FILE, Schedules
from dq_export.deploy.triton.serving.sizes import Side, Sizes
from dq_export.families.source import load_reference

SIDE = Side(name="", default=16, minimum=16, maximum=16, step=1)


def drawn_here(exported: Path, **inputs: Any) -> Any:
    """The result of the same request without a server: the graph in ONNX Runtime, one job alone."""
    rows = len(inputs["class_labels"])
    seeds = np.broadcast_to(np.asarray(inputs.pop("seed"), dtype=np.uint64).reshape(-1, 1), (rows, 1))
    limits = Limits(
        shape=(1, 16, 16),
        sizes=Sizes(height=SIDE, width=SIDE, pixels=1),
        max_rows=16,
        num_inference_steps=SERVED_STEPS,
        guidance_scale=2.0,
        scheduler="ddim",
        call=Call.load(exported / "triton" / "pipeline" / "1"),
    )
    schedules = Schedules.load(exported / "triton" / "pipeline" / "1" / FILE, ["ddim", "dpmsolver++", "euler"])
    columns = {name: np.broadcast_to(np.asarray(value).reshape(-1, 1), (rows, 1)) for name, value in inputs.items()}
    expected = Labels("class_labels", classes=10, max_images=8).read(columns)
    job = limits.job(columns, expected, schedules, seeds, Nobody())
    engine = open_graph(exported / "model.onnx")
    while job.at < len(job.steps):
        states, timestep, conditions = job.feed()
        job.advance(engine({"hidden_states": states, "timestep": timestep.astype(np.int64), **conditions}))
    return job.latents


def post(running: server.Server, model: str, body: Any) -> tuple[int, Any]:
    """An http request without any client library, as curl sends it."""
    request = urllib.request.Request(f"http://{running.http}/v2/models/{model}/infer", data=json.dumps(body).encode())
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def refused(client: Any, model: str = "pipeline", **inputs: Any) -> tuple[str, str]:
    """Status and message of a request that must fail."""
    from tritonclient.utils import InferenceServerException

    with pytest.raises(InferenceServerException) as error:
        ask(client, model, **inputs)
    return str(error.value.status()).removeprefix("StatusCode."), str(error.value.message())


def executions(client: Any, model: str = "denoiser") -> tuple[int, int]:
    """Rows and calls so far."""
    (stats,) = client.get_inference_statistics(model).model_stats
    return stats.inference_count, stats.execution_count


def settled(client: Any) -> tuple[int, int]:
    """`executions` of a denoiser at rest: the server counts a call after it has answered it."""
    before = executions(client)
    time.sleep(0.2)
    while (after := executions(client)) != before:
        before = after
        time.sleep(0.2)
    return after


def test_models_are_ready_and_list_their_inputs(client: Any) -> None:
    assert all(client.is_model_ready(name) for name in ("denoiser", "pipeline", "pipeline_stream"))
    described = client.get_model_metadata("denoiser")
    assert {item.name: (item.datatype, list(item.shape)) for item in described.inputs} == {
        "hidden_states": ("FP32", [-1, 1, 16, 16]), "timestep": ("INT64", [-1, 1]), "class_labels": ("INT64", [-1, 1]),
    }  # fmt: skip
    assert [item.name for item in described.outputs] == ["sample"]
    assert [item.name for item in client.get_model_metadata("pipeline").outputs] == ["latents", "seed", "images"]


def test_the_denoiser_equals_the_engine(client: Any, exported: Path) -> None:
    states = np.random.default_rng(0).standard_normal((3, 1, 16, 16), dtype=np.float32)
    timestep, labels = np.array([7, 500, 999]), np.array([0, 4, 10])
    actual = ask(client, "denoiser", hidden_states=states, timestep=timestep[:, None], class_labels=labels[:, None])
    exact = open_graph(exported / "model.onnx")({"hidden_states": states, "timestep": timestep, "class_labels": labels})
    assert np.array_equal(actual["sample"], exact)


@pytest.mark.parametrize("scheduler", ["ddim", "dpmsolver++", "euler"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_picture_is_the_one_that_the_engine_draws(client: Any, exported: Path, scheduler: str, guidance: float) -> None:
    request = {"class_labels": [3, 8], "num_inference_steps": 9, "guidance_scale": guidance, "scheduler": scheduler}
    actual = ask(client, seed=[5, 2**64 - 1], **request)
    assert np.array_equal(actual["latents"], drawn_here(exported, seed=[5, 2**64 - 1], **request))
    assert actual["seed"].tolist() == [[5], [2**64 - 1]]
    pixels = np.clip(np.rint(actual["latents"] * np.float32(127.5) + np.float32(127.5)), 0, 255).astype(np.uint8)
    assert np.array_equal(actual["images"], pixels.transpose(0, 2, 3, 1))


def test_http_without_a_client_library_gives_the_same(client: Any, running: server.Server) -> None:
    body = {"inputs": [
        {"name": "class_labels", "datatype": "INT64", "shape": [2, 1], "data": [1, 9]},
        {"name": "seed", "datatype": "UINT64", "shape": [2, 1], "data": [2**63, 3]},
        {"name": "scheduler", "datatype": "BYTES", "shape": [2, 1], "data": ["euler", "euler"]}]}  # fmt: skip
    status, answer = post(running, "pipeline", body)
    assert status == 200
    actual = {item["name"]: np.array(item["data"]).reshape(item["shape"]) for item in answer["outputs"]}
    exact = ask(client, class_labels=[1, 9], seed=[2**63, 3], scheduler=b"euler")
    assert np.array_equal(actual["latents"].astype(np.float32), exact["latents"])
    assert np.array_equal(actual["images"], exact["images"])
    assert actual["seed"].tolist() == [[2**63], [3]]


def test_pictures_are_pytorchs(client: Any) -> None:
    reference = load_reference("dit-digits")
    noise, labels = reference.noise(4, 11), np.arange(4, dtype=np.int64)
    exact = reference.draw(reference.forward, noise, labels, steps=SERVED_STEPS, guidance=2.0)
    actual = ask(client, class_labels=labels, latents=noise)["latents"]
    assert sqnr(exact, actual) > 20  # the limit that the export itself holds for every call


def test_an_absent_seed_is_chosen_and_repeats(client: Any) -> None:
    first, second = ask(client, class_labels=[1, 1]), ask(client, class_labels=[1])
    assert len({*first["seed"].ravel().tolist(), *second["seed"].ravel().tolist()}) == 3
    assert not np.array_equal(first["latents"][:1], second["latents"])
    assert np.array_equal(ask(client, class_labels=[1, 1], seed=first["seed"])["latents"], first["latents"])


def test_each_picture_depends_on_its_label_and_seed_alone(client: Any) -> None:
    both = ask(client, class_labels=[4, 6], seed=[3, 9])["latents"]
    assert np.array_equal(both[:1], ask(client, class_labels=[4], seed=3)["latents"])
    assert np.array_equal(both[1:], ask(client, class_labels=[6], seed=9)["latents"])


def test_a_request_for_seeds_draws_nothing(client: Any) -> None:
    import tritonclient.grpc as grpc

    _, calls = settled(client)
    outputs = [grpc.InferRequestedOutput("seed")]
    actual = client.infer("pipeline", tensors(class_labels=[4, 6], seed=[3, 9]), outputs=outputs, client_timeout=LONGEST)
    assert actual.as_numpy("seed").tolist() == [[3], [9]]
    assert settled(client)[1] == calls


def test_requests_share_calls_with_equal_results(client: Any) -> None:
    outputs = [
        {"class_labels": [i % 10], "seed": i, "num_inference_steps": 6 + 7 * (i % 4), "guidance_scale": 1 + i % 2}
        for i in range(32)
    ]
    alone = [ask(client, **request)["latents"] for request in outputs]
    rows, calls = settled(client)
    with ThreadPoolExecutor(len(outputs)) as pool:
        together = list(pool.map(lambda request: ask(client, **request)["latents"], outputs))
    more_rows, more_calls = settled(client)
    equal = [np.array_equal(a, b) for a, b in zip(alone, together, strict=True)]
    # Earlier versions of ONNX Runtime add in another order in calls of one row: those of one request without guidance.
    exact = [version() >= BYTES_SINCE or request["guidance_scale"] > 1 for request in outputs]
    assert all(a or not b for a, b in zip(equal, exact, strict=True))
    assert more_rows - rows == sum(r["num_inference_steps"] * r["guidance_scale"] for r in outputs)
    assert (more_rows - rows) / (more_calls - calls) > 6  # of 16; alone it is 1 or 2


def test_a_late_request_joins_at_the_next_step(client: Any) -> None:
    done: queue.Queue[str] = queue.Queue()
    rows, calls = settled(client)
    client.async_infer("pipeline", tensors(class_labels=[1], num_inference_steps=100), lambda result, error: done.put("early"))
    while executions(client)[1] < calls + 20:
        time.sleep(0.002)
    client.async_infer("pipeline", tensors(class_labels=[2], num_inference_steps=5), lambda result, error: done.put("late"))
    assert [done.get(timeout=30), done.get(timeout=30)] == ["late", "early"]
    more_rows, more_calls = settled(client)
    assert (more_rows - rows, more_calls - calls) == (2 * 105, 100)  # the five steps of the second cost no call of their own


def stream(client: Any, answers: queue.Queue[Any], **inputs: Any) -> None:
    client.start_stream(callback=lambda result, error: answers.put((result, error)))
    client.async_stream_infer("pipeline_stream", tensors(**inputs))


def test_previews_come_every_k_steps_and_the_last_is_the_picture(client: Any) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    stream(client, answers, class_labels=[7], seed=1, num_inference_steps=10, preview_every=4)
    actual = []
    for _ in range(3):
        result, error = answers.get(timeout=30)
        assert error is None
        actual.append((int(result.as_numpy("step")[0, 0]), result.as_numpy("latents")))
    client.stop_stream()
    exact = ask(client, class_labels=[7], seed=1, num_inference_steps=10)["latents"]
    assert [step for step, _ in actual] == [4, 8, 0]
    assert np.array_equal(actual[-1][1], exact)
    assert sqnr(exact, actual[0][1]) < sqnr(exact, actual[1][1])  # the prediction grows nearer to the picture
    assert sqnr(exact, actual[1][1]) > 10


def test_a_cancelled_stream_frees_the_denoiser(client: Any) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    stream(client, answers, class_labels=[7] * 8, num_inference_steps=100, preview_every=1)
    assert answers.get(timeout=30)[1] is None
    client.stop_stream(cancel_requests=True)
    _, calls = executions(client)
    time.sleep(0.5)  # far less than 100 steps of 16 rows take
    _, settled = executions(client)
    time.sleep(0.5)
    assert executions(client)[1] == settled
    assert settled < calls + 95


def test_a_cancelled_unary_request_frees_the_denoiser(client: Any) -> None:
    failed: queue.Queue[Any] = queue.Queue()
    _, calls = executions(client)
    call = client.async_infer(
        "pipeline", tensors(class_labels=[7] * 8, num_inference_steps=100), lambda result, error: failed.put(error)
    )
    while executions(client)[1] < calls + 3:
        time.sleep(0.002)
    call.cancel()
    assert "CANCELLED" in str(failed.get(timeout=30))
    time.sleep(0.5)
    _, settled = executions(client)
    time.sleep(0.5)
    assert executions(client)[1] == settled
    assert settled < calls + 95


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("label too great", {"class_labels": [3, 10]}, "class_labels: expected 0 to 9, found 10"),
    ("label negative", {"class_labels": [-1]}, "class_labels: expected 0 to 9, found -1"),
    ("no label", {"class_labels": np.zeros(0, dtype=np.int64)}, "input byte size mismatch for input 'class_labels'"),
    ("too many pictures", {"class_labels": [0] * 9}, "inference request batch-size must be <= 8"),
    ("labels in two dimensions", {"class_labels": [[1, 2]]}, "unexpected shape for input 'class_labels'"),
    ("no steps", {"class_labels": [1], "num_inference_steps": 0}, "num_inference_steps 0: expected 1 to 100"),
    ("endless steps", {"class_labels": [1], "num_inference_steps": 100_000}, "num_inference_steps 100000: expected 1 to 100"),
    ("two step counts", {"class_labels": [1], "num_inference_steps": [3, 4]}, "batch size does not match other inputs"),
    ("other steps a picture", {"class_labels": [1, 2], "num_inference_steps": [3, 4]}, "num_inference_steps: expected one value"),
    ("a guidance a picture", {"class_labels": [1, 2], "guidance_scale": [1.0, 2.0]}, "guidance_scale: expected one value"),
    ("a scheduler a picture", {"class_labels": [1, 2], "scheduler": [b"ddim", b"euler"]}, "scheduler: expected one value"),
    ("a long scheduler", {"class_labels": [1], "scheduler": b"x" * 100_000}, f"scheduler '{'x' * 40}': expected ddim"),
    ("unknown scheduler", {"class_labels": [1], "scheduler": b"pndm"}, "scheduler 'pndm': expected ddim, dpmsolver++, euler"),
    ("no text", {"class_labels": [1], "scheduler": b"\xff"}, "found text that is not UTF-8"),
    ("another size", {"class_labels": [1], "height": 32}, "height 32: expected 16, the only height that this model was exported"),
    ("NaN guidance", {"class_labels": [1], "guidance_scale": np.nan}, "guidance_scale: expected a finite number"),
    ("negative guidance", {"class_labels": [1], "guidance_scale": -1.0}, "guidance_scale: expected a finite number"),
    ("NaN latents", {"class_labels": [1], "latents": np.full((1, 1, 16, 16), np.nan)}, "latents: NaN or Inf"),
    ("other latents", {"class_labels": [1], "latents": np.zeros((1, 1, 8, 8))}, "unexpected shape for input 'latents'"),
    ("latents for others", {"class_labels": [1], "latents": np.zeros((2, 1, 16, 16))}, "batch size does not match other inputs"),
]  # fmt: skip


@pytest.mark.parametrize(("inputs", "message"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_a_bad_request_gets_an_error_that_names_the_fault(client: Any, inputs: dict[str, Any], message: str) -> None:
    status, reason = refused(client, **inputs)
    assert status == "INVALID_ARGUMENT"
    assert message in reason


def test_a_wrong_type_and_an_unknown_input_are_refused(client: Any, running: server.Server) -> None:
    label = {"name": "class_labels", "datatype": "FP32", "shape": [1, 1], "data": [1.0]}
    status, message = post(running, "pipeline", {"inputs": [label]})
    assert status == 400
    assert "data-type" in message["error"]
    extra = {"name": "prompt", "datatype": "BYTES", "shape": [1, 1], "data": ["a seven"]}
    status, message = post(running, "pipeline", {"inputs": [{**label, "datatype": "INT64", "data": [1]}, extra]})
    assert status == 400
    assert "prompt" in message["error"]


def test_a_bad_stream_request_gets_an_error_that_names_the_fault(client: Any) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    stream(client, answers, class_labels=[1], preview_every=-1)
    _, error = answers.get(timeout=30)
    client.stop_stream()
    assert "preview_every: expected 0" in str(error)


def test_a_denoiser_batch_above_the_maximum_is_refused(client: Any) -> None:
    states = np.zeros((17, 1, 16, 16), dtype=np.float32)
    zeros = np.zeros((17, 1), dtype=np.int64)
    status, message = refused(client, "denoiser", hidden_states=states, timestep=zeros, class_labels=zeros)
    assert status == "INVALID_ARGUMENT"
    assert "16" in message


def test_someone_elses_bad_label_harms_nobody(client: Any) -> None:
    """The denoiser's own clients can ask for a label that it does not have, which fails every request of a dynamic batch."""
    requests = [{"class_labels": [i], "seed": i, "num_inference_steps": 30} for i in range(8)]
    exact = [ask(client, **request)["latents"] for request in requests]
    stop, poisoned = threading.Event(), [0]

    def poison() -> None:
        states = np.zeros((1, 1, 16, 16), dtype=np.float32)
        while not stop.is_set():
            status, _ = refused(client, "denoiser", hidden_states=states, timestep=[[1]], class_labels=[[99]])
            poisoned[0] += status == "INTERNAL"

    with ThreadPoolExecutor(10) as pool:
        poisoners = [pool.submit(poison) for _ in range(2)]
        try:
            actual = list(pool.map(lambda request: ask(client, **request)["latents"], requests))
        finally:
            stop.set()
        for item in poisoners:
            item.result()
    assert poisoned[0] > 10
    assert all(np.array_equal(a, b) for a, b in zip(exact, actual, strict=True))


def test_clients_that_hang_up_harm_nobody(client: Any, running: server.Server) -> None:
    exact = ask(client, class_labels=[5], seed=5)["latents"]
    host, port = running.http.split(":")
    body = json.dumps({"inputs": [{"name": "class_labels", "datatype": "INT64", "shape": [1, 1], "data": [1]}]}).encode()
    head = f"POST /v2/models/pipeline/infer HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    for cut in (head[:40], head + body[:20], head + body):
        for _ in range(5):
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(cut)
    assert np.array_equal(ask(client, class_labels=[5], seed=5)["latents"], exact)


def test_a_denoiser_that_goes_and_comes_back(client: Any) -> None:
    """In the middle of a picture the denoiser is unloaded: its client hears why, and the next one, later, gets its picture."""
    exact = ask(client, class_labels=[5], seed=5)["latents"]
    failed: queue.Queue[Any] = queue.Queue()
    _, calls = executions(client)
    client.async_infer("pipeline", tensors(class_labels=[1], num_inference_steps=100), lambda result, error: failed.put(error))
    while executions(client)[1] < calls + 5:
        time.sleep(0.002)
    client.unload_model("denoiser")
    error = failed.get(timeout=30)
    assert "denoiser" in str(error)
    status, message = refused(client, class_labels=[1])
    assert status == "INTERNAL"
    assert "denoiser" in message
    client.load_model("denoiser")
    assert np.array_equal(ask(client, class_labels=[5], seed=5)["latents"], exact)


def test_too_many_requests_are_sent_away_and_those_inside_are_served(client: Any) -> None:
    described = client.get_model_config("pipeline", as_json=True)["config"]
    described["parameters"]["max_requests"]["string_value"] = "3"
    client.load_model("pipeline", config=json.dumps(described))
    try:
        answers: queue.Queue[Any] = queue.Queue()
        for _ in range(6):
            client.async_infer(
                "pipeline", tensors(class_labels=[1], num_inference_steps=100), lambda result, error: answers.put(error)
            )
        errors = [answers.get(timeout=30) for _ in range(6)]
        message = [error for error in errors if error is not None]
        assert len(message) == 3
        assert all("UNAVAILABLE" in str(error.status()) and "3 requests are being sampled" in str(error) for error in message)
    finally:
        client.unload_model("pipeline")
        client.load_model("pipeline")


def test_unloading_in_the_middle_answers_everyone(client: Any) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    _, calls = executions(client)
    for _ in range(4):
        client.async_infer(
            "pipeline", tensors(class_labels=[1], num_inference_steps=50), lambda result, error: answers.put((result, error))
        )
    while executions(client)[1] < calls + 5:
        time.sleep(0.002)
    client.unload_model("pipeline")
    ends = [answers.get(timeout=60) for _ in range(4)]
    client.load_model("pipeline")
    # Triton waits for requests in flight before it ends a model, so all are served, or told.
    assert all(result is not None or "shutting down" in str(error) for result, error in ends)


def test_memory_stays_flat_over_a_thousand_bad_requests(client: Any, running: server.Server) -> None:
    def round_of(count: int) -> float:
        for index in range(count):
            refused(client, **BAD[index % len(BAD)][1])
        return memory(running.process.pid)

    round_of(300)
    before = round_of(50)
    after = round_of(1000)
    assert after - before < 2.0  # MB; a leaked request of the least size would be 1 MB of shared memory a thousand


def test_the_shipped_client_draws_and_reports(running: server.Server, exported: Path, tmp_path: Path) -> None:
    from PIL import Image

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(exported / "triton" / "client.py"), "--url", running.grpc, *words]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)

    result = run("--labels", "0,1,2", "--steps", "8", "--seed", "4", "-o", "digits.png")
    assert (result.returncode, result.stdout) == (0, "digits.png: seeds 4, 5, 6\n"), result.stderr
    with Image.open(tmp_path / "digits.png") as picture:
        assert picture.size == (48, 16)
    result = run("--labels", "3", "--steps", "8", "--preview-every", "4", "-o", "three.png")
    assert result.returncode == 0, result.stderr
    assert {path.name for path in tmp_path.glob("three*")} == {"three-4.png", "three.png"}
    result = run("--labels", "12")
    assert (result.returncode, result.stderr) == (1, "error: class_labels: expected 0 to 9, found 12\n")
    for wrong in (("--labels", "1,²"), ("--labels", "1,"), ("--seed", "-1"), ("--seed", str(2**64)), ("--steps", "9" * 5000)):
        result = run(*wrong)
        assert result.returncode == 2
        assert f"argument {wrong[0]}: expected a whole number from 0" in result.stderr
    result = run("--labels", "1", "-o", "missing/picture.png")
    assert (result.returncode, result.stderr.startswith("error: ")) == (1, True)


def test_metrics_count_rows_and_calls(client: Any, running: server.Server) -> None:
    def counted() -> tuple[float, ...]:
        with urllib.request.urlopen(f"http://{running.metrics}/metrics", timeout=10) as answer:
            lines = dict(line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if not line.startswith("#"))
        return tuple(
            float(lines[f'{name}{{model="denoiser",version="1"}}']) for name in ("nv_inference_count", "nv_inference_exec_count")
        )

    settled(client)
    before = counted()
    ask(client, class_labels=[1, 2], num_inference_steps=7)
    settled(client)
    assert tuple(b - a for a, b in zip(before, counted(), strict=True)) == (28, 7)
