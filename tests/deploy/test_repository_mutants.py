"""Repositories that somebody damaged, or made to do harm: `triton --check` answers every one with faults, in lines of text."""

from __future__ import annotations

import os
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import command_line
import numpy as np
import onnx
import pytest

from dq_export.deploy.triton.check import MAX_FAULTS, check_repository
from dq_export.deploy.triton.model_folder import Fault

SECONDS = 10
"""Of one check, which takes 20 ms: a machine at work must not fail the test, a hang must."""
FILES = (
    "denoiser/config.pbtxt", "pipeline/config.pbtxt", "health/config.pbtxt", "pipeline/1/model.py", "health/1/model.py",
    "pipeline/1/schedules.npy", "pipeline/1/network.json", "denoiser/1/model.onnx", "denoiser/1/model.onnx.data",
)  # fmt: skip
TOKENS = (
    "9" * 5000, "-1", "0", "4294967296", "9223372036854775808", "-9223372036854775809", "1e999", "nan", "inf", '"x"',
    "''", "{", "}", "[", "]", "{" * 3000, "[" * 3000, "²", "٣", "\0", "\x1b[31m", "[/]", "true", "99", "TYPE_FP99",
    "#", '"' + "y" * 100_000 + '"', '"\\777"', '"\\ud800"', "dims: 1 " * 2000, ":", "..", "/dev/zero", "",
)  # fmt: skip
PROGRAMS = {
    "brackets": "(" * 100_000, "signs": "-" * 500_000 + "1", "attributes": "x" + ".a" * 50_000, "sums": "1" + "+1" * 100_000,
    "branches": "if a: pass\n" + "elif a: pass\n" * 20_000, "null": "a\0b", "digits": "9" * 10_000, "coding": "# coding: none\n",
    "surrogate": "'\\ud800'", "blocks": "".join("\n" + " " * i + "if 1:" for i in range(200)), "odd escape": "'\\d'",
    "calls": "class TritonPythonModel: x = InferenceRequest(model_name='\\x1b[31m[/]\\ud800')",
}  # fmt: skip
HEADERS = {
    "196 TiB": "{'descr': '<f8', 'fortran_order': False, 'shape': (3, 99999999, 99999), }",
    "objects": "{'descr': '|O', 'fortran_order': False, 'shape': (3,), }",
    "a program": "{'descr': __import__('os').getcwd(), 'shape': (3,), }",
    "brackets": "(" * 9000,
    "signs": "-" * 9000 + "1",
    "negative": "{'descr': '<f8', 'fortran_order': False, 'shape': (-3, 5, 9), }",
    "no dimension": "{'descr': '<f8', 'fortran_order': False, 'shape': (), }",
    "empty": "{'descr': '<f8', 'fortran_order': False, 'shape': (3, 0, 9), }",
    "a great number": f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({'9' * 5000}, 1, 9), }}",
    "other digits": "{'descr': '<f8', 'fortran_order': False, 'shape': (²,), }",
}


@contextmanager
def limited() -> Iterator[None]:
    """Stop what hangs."""

    def stop(number: int, frame: object) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def checked(repository: Path) -> list[Fault]:
    """The faults, each of them a line that any terminal and file takes."""
    with limited():
        faults = check_repository(repository)
    assert len(faults) <= MAX_FAULTS + 1
    for item in faults:
        for text in (item.model, item.problem, item.fix):
            assert text.isprintable()
            assert len(text) <= 300
            text.encode()
    return faults


def wrong(repository: Path) -> str:
    return "\n".join(item.problem for item in checked(repository) if item.severity == "error")


