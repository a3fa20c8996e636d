"""Continuous batching, with a network of one line in place of the server's."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from dq_export.deploy.triton.serving.job import DenoiserError, Job
from dq_export.deploy.triton.serving.sampler import AbandonedError, BusyError, Sampler
from dq_export.deploy.triton.serving.schedules import Step

SHAPE = (1, 2, 2)


class Client:
    """Records its calls."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.latents: Any = None
        self.error: Exception | None = None
        self.previews: list[int] = []
        self.left = False

    def preview(self, step: int, latents: Any) -> None:
        self.previews.append(step)

    def done(self, latents: Any) -> None:
        self.latents = latents
        self.ended.set()

    def failed(self, error: Exception) -> None:
        self.error = error
        self.ended.set()

    def disconnected(self) -> bool:
        return self.left

    def wait(self) -> Client:
        assert self.ended.wait(10)
        return self


class Network:
    """latents * timestep / 1000 + label, and a record of its calls. A label above 90 fails the whole call."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.gate = threading.Semaphore(0)
        self.open = True

    def __call__(self, states: Any, timestep: Any, conditions: Any) -> Any:
        labels = conditions["labels"]
        if not self.open:
            assert self.gate.acquire(timeout=10)
        self.calls.append([int(label) for label in labels])
        if labels.max() > 90:
            raise DenoiserError("index out of range")
        return states * (timestep / 1000).astype(np.float32)[:, None, None, None] + labels[:, None, None, None].astype(np.float32)


def job(
    label: int = 1,
    steps: int = 4,
    *,
    pictures: int = 1,
    guidance: float = 1.0,
    interval: int = 0,
    shape: tuple[int, ...] = SHAPE,
) -> Job:
    table = tuple(Step(100.0 * (steps - i), 1.0, 1.0, 0.5, 0.25, 0.1, 0.05, 1.0, -0.5) for i in range(steps))
    labels = np.repeat([label, 0] if guidance > 1 else [label], pictures)
    return Job(
        client=Client(), steps=table, latents=np.ones((pictures, *shape), dtype=np.float32),
        conditions=lambda: {"labels": labels}, guidance=guidance, preview_interval=interval,
    )  # fmt: skip


def alone(job_: Job) -> Any:
    """The same job without a sampler."""
    network = Network()
    while job_.at < len(job_.steps):
        job_.advance(network(*job_.feed()))
    return job_.latents


@pytest.fixture
def network() -> Network:
    return Network()


@pytest.fixture
def start(network: Network) -> Iterator[Callable[..., Sampler]]:
    started = []

    def make(**options: int) -> Sampler:
        started.append(Sampler(network, **{"max_rows": 8, "max_jobs": 20, "lanes": 1, **options}))
        return started[-1]

    yield make
    network.open = True
    network.gate.release(1000)
    for sampler in started:
        sampler.close()


def client(job_: Job) -> Client:
    assert isinstance(job_.client, Client)
    return job_.client


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_every_job_gets_the_same_result_as_alone(start: Callable[..., Sampler], lanes: int) -> None:
    requests = [{"label": i, "steps": 1 + i % 5, "pictures": 1 + i % 3, "guidance": 1.0 + i % 2} for i in range(20)]
    sampler = start(lanes=lanes)
    jobs = [job(**options) for options in requests]  # type: ignore[arg-type]
    for item in jobs:
        sampler.submit(item)
    for item, options in zip(jobs, requests, strict=True):
        assert np.array_equal(client(item).wait().latents, alone(job(**options)))  # type: ignore[arg-type]


def test_a_job_joins_the_others_at_the_next_call(start: Callable[..., Sampler], network: Network) -> None:
    network.open = False
    sampler, first, second = start(), job(1, steps=4), job(2, steps=2)
    sampler.submit(first)
    network.gate.release()
    until(lambda: len(network.calls) == 1)
    sampler.submit(second)
    network.gate.release(3)
    client(first).wait()
    client(second).wait()
    assert network.calls in ([[1], [1, 2], [1, 2], [1]], [[1], [1], [1, 2], [1, 2]])


def test_calls_stay_below_the_greatest_batch_and_order_is_kept(start: Callable[..., Sampler], network: Network) -> None:
    network.open = False
    sampler = start(max_rows=4)
    jobs = [job(label, steps=2, guidance=2.0, pictures=pictures) for label, pictures in ((1, 1), (2, 2), (3, 1))]
    for item in jobs:
        sampler.submit(item)
    until(lambda: client(jobs[0]).ended.is_set() or network.gate.release() or False)
    network.open = True
    network.gate.release(20)
    for item in jobs:
        client(item).wait()
    assert max(map(len, network.calls)) == 4
    # The second needs 4 rows and waits for the first; the third would fit beside the first, but came later.
    assert [sorted(set(call) - {0}) for call in network.calls] == [[1], [1], [2], [2], [3], [3]]


def test_a_lane_takes_jobs_that_do_not_fit_into_the_one_before(start: Callable[..., Sampler], network: Network) -> None:
    network.open = False
    sampler = start(max_rows=2, lanes=2)
    jobs = [job(label, steps=1) for label in (1, 2, 3)]
    for item in jobs:
        sampler.submit(item)
    until(lambda: [len(lane) for lane in sampler.lanes] in ([2, 1], [1, 2]) or not sampler.waiting)
    network.open = True
    network.gate.release(20)
    for item in jobs:
        client(item).wait()
    assert sorted(label for call in network.calls for label in call) == [1, 2, 3]


TALL = (1, 3, 2)


@pytest.mark.parametrize("lanes", [1, 2])
def test_jobs_of_one_size_share_calls_and_every_size_gets_the_result_of_alone(
    start: Callable[..., Sampler], network: Network, lanes: int
) -> None:
    network.open = False
    sampler = start(lanes=lanes)
    requests: list[dict[str, Any]] = [{"label": i, "shape": (SHAPE, TALL, (1, 1, 5))[i % 3]} for i in range(1, 13)]
    jobs = [job(**options) for options in requests]
    for item in jobs:
        sampler.submit(item)
    network.open = True
    network.gate.release(50)
    for item, options in zip(jobs, requests, strict=True):
        assert np.array_equal(client(item).wait().latents, alone(job(**options)))
    assert all(len({label % 3 for label in call}) == 1 for call in network.calls)
    assert max(map(len, network.calls)) == 4
    assert len(sampler.joined) <= 3


def test_sizes_take_turns_and_each_has_the_whole_of_a_call(start: Callable[..., Sampler], network: Network) -> None:
    network.open = False
    sampler = start(max_rows=2)
    first = job(1, steps=3)
    sampler.submit(first)
    until(lambda: sampler.lanes[0])
    others = [job(2, steps=1), job(3, steps=1, shape=TALL), job(4, steps=1, shape=TALL), job(5, steps=1, shape=TALL), job(6)]
    for item in others:
        sampler.submit(item)
    network.open = True
    network.gate.release(50)
    for item in (first, *others):
        client(item).wait()
    # 6 waits for a row beside 1, and 5 for a row of its own size; neither waits for the other size.
    assert network.calls[:5] == [[1], [1, 2], [3, 4], [1, 6], [5]]


def test_only_the_guilty_fail(start: Callable[..., Sampler], network: Network) -> None:
    network.open = False
    sampler, jobs = start(), [job(1), job(99), job(2)]
    for item in jobs:
        sampler.submit(item)
    network.open = True
    network.gate.release(50)
    for item in jobs:
        client(item).wait()
    assert isinstance(client(jobs[1]).error, DenoiserError)
    assert np.array_equal(client(jobs[0]).latents, alone(job(1)))
    assert np.array_equal(client(jobs[2]).latents, alone(job(2)))
    filled = [call for call in network.calls if len(call) == 8]
    assert [1, 1, 1, 1, 1, 1, 1, 1] in filled  # alone in a full call, which no other caller's rows can join


def test_a_call_that_fails_by_other_rows_is_repeated_once_for_all_jobs(network: Network) -> None:
    """The server has put another client's bad label into the same batch."""
    struck = [True]

    def denoise(*feed: Any) -> Any:
        output = network(*feed)
        if len(network.calls[-1]) == 2 and struck:
            struck.pop()
            raise DenoiserError("index out of range")
        return output

    network.open = False
    sampler, jobs = Sampler(denoise, max_rows=8, max_jobs=8, lanes=1), [job(1, steps=9), job(2, steps=9)]
    for item in jobs:
        sampler.submit(item)
    network.open = True
    network.gate.release(50)
    for item, label in zip(jobs, (1, 2), strict=True):
        assert np.array_equal(client(item).wait().latents, alone(job(label, steps=9)))
    sampler.close()
    assert not struck
    assert [call for call in network.calls if len(call) == 8] == [[1, 2, 1, 2, 1, 2, 1, 2]]


