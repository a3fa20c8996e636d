"""A few hundred inputs of the fuzzer and some runs of the sweep; the rest is `benchmarks/fuzz.py` and `benchmarks/sweep.py`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from fuzzing.judge import last_frame, traceback_kind
from fuzzing.pairs import Pairs

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], cwd=BENCHMARKS, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("inputs", [20, pytest.param(250, marks=pytest.mark.slow)])
def test_no_input_ends_in_a_traceback_or_a_hang_or_outside_its_folder(inputs: int, tmp_path: Path) -> None:
    result = run("fuzz.py", "--inputs", str(inputs), "--seed", "1", "--keep", str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    assert " 0 faults of 0 kinds" in result.stdout
    assert any(f"| all | {number} |" in result.stdout for number in range(inputs - 10, inputs + 10))


@pytest.mark.slow
def test_random_models_are_refused_before_work_or_audited(tmp_path: Path) -> None:
    result = run("sweep.py", "--runs", "8", "--seed", "1", "--keep", str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    assert "| all | 8 |" in result.stdout


FAULTY = """
import json, os, sys, time
from pathlib import Path
from fuzzing.cases import Format, guarded
from fuzzing.fork_server import Limits, serve
from fuzzing.judge import judge

def wait(): time.sleep(60)
def fill(): held = bytearray(400 << 20); time.sleep(1)
def reserve(): bytearray(8 << 30)
def trip(): [][1]
def die(): os.abort()
def leave(): Path("../guard/new").write_text("x")
def refuse(): print("error: file x: no", file=sys.stderr); sys.exit(2)
def mutter(): sys.exit(2)
def shout(): print("error: " + "x" * 5000, file=sys.stderr); sys.exit(2)
def pass_(): print("all is well")

def job(name):
    root = Path(sys.argv[1]) / name
    (root / "work").mkdir(parents=True)
    (root / "guard").mkdir()
    def work():
        (root / "case.json").write_text(json.dumps({"words": ["x"], "mutation": "", "writes": ["work/out"]}))
        (root / "before.json").write_text(json.dumps(guarded(root)))
        os.chdir(root / "work")
        globals()[name]()
    return root, work

names = ["wait", "fill", "reserve", "trip", "die", "leave", "refuse", "mutter", "shout", "pass_"]
limits = Limits(seconds=3, memory=200 << 20, address_space=1 << 30)
form = Format("any", 1, None)
for root, outcome in serve(map(job, names), limits=limits):
    print(root.name, judge(form, root, outcome, {}).ending, sep="=")
"""


def test_the_fuzzer_sees_every_kind_of_fault(tmp_path: Path) -> None:
    result = run("-c", FAULTY, str(tmp_path))
    assert dict(line.split("=") for line in result.stdout.splitlines()) == {
        "wait": "hang",
        "fill": "memory",
        "reserve": "memory",
        "trip": "traceback",
        "die": "crash",
        "leave": "outside",
        "refuse": "refused",
        "mutter": "no message",
        "shout": "long message",
        "pass_": "other verdict",
    }, result.stderr


def test_a_traceback_is_known_by_its_exception_and_the_products_innermost_frame() -> None:
    text = """warning: something
Traceback (most recent call last):
  File "/here/dq_export/cli.py", line 5, in main
    app()
  File "/here/calibration/recipe.py", line 7, in read
    parse()
  File "/here/site-packages/yaml/__init__.py", line 9, in load
    x
yaml.error.MarkedYAMLError: line 1
  column 2
"""
    assert traceback_kind(text) == "MarkedYAMLError in calibration/recipe.py:read"
    assert last_frame("") == ""


def test_all_pairs_are_covered_when_nothing_is_refused() -> None:
    pairs = Pairs({"a": (0, 1, 2), "b": ("x", "y"), "c": (None, True)}, seed=0)
    assert pairs.total == 3 * 2 + 3 * 2 + 2 * 2
    runs = []
    while pairs.open and len(runs) < 40:
        indices = pairs.next()
        pairs.passed(indices)
        runs.append(tuple(pairs.values(indices).items()))
    orders = {(first, second) for run_ in runs for first in run_ for second in run_ if first[0] < second[0]}
    assert len(orders) == pairs.total
    assert len(runs) < 12  # all combinations are 12


@pytest.mark.parametrize("seed", [0, 1])
def test_a_pair_that_is_always_refused_is_given_up(seed: int) -> None:
    pairs = Pairs({"a": (0, 1), "b": (0, 1)}, seed)
    for _ in range(60):
        indices = pairs.next()
        (pairs.refused if indices == {"a": 1, "b": 1} else pairs.passed)(indices)
    assert not pairs.open
