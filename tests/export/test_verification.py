"""`verify`, and every command that reads a finished folder, on folders that somebody else prepared."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import dq_export
from dq_export.cli import app as cli
from dq_export.verification import verify_again

QUICK: dict[str, Any] = {"steps": 4, "calib_size": 2, "min_sqnr": 10, "parity_size": 2}
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def finished(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    dq_export.export(model=str(tiny_folder), output_dir=out, triton=True, **QUICK)
    return out


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Call]:
    """The command line in this process: status, stdout, stderr. What it does not turn into a status fails the test."""
    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dq-export", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed, error = capfd.readouterr()
        return int(ended.value.code or 0), printed, error

    yield run
    signal.signal(signal.SIGINT, handler)


def rewrite(path: Path, change: Callable[[Any], Any]) -> None:
    """Change a JSON file's value in place, or replace it by what `change` returns."""
    value = json.loads(path.read_text())
    new = change(value)
    path.write_text(json.dumps(value if new is None else new))


def array(value: np.ndarray[Any, Any]) -> dict[str, str]:
    """As polygraphy writes an array."""
    file = io.BytesIO()
    np.save(file, value)
    return {"array": base64.b64encode(file.getvalue()).decode(), "polygraphy_class": "ndarray"}


def test_it_states_the_worst_call_and_its_limit_in_three_lines(finished: Path, call: Call) -> None:
    status, printed, error = call("verify", finished)
    assert (status, error) == (0, "")
    verdict, worst, limit = printed.splitlines()
    assert verdict.split() == ["verify", "passed"]
    report = json.loads((finished / "report.json").read_text())
    measured = min(item["sqnr"] for item in report["parity"]["calls"] if item["stage"] != "float-onnx")
    assert worst.split()[2:4] == [f"{measured:.1f}", "dB"]
    assert limit.split()[1] == f"{measured - 1:.1f}"
    assert "recipe.yaml requires 10" in limit
    assert max(map(len, printed.splitlines())) <= 80


def test_verbose_adds_what_polygraphy_prints(finished: Path, call: Call) -> None:
    status, printed, _ = call("verify", finished, "-v")
    assert status == 0
    assert "Accuracy Summary" in printed
    assert printed.splitlines()[-3].split() == ["verify", "passed"]


def test_its_numbers_are_those_of_the_export(finished: Path) -> None:
    result = verify_again(finished, None, verbose=False)
    report = json.loads((finished / "report.json").read_text())
    calls = [item for item in report["parity"]["calls"] if item["stage"] == "engine"]
    assert [(round(sqnr, 6), timestep) for sqnr, timestep in result.calls] == [
        (round(item["sqnr"], 6), item["timestep"]) for item in calls
    ]


def test_a_limit_of_the_user_replaces_the_exports(finished: Path, call: Call) -> None:
    status, printed, _ = call("verify", finished, "--min-sqnr", "150")
    assert status == 4
    assert "FAILED" in printed
    assert "150.0 dB (--min-sqnr)" in printed
    assert call("verify", finished, "--min-sqnr", "-50")[0] == 0
    assert call("verify", finished, "--min-sqnr", "nan")[0] == 2


def test_a_recipe_that_lowers_the_limit_does_not_hide_what_the_report_says(out: Path, call: Call) -> None:
    path = out / "recipe.yaml"
    path.write_text(path.read_text().replace("min_sqnr: 10.0", "min_sqnr: -200.0"))
    _, printed, _ = call("verify", out)
    assert "what the export measured less 1 dB; recipe.yaml requires -200" in " ".join(printed.split())


@pytest.mark.parametrize(
    "command",
    [
        b"polygraphy run model.onnx --onnxrt --data-loader-script x.py",
        b"polygraphy run model.onnx --onnxrt --save-outputs ../f",
        b"polygraphy -h",
        b"polygraphy run model.onnx --onnxrt --compare snr --snr-threshold sample:-200",
        b"polygraphy 'run",
        b"\xff\xfe\x00",
        b"sh -c 'touch ../f'",
    ],
)
def test_the_command_file_is_never_read_back(command: bytes, out: Path, call: Call) -> None:
    (out / "x.py").write_text(f"open({str(out.parent / 'f')!r}, 'w').close()\n")
    (out / "parity" / "command.txt").write_bytes(command)
    expected = call("verify", out)
    (out / "parity" / "command.txt").unlink()
    assert call("verify", out) == expected
    assert expected[0] == 0
    assert not (out.parent / "f").exists()