def test_an_output_that_is_not_finite_fails_its_job_alone(start: Callable[..., Sampler]) -> None:
    sampler, bad, good = start(), job(1), job(2)
    bad.latents[0, 0, 0, 0] = np.nan
    sampler.submit(bad)
    sampler.submit(good)
    assert "not finite at step 1" in str(client(bad).wait().error)
    assert np.array_equal(client(good).wait().latents, alone(job(2)))


def test_conditions_that_cannot_be_computed_fail_their_job_alone(start: Callable[..., Sampler], network: Network) -> None:
    def fails() -> Any:
        raise DenoiserError("text_encoder: gone")

    network.open = False
    sampler, first, bad, good = start(), job(3, steps=2), job(1), job(2)
    bad.conditions = fails
    for item in (first, bad, good):
        sampler.submit(item)
    network.open = True
    network.gate.release(50)
    assert str(client(bad).wait().error) == "text_encoder: gone"
    assert np.array_equal(client(good).wait().latents, alone(job(2)))
    assert np.array_equal(client(first).wait().latents, alone(job(3, steps=2)))


def test_the_sampler_continues_after_an_unexpected_error(network: Network) -> None:
    broken = [True]

    def denoise(*feed: Any) -> Any:
        if broken.pop() if broken else False:
            raise ZeroDivisionError("unforeseen")
        return network(*feed)

    sampler, first = Sampler(denoise, max_rows=8, max_jobs=8, lanes=1), job(1)
    sampler.submit(first)
    assert isinstance(client(first).wait().error, ZeroDivisionError)
    second = job(2)
    sampler.submit(second)
    assert np.array_equal(client(second).wait().latents, alone(job(2)))
    sampler.close()