def mutants(content: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Bytes flipped, parts cut, doubled or moved, and words replaced by others that mean harm."""
    choose = random.Random(seed)
    for _ in range(count):
        new = bytearray(content)
        start = choose.randrange(len(new))
        end = min(len(new), start + choose.choice((1, 2, 10, 100, len(new))))
        kind = choose.randrange(5)
        if kind == 0:
            new[start] ^= 1 << choose.randrange(8)
        elif kind == 1:
            del new[start:end]
        elif kind == 2:
            new[start:start] = new[start:end]
        else:
            ends = [i for i in range(start, min(start + 200, len(new))) if new[i : i + 1] in (b" ", b"\n", b'"')]
            first, second = (*ends, start, start)[:2]
            new[first + 1 : second] = choose.choice(TOKENS).encode()
        yield bytes(new)


@pytest.mark.parametrize(("file", "seed"), [(file, seed) for seed, file in enumerate(FILES)])
def test_damaged_files_are_faults_and_no_tracebacks(repository: Path, file: str, seed: int) -> None:
    path = repository / file
    content = path.read_bytes()
    accepted = 0
    for mutant in mutants(content, 60, seed):
        path.write_bytes(mutant)
        accepted += not checked(repository)
    assert accepted < 60  # a change of a comment, or of a weight, is no fault
    path.write_bytes(content)
    assert check_repository(repository) == []


def put_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def put_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def put_link(target: str) -> Callable[[Path], None]:
    def put(path: Path) -> None:
        path.unlink()
        path.symlink_to(target.format(name=path.name))

    return put


def put_zeros(path: Path) -> None:
    path.unlink()
    with path.open("wb") as file:
        file.truncate(3 << 30)  # without a block on the disk


PLACES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a pipe": (put_pipe, "is a pipe, a socket or a device"),
    "an endless device": (put_link("/dev/zero"), "is a link out of the repository"),
    "a link to itself": (put_link("{name}"), "is a link to nothing, or to itself"),
    "a file of others": (put_link("/etc/passwd"), "is a link out of the repository"),
    "a folder": (put_folder, ""),
    "3 GB": (put_zeros, ""),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("place", PLACES)
def test_a_path_that_is_not_a_file_is_a_fault_at_once(repository: Path, file: str, place: str) -> None:
    change, text = PLACES[place]
    change(repository / file)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    actual = wrong(repository)
    assert text in actual
    assert actual or (file.endswith(".data") and place == "3 GB")  # whose graph says what it needs of them
    if not file.endswith("model.onnx"):  # a graph may have 2 GB
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_200_000
    assert time.monotonic() - start < SECONDS


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_that_no_parser_takes(repository: Path, program: str) -> None:
    (repository / "pipeline" / "1" / "model.py").write_text(PROGRAMS[program])
    assert "model.py" in wrong(repository)


@pytest.mark.parametrize("header", HEADERS)
def test_tables_whose_header_lies(repository: Path, header: str) -> None:
    text = (HEADERS[header] + "\n").encode()
    content = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(720)
    (repository / "pipeline" / "1" / "schedules.npy").write_bytes(content)
    start = time.monotonic()
    assert "1/schedules.npy: " in wrong(repository)
    assert time.monotonic() - start < SECONDS


def test_a_compressed_table_is_not_unpacked(repository: Path) -> None:
    np.savez_compressed(repository / "bomb.npz", np.zeros(10**7))
    (repository / "bomb.npz").rename(repository / "pipeline" / "1" / "schedules.npy")
    assert "1/schedules.npy: expected float64 tables" in wrong(repository)


@pytest.mark.parametrize("key", ["location", "offset", "length"])
@pytest.mark.parametrize(
    "value", ["x", "²", "-1", "", "1.5", "9" * 5000, "/etc/passwd", "../../x", "a/../../../x", "\0", "n" * 5000, "[/]\x1b"]
)
def test_external_data_that_names_nothing(repository: Path, key: str, value: str) -> None:
    path = repository / "denoiser" / "1" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    next(pair for item in model.graph.initializer for pair in item.external_data if pair.key == key).value = value
    path.write_bytes(model.SerializeToString())
    assert "external data" in wrong(repository)


def test_data_of_a_graph_inside_the_graph_is_judged_too(repository: Path) -> None:
    path = repository / "denoiser" / "1" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    tensor = onnx.TensorProto(name="hidden", data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../../../secret")
    body = onnx.helper.make_graph([onnx.helper.make_node("Constant", [], ["y"], value=tensor)], "body", [], [])
    model.graph.node.add(op_type="If", input=["c"], output=["z"]).attribute.add(name="then_branch", g=body, type=5)
    path.write_bytes(model.SerializeToString())
    assert "external data '../../../secret' lies outside" in wrong(repository)


@pytest.mark.parametrize("name", ["²", "01", "0", "+1", "1_0", "٣", "-1", "9" * 200])
def test_versions_are_plain_decimal_numbers(repository: Path, name: str) -> None:
    (repository / "pipeline" / "1").rename(repository / "pipeline" / name)
    assert "no version folder" in wrong(repository)


def test_links_that_go_in_circles(repository: Path) -> None:
    (repository / "circle").symlink_to(repository)
    (repository / "pipeline" / "1" / "up").symlink_to("..")
    (repository / "self").symlink_to("self")
    assert "self is a link to nothing, or to itself" in wrong(repository)


def test_many_faults_are_cut_and_many_files_end_the_search(repository: Path) -> None:
    for index in range(MAX_FAULTS + 50):
        (repository / f"model-{index}").mkdir()
    assert f"more than {MAX_FAULTS} faults" in wrong(repository)


def test_a_path_that_no_system_has_is_a_fault() -> None:
    assert "cannot be read" in wrong(Path("n" * 5000))
    assert wrong(Path("a\0b"))


def test_the_command_line_shows_odd_names_as_they_are(repository: Path) -> None:
    for name in (b"[red]", b"[bold]x", b"\x1b[31mred", b"new\nline", b"\xff\xfe", b"n" * 255):
        os.mkdir(os.fsencode(repository) + b"/" + name)
    result = command_line.call("triton", "--check", repository, env={**os.environ, "COLUMNS": "400"})
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "\x1b" not in result.stdout
    for shown in ("[red]", "[bold]x", "\\x1b[31mred", "new\\nline", "\\udcff\\udcfe", "6 errors"):
        assert shown in result.stdout