def of_calls(change: Callable[[list[Any]], Any]) -> Callable[[Any], Any]:
    return lambda value: change(value["lst"][0][1])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("inputs.json", lambda value: []),
        ("inputs.json", lambda value: {}),
        ("inputs.json", lambda value: [1]),
        ("inputs.json", lambda value: value[:-1]),
        ("inputs.json", lambda value: [{"hidden_states": 1}] * len(value)),
        ("inputs.json", lambda value: value[0].pop("timestep") and None),
        ("inputs.json", lambda value: value[0].pop("class_labels") and None),
        ("inputs.json", lambda value: value[0].update(timestep=array(np.zeros(0, dtype=np.int64)))),
        ("inputs.json", lambda value: value[0].update(more=array(np.ones(1)))),
        ("inputs.json", lambda value: value[0].update(hidden_states=array(np.ones((2, 2), dtype=np.float32)))),
        ("inputs.json", lambda value: value[0].update(hidden_states=array(np.ones((2, 2, 8, 8))))),
        ("inputs.json", lambda value: value[0].update(hidden_states=array(np.full((4, 2, 8, 8), np.nan, dtype=np.float32)))),
        ("inputs.json", lambda value: value[0].update(class_labels=array(np.full(4, 10**9)))),
        ("inputs.json", lambda value: value[0].update(class_labels={"array": "!", "polygraphy_class": "ndarray"})),
        ("inputs.json", lambda value: value[0].update(class_labels={"tensor": "", "polygraphy_class": "Tensor"})),
        ("inputs.json", lambda value: value[0].update(class_labels=array(np.array([b"a"])))),
        ("outputs.json", lambda value: []),
        ("outputs.json", lambda value: {"lst": []}),
        ("outputs.json", lambda value: {"lst": [["pytorch", [{}]]]}),
        ("outputs.json", of_calls(lambda calls: calls.pop() and None)),
        ("outputs.json", of_calls(lambda calls: calls[0]["outputs"].pop("sample") and None)),
        ("outputs.json", of_calls(lambda calls: calls[0]["outputs"]["sample"].update(values=array(np.ones(3, np.float32))))),
        (
            "outputs.json",
            of_calls(lambda calls: calls[0]["outputs"]["sample"].update(values=array(np.full(4, np.inf)))),
        ),
    ],
)
def test_damaged_calls_are_one_line(name: str, change: Callable[[Any], Any], out: Path, call: Call) -> None:
    rewrite(out / "parity" / name, change)
    status, _, error = call("verify", out)
    assert status in (1, 2)
    assert error.startswith("error: ")
    assert str(out) in error
    assert len(error.splitlines()) == 1


def test_an_array_that_promises_more_than_it_holds_takes_no_memory(out: Path, call: Call) -> None:
    header = (
        b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999,), }".ljust(117) + b"\n"
    )
    content = {"array": base64.b64encode(header).decode(), "polygraphy_class": "ndarray"}
    rewrite(out / "parity" / "inputs.json", lambda value: value[0].update(hidden_states=content))
    status, _, error = call("verify", out)
    assert status == 2
    assert "an array of shape (99999999999999,) with 0 bytes" in error


def test_a_pickled_array_runs_nothing(out: Path, call: Call) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(out / "owned"),)

    file = io.BytesIO()
    np.save(file, np.array([Evil()], dtype=object), allow_pickle=True)
    content = {"array": base64.b64encode(file.getvalue()).decode(), "polygraphy_class": "ndarray"}
    rewrite(out / "parity" / "inputs.json", lambda value: value[0].update(hidden_states=content))
    status, _, error = call("verify", out)
    assert status == 2
    assert "not in numpy's format of plain numbers" in error
    assert not (out / "owned").exists()


def test_many_small_values_are_refused_before_they_are_read(out: Path, call: Call) -> None:
    (out / "parity" / "inputs.json").write_text("[" + "[]," * 300_000 + "1]")
    status, _, error = call("verify", out)
    assert status == 2
    assert "more than 200000 values" in error


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ("parity", "no parity/inputs.json, nothing to compare with"),
        ("parity/outputs.json", "no parity/outputs.json, nothing to compare with"),
        ("model.onnx", "no model.onnx; is it the output folder of a finished export?"),
        ("recipe.yaml", "no recipe.yaml; is it"),
    ],
)
def test_the_error_names_what_a_folder_lacks(removed: str, message: str, out: Path, call: Call) -> None:
    shutil.rmtree(out / removed) if (out / removed).is_dir() else (out / removed).unlink()
    status, _, error = call("verify", out)
    assert status == 2
    assert message in error


def test_a_name_that_is_too_long_is_one_line(call: Call) -> None:
    status, _, error = call("verify", "x" * 300)
    assert status == 2
    assert "no such folder; is it the output folder of a finished export?" in error


COMMANDS = (("verify",), ("audit",), ("bench",), ("finish",), ("triton",), ("explain", "proj_out_1"))


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[0])
@pytest.mark.parametrize("name", ["recipe.yaml", "model.onnx.data", "engine", "parity/more"])
def test_no_command_follows_a_link_in_a_finished_folder(words: tuple[str, ...], name: str, out: Path, call: Call) -> None:
    (out.parent / "outside").mkdir()
    shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink(missing_ok=True)
    (out / name).symlink_to(out.parent / "outside")
    status, _, error = call(words[0], out, *words[1:])
    assert status == 2
    assert f"{out / name}: a link; links inside an output folder are not followed" in error
    assert list((out.parent / "outside").iterdir()) == []