def test_too_many_are_sent_away(start: Callable[..., Sampler], network: Network) -> None:
    network.open = False
    sampler, jobs = start(max_jobs=3), [job(1) for _ in range(3)]
    for item in jobs:
        sampler.submit(item)
    with pytest.raises(BusyError, match="3 requests are being sampled or wait"):
        sampler.submit(job(1))
    network.open = True
    network.gate.release(50)
    for item in jobs:
        client(item).wait()
    sampler.submit(job(1))


def test_jobs_of_clients_that_left_are_dropped_running_or_waiting(
    start: Callable[..., Sampler], network: Network, monkeypatch: Any
) -> None:
    monkeypatch.setattr("dq_export.deploy.triton.serving.sampler.WATCH", 0.0)
    network.open = False
    sampler, running, waiting, stays = start(max_rows=1), job(1, steps=50), job(2, steps=50), job(3, steps=2)
    for item in (running, waiting, stays):
        sampler.submit(item)
    client(waiting).left = client(running).left = True
    network.open = True
    network.gate.release(200)
    assert isinstance(client(running).wait().error, AbandonedError)
    assert isinstance(client(waiting).wait().error, AbandonedError)
    assert np.array_equal(client(stays).wait().latents, alone(job(3, steps=2)))
    assert len(network.calls) < 10


def test_closing_ends_every_job(network: Network) -> None:
    network.open = False
    sampler = Sampler(network, max_rows=1, max_jobs=8, lanes=1)
    jobs = [job(1), job(2)]
    for item in jobs:
        sampler.submit(item)
    network.gate.release(1)
    network.open = True
    sampler.close()
    for item in jobs:
        ended = client(item).wait()
        assert ended.latents is not None or "shutting down" in str(ended.error)
    with pytest.raises(BusyError, match="shutting down"):
        sampler.submit(job(3))


def test_previews_come_every_k_steps_but_not_with_the_last(start: Callable[..., Sampler]) -> None:
    sampler, job_ = start(), job(1, steps=6, interval=2)
    sampler.submit(job_)
    assert client(job_).wait().previews == [2, 4]


def test_guidance_of_one_needs_one_row_a_picture(start: Callable[..., Sampler], network: Network) -> None:
    sampler, plain, guided = start(), job(5, steps=1), job(5, steps=1, guidance=1.5)
    sampler.submit(plain)
    client(plain).wait()
    sampler.submit(guided)
    client(guided).wait()
    assert network.calls == [[5], [5, 0]]
