"""Calibration on several processes, in little memory, and ended in the middle."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import command_line
import numpy as np
import pytest

from dq_export.core.artifacts import CalibrationResult

SMALL = ("--calib-size", "20", "--steps", "6")


def started(*words: str, processes: int = 1) -> subprocess.Popen[str]:
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", "0", "--standalone"]
    command = [sys.executable, *(torchrun if processes > 1 else []), "-m", "dq_export", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def calibrate(out: Path, *words: str, processes: int = 1) -> subprocess.Popen[str]:
    return started("calibrate", "--model", "dit-digits", "-o", str(out), *words, processes=processes)


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


SLOW = (("--method", "mse"), ("--rounding", "gptq", "--bits", "w4a8"))


@pytest.mark.parametrize("more", [("--method", "minmax"), *(pytest.param(words, marks=pytest.mark.slow) for words in SLOW)])
def test_two_processes_give_the_file_of_one_bit_for_bit(more: tuple[str, ...], tmp_path: Path) -> None:
    words = (*SMALL, *more)  # three batches: one process samples two of them
    one = command_line.call("calibrate", "--model", "dit-digits", "-o", tmp_path / "one", *words)
    assert one.returncode == 0, one.stderr
    finish(calibrate(tmp_path / "two", *words, processes=2))
    name = "calibration.safetensors"
    assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


@pytest.mark.slow
def test_two_processes_keep_what_one_calibrated(tmp_path: Path) -> None:
    words = (*SMALL, "--method", "minmax")
    finish(calibrate(tmp_path / "two", *words))
    output = finish(calibrate(tmp_path / "two", *words, processes=2))
    assert "calibrate done: 24 inputs" in output
    assert "kept from an earlier run" in output


def workers(torchrun: int) -> dict[int, int]:
    """Process id by rank of the processes that torchrun started."""
    counts = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            environment = (entry / "environ").read_bytes().split(b"\0")
        except (OSError, IndexError):
            continue
        ranks = [int(item.split(b"=")[1]) for item in environment if item.startswith(b"RANK=")]
        if parent == torchrun and ranks:
            counts[ranks[0]] = int(entry.name)
    return counts


@pytest.mark.slow
def test_a_process_that_dies_ends_the_run_and_finished_batches_are_kept(tmp_path: Path) -> None:
    words = ("--calib-size", "40", "--steps", "12")
    process = calibrate(tmp_path / "out", *words, processes=2)
    journal = tmp_path / "out" / ".calibration" / "journal.0.json"
    deadline = time.monotonic() + 120
    while not journal.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(workers(process.pid)[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "another process of the run" in output
    assert journal.exists()
    before = journal.stat().st_mtime_ns
    output = finish(calibrate(tmp_path / "out", *words, processes=2))
    assert before > 0
    assert not journal.exists(), "what was gathered is deleted with the calibration finished"
    finish(calibrate(tmp_path / "alone", *words))
    name = "calibration.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


@pytest.mark.slow
def test_a_calibration_that_was_killed_goes_on_behind_its_finished_batches(tmp_path: Path) -> None:
    words = ("--calib-size", "40", "--steps", "12")
    process = calibrate(tmp_path / "out", *words)
    journal = tmp_path / "out" / ".calibration" / "journal.0.json"
    deadline = time.monotonic() + 120
    while not journal.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert journal.exists()
    finish(calibrate(tmp_path / "out", *words))
    finish(calibrate(tmp_path / "alone", *words))
    name = "calibration.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def test_only_a_calibration_is_shared(tmp_path: Path) -> None:
    environment = {**os.environ, "WORLD_SIZE": "2", "RANK": "0"}
    command = [sys.executable, "-m", "dq_export", "--model", "dit-digits", "-o", str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 2
    assert "2 processes share only a calibration and a training: run `torchrun" in result.stderr


@pytest.mark.slow
def test_two_processes_train_what_one_trains(tiny_folder: Path, tmp_path: Path) -> None:
    """The order of sums differs, so a few codes differ by one."""
    quick = ("--calib-size", "9", "--steps", "4", "--bits", "w4a4", "--rounding", "gptq", "--guidance-scale", "1")
    training = ("--distill-iterations", "40", "--distill-batch", "7")  # an odd number of samples between two
    finish(started("calibrate", "--model", str(tiny_folder), "-o", str(tmp_path / "one"), *quick))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    finish(started("distill", str(tmp_path / "one"), *training))
    output = finish(started("distill", str(tmp_path / "two"), *training, processes=2))
    assert output.count("distill   done") == 1
    assert not (tmp_path / "two" / ".training").exists()
    one, two = (CalibrationResult.load(tmp_path / name / "distilled.safetensors") for name in ("one", "two"))
    start = CalibrationResult.load(tmp_path / "one" / "calibration.safetensors")
    for name, codes in one.codes.items():
        moved, other = (np.abs(item.codes[name].astype(int) - codes) for item in (start, two))
        assert moved.any(), name
        assert other.mean() < 0.2 * moved.mean(), name
    for name, plan in one.sites.items():
        assert plan.activation is not None
        np.testing.assert_allclose(two.sites[name].activation.scale, plan.activation.scale, rtol=0.01)


def peak(out: Path, pictures: int, steps: int) -> float:
    """MB that a calibration of dit-digits takes at most."""
    process = calibrate(out, "--calib-size", str(pictures), "--steps", str(steps), "--guidance-scale", "1", "--quiet")
    assert process.stdout
    with process.stdout:
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss * 1024 / 1e6


@pytest.mark.slow
def test_memory_grows_neither_with_the_pictures_nor_with_the_steps(tmp_path: Path) -> None:
    """Kept for each step in memory, as (low, high) of 8,064 channels, 500 steps would take 32 MB more; rows far more."""
    smallest = peak(tmp_path / "least", 8, 4)
    assert peak(tmp_path / "pictures", 64, 4) < smallest + 12
    assert peak(tmp_path / "steps", 8, 500) < smallest + 12