@pytest.mark.parametrize(
    "content",
    [
        b"", b"[]", b"{}", b"\xff", b"[" * 100_000, b'{"version": 1, "version": 2}', b"null",
        b'{"version": 2, "model": NaN}', b"1" * 5000,
    ],
)  # fmt: skip
@pytest.mark.parametrize("words", [("explain", "x"), ("finish",), ("verify",), ("audit",)], ids=lambda words: words[0])
def test_a_damaged_report_is_one_line(words: tuple[str, ...], content: bytes, out: Path, call: Call) -> None:
    (out / "report.json").write_bytes(content)
    status, _, error = call(words[0], out, *words[1:])
    assert status == 2
    last = error.splitlines()[-1]
    assert last.startswith(f"error: {out / 'report.json'}: ")
    assert last.endswith("; export again")
    assert not (out / ".partial").exists()


def at(*path: Any, value: Any) -> Callable[[Any], None]:
    def change(report: Any) -> None:
        for key in path[:-1]:
            report = report[key]
        report[path[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        at("linears", 0, "sqnr", value=[1.0]),
        at("measured_at", value=[]),
        at("tables", 0, "scales", value=[0.0]),
        at("tables", 0, "scales", value=[1.0] * 50),
        at("size", "engine_bytes", value=0),
        at("audit", "gemms", 0, "flops", value=10**300),
        at("parity", "calls", 0, "sqnr", value=1e18),
        at("latency", "engine_ms", value=0),
        at("linears", value=3),
        at("linears", 0, "action", value="w3a3"),
        at("linears", 0, "action", value="bits"),
        lambda report: next(item for item in report["linears"] if item["action"] == "w8a8").update(group_size=16),
        at("verdict", value={"outcome": "passed"}),
        at("more", value=1),
        at("version", value=2),
    ],
)
def test_a_report_with_numbers_that_cannot_be_is_refused(change: Callable[[Any], None], out: Path, call: Call) -> None:
    rewrite(out / "report.json", change)
    status, _, error = call("finish", out)
    assert status == 2
    assert "not a report of this version of dq-export" in error


def test_names_of_a_strangers_report_do_not_steer_the_terminal(out: Path, call: Call) -> None:
    name = "a\x1b]0;owned\x07[/][red]b\u202e"
    rewrite(out / "report.json", at("linears", 0, "name", value=name))
    rewrite(out / "report.json", at("linears", 0, "rule", value=name))
    status, printed, error = call("explain", out, name)
    assert (status, error) == (0, "")
    assert r"a\x1b]0;owned\x07[/][red]b\u202e" in printed
    assert "\x1b" not in printed
    status, printed, error = call("explain", out, "no such")
    assert status == 2
    assert "\x1b" not in error


def test_finish_of_an_onnx_runtime_export_with_a_repository(out: Path, call: Call) -> None:
    """Its repository holds the graph itself: there is no plan to put there."""
    before = {path: path.read_bytes() for path in sorted((out / "triton").rglob("*")) if path.is_file()}
    shutil.rmtree(out / "engine")
    status, printed, error = call("finish", out)
    assert status == 0, error
    assert "100.0% of those that the recipe quantizes" in printed
    assert (out / "engine" / "optimized.onnx").is_file()
    assert {path: path.read_bytes() for path in sorted((out / "triton").rglob("*")) if path.is_file()} == before
    assert call("audit", out)[0] == 0


def test_finish_judges_anew_and_writes_no_command_of_the_folders(out: Path, call: Call) -> None:
    rewrite(out / "report.json", at("parity", "replay", value="touch owned"))
    rewrite(out / "report.json", at("verdict", "outcome", value="failed"))
    assert call("finish", out)[0] == 0
    report = json.loads((out / "report.json").read_text())
    assert report["verdict"]["outcome"] == "passed"
    assert (out / "parity" / "command.txt").read_text() == report["parity"]["replay"] + "\n"
    assert report["parity"]["replay"].startswith("polygraphy run model.onnx ")


def test_files_of_an_export_have_the_mode_that_the_system_gives(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    mode = (tmp_path / "plain").stat().st_mode
    copies = [path for path in finished.rglob("*") if path.is_file() and path.stat().st_nlink == 1]
    assert len(copies) > 15
    assert [path.name for path in copies if path.stat().st_mode != mode] == []


def test_a_report_of_another_graph_is_refused(out: Path, call: Call) -> None:
    rewrite(out / "report.json", lambda report: report.update(linears=report["linears"][:-1]))
    status, _, error = call("audit", out)
    assert status == 2
    assert f"{out / 'report.json'}: no linear 'proj_out_2', which model.onnx has; export again" in error


def test_an_audit_asks_for_what_the_export_decided(out: Path, call: Call) -> None:
    """A recipe that was edited afterwards decides nothing."""
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    (out / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "rules": [{"match": "", "action": "float"}]}))
    status, printed, _ = call("audit", out)
    assert status == 0
    assert "w8a8" in printed
