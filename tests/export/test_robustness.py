"""An export in hostile surroundings: full and read-only disks, damaged files, inputs that changed behind its back."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from conftest import QUICK, STAGES, UNSERVED, export_untimed, save_tiny

import dq_export
from dq_export.cli import app as cli
from dq_export.deploy.onnxruntime.cpu import Ort
from dq_export.ledger import Ledger, Result

FLAGS = ("--steps", "4", "--calib-size", "2", "--min-sqnr", "10")
BYTES = ("calibration.safetensors", "model.onnx", "model.onnx.data", "parity/inputs.json", "parity/outputs.json")
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Call]:
    """The command line in this process, which has torch loaded already: status, stdout, stderr.

    An exception that `main` does not turn into a status fails the test: it would be a traceback.
    """
    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setenv("COLUMNS", "120")

    def run(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dq-export", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, error = capfd.readouterr()
        assert "Traceback" not in error
        return int(ended.value.code or 0), out, error

    yield run
    signal.signal(signal.SIGINT, handler)


@pytest.fixture
def copied(tiny_exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_exported, tmp_path / "out"))


@pytest.fixture
def disk() -> Iterator[Callable[[str], Path]]:
    """A file system of its own: call it with mount options, again to change them.

    Outside pytest's temporary folder: a mount that a killed test leaves there would fail pytest's clean-up from then on.
    """
    folder = Path(tempfile.mkdtemp(prefix="dq-export-disk-"))

    def mount(options: str) -> Path:
        prefix = "remount," if os.path.ismount(folder) else ""
        words = ["mount", "-t", "tmpfs", "-o", prefix + options, "none", str(folder)]
        if shutil.which("mount") is None or subprocess.run(words, capture_output=True, check=False).returncode:
            pytest.skip("mounting a small file system needs root")
        return folder

    yield mount
    if os.path.ismount(folder):  # lazy: a session of a failed build may still map a file
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
    folder.rmdir()


def digests(out: Path) -> dict[str, str]:
    return {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in BYTES}


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


class Watch:
    """The stages that were kept."""

    def __init__(self) -> None:
        self.reused: list[str] = []
        self.stage = ""

    def begin(self, stage: str, text: str) -> None:
        self.stage = stage

    def advance(self, done: int, total: int, unit: str = "") -> None:
        pass

    def end(self, seconds: float, result: str, *, kept: bool) -> None:
        self.reused += [self.stage] if kept else []


def test_a_full_disk_stops_a_run_that_goes_on_when_there_is_space(
    disk: Callable[[str], Path], call: Call, tiny_folder: Path, tiny_exported: Path
) -> None:
    """Sizes from a finished run, so that each of float and calibrate is the first not to fit."""

    def size(*names: str) -> int:
        # tmpfs gives whole pages, and a folder or a small file (lock, ledger, recipe) takes one as well.
        paths = [tiny_exported / name for name in names]
        files = [file for path in paths for file in ([path] if path.is_file() else path.iterdir())]
        return sum(-(-path.stat().st_size // 4096) * 4096 for path in files)

    small = 10 * 4096
    upto = {
        "float": size("float") // 2,
        "calibrate": size("float") + small,  # not what it gathers
    }
    for stage, limit in upto.items():
        out = disk(f"size={limit}") / "out"
        status, _, text = call("--model", tiny_folder, *FLAGS, "-o", out)
        assert status == 1, text
        last = [line for line in text.splitlines() if line.split()[0] in STAGES][-1]
        assert last.split()[0] == stage, f"expected no space in {stage}: {text}"
        assert "error: no space left for" in text
        assert "run the same command again" in text
        assert not (out / ".partial").exists()
        assert not list(out.rglob(".*.new"))
    status, _, text = call("--model", tiny_folder, *FLAGS, "-o", disk("size=64m") / "out")
    assert status == 0
    assert any(line.startswith("float ") and "kept from an earlier run" in line for line in text.splitlines())
    assert digests(out) == digests(tiny_exported)


def test_a_folder_that_cannot_be_written_is_an_error(disk: Callable[[str], Path], call: Call, tiny_folder: Path) -> None:
    (disk("size=1m") / "out").mkdir()
    root = disk("size=1m,ro")
    for out in (root / "out", root / "new"):
        status, _, text = call("--model", tiny_folder, *FLAGS, "-o", out)
        assert status == 2
        assert f"error: {out}: cannot be" in text
        assert "Read-only file system" in text


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (["--exclude", "("], ["--exclude: '(' is not a regular expression"]),
        (["--bins", "0"], ["bins = 0: a number of bins must be from 1 to 1000"]),
        (["--bins", "per-stp"], ["bins = 'per-stp'", "Did you mean 'per-step'?"]),
        (["--method", "mean-max"], ["method = 'mean-max'", "Did you mean 'minmax'?"]),
        (["--scaling", "smoth"], ["Did you mean 'smooth'?"]),
        (["--timesteps", "per_sample"], ["Did you mean 'per-sample'?"]),
        (["--alpha", "2", "--rho", "0", "--calib-size", "0"], ["alpha = 2.0", "rho = 0.0", "calib_size = 0"]),
    ],
    ids=lambda value: value[0].strip("-") if value[0].startswith("--") else "",
)
def test_a_bad_value_is_refused_before_anything_is_written(
    words: list[str], messages: list[str], call: Call, tiny_folder: Path, tmp_path: Path
) -> None:
    status, _, text = call("--model", tiny_folder, *FLAGS, *words, "-o", tmp_path / "out")
    assert status == 2
    for message in messages:
        assert message in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a list", "expected a mapping of options, found list"),
        ("method: [", "not readable as YAML"),
        ("rules: [{match: '', acton: float}]", "unknown key 'rules.0.acton'. Did you mean 'action'?"),
        ("rules: [{match: '', action: w8a9}]", "Did you mean 'w8a8'?"),
        ("rules: [{match: '(', action: float}]", "'(' is not a regular expression"),
        ("rules: [{match: 'to_q', action: w8a8}]", "no rule matches"),
        ("rules: [{match: 'norm1.linear$', action: w8a8}, {match: '', action: float}]", "works on one row per sample"),
    ],
)
def test_a_bad_recipe_file_is_refused(text: str, message: str, call: Call, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    words = ("--model", tiny_folder, *FLAGS, "--recipe", tmp_path / "recipe.yaml", "-o", tmp_path / "out")
    status, _, error = call(*words)
    assert status == 2
    assert message in error
    assert not (tmp_path / "out").exists()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])


@pytest.mark.parametrize(
    ("words", "name", "status"),
    [
        (["audit"], "model.onnx", 1),
        (["audit"], "model.onnx.data", 1),
        (["audit"], "recipe.yaml", 2),
        pytest.param(["bench"], "model.onnx", 1, marks=pytest.mark.slow),
        (["bench"], "float/model.onnx", 1),
        (["bench"], "parity/inputs.json", 2),
        (["explain", "proj_out_1"], "report.json", 2),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_damaged_file_of_a_finished_export_is_named(words: list[str], name: str, status: int, call: Call, copied: Path) -> None:
    truncate(copied / name)
    actual, _, text = call(words[0], copied, *words[1:])
    assert actual == status
    assert str(copied / name).removesuffix(".data") in text


@pytest.mark.parametrize(
    "name",
    [
        "float/model.onnx.data",
        "calibration.safetensors",
        pytest.param("model.onnx", marks=pytest.mark.slow),
        pytest.param("engine/optimized.onnx", marks=pytest.mark.slow),
    ],
)
def test_a_damaged_output_is_made_again_and_what_stays_the_same_is_kept(name: str, tiny_folder: Path, copied: Path) -> None:
    before = digests(copied)
    truncate(copied / name)
    watch = Watch()
    dq_export.export(model=str(tiny_folder), output_dir=copied, **QUICK, progress=watch)
    stage = {"float": "float", "calibration.safetensors": "calibrate", "model.onnx": "quantize", "engine": "build"}
    assert watch.reused == [s for s in UNSERVED if s != stage[name.split("/")[0]]]
    assert digests(copied) == before


@pytest.mark.parametrize(
    ("changes", "stages"),
    [
        ({"min_sqnr": 11, "min_coverage": 0.5}, UNSERVED),
        ({"method": "mse"}, ["float", "reference"]),
        pytest.param({"seed": 1}, ["float"], marks=pytest.mark.slow),
        pytest.param({"exclude": ("to_q$",)}, ["float", "reference"], marks=pytest.mark.slow),
        pytest.param({"timesteps": "per-sample"}, ["calibrate"], marks=pytest.mark.slow),
        pytest.param({"format": "onnx"}, ["float", "calibrate", "reference"], marks=pytest.mark.slow),
        ({"parity_size": 3}, [stage for stage in UNSERVED if stage not in ("reference", "verify")]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_option_does_again_only_what_depends_on_it(
    changes: dict[str, Any], stages: list[str], tiny_folder: Path, copied: Path
) -> None:
    watch = Watch()
    options = {**QUICK, **changes}
    dq_export.export(model=str(tiny_folder), output_dir=copied, overwrite=True, progress=watch, **options)
    assert watch.reused == stages


def test_other_weights_do_everything_again(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_tiny(tmp_path / "model")
    dq_export.calibrate(model=str(folder), output_dir=tmp_path / "own", **QUICK)
    path = next((folder / "transformer").glob("*.safetensors"))
    tensors = load_file(path)
    tensors["transformer_blocks.0.ff.net.2.weight"][0, 0] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    watch = Watch()
    dq_export.calibrate(model=str(folder), output_dir=tmp_path / "own", **QUICK, progress=watch)
    assert watch.reused == []


def test_an_engine_that_runs_in_float_is_status_3_after_the_report(
    call: Call, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backend that forgets to legalise: ONNX Runtime then multiplies q, k and v in float."""
    monkeypatch.setattr(Ort, "legalise", lambda self, *, shared, result: ())
    status, out, text = call("--model", tiny_folder, *FLAGS, "-o", tmp_path / "out")
    assert status == 3
    assert "FAILED" in out
    assert f"report: {tmp_path / 'out' / 'report.html'}" in out
    assert "75.0% of the quantized GEMMs' FLOPs run on low-precision kernels, the recipe requires 95.0%" in text  # 9 of 12 units
    for block in (0, 1):
        for letter in "qkv":
            assert f"transformer_blocks.{block}.attn1.to_{letter}: MatMul; an int8 activation that several operators read" in text
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["audit"]["coverage"] == pytest.approx(0.75)
    assert (report["verdict"]["outcome"], report["verdict"]["status"]) == ("failed", 3)
    assert "75.0 %" in (tmp_path / "out" / "report.html").read_text()
    assert call("--model", tiny_folder, *FLAGS, "--min-coverage", "0.7", "--overwrite", "-o", tmp_path / "out")[0] == 0


@pytest.fixture(scope="module")
def well_calibrated(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibrated on 128 pictures: two would leave so much of the range unseen that wider scales would be better."""
    out = tmp_path_factory.mktemp("well-calibrated") / "out"
    export_untimed(tiny_folder, out, **{**QUICK, "calib_size": 128})
    return out


@pytest.mark.parametrize("factor", [3.0, 1 / 3], ids=["too-wide", "too-narrow"])
def test_verify_is_status_4_when_the_activation_scales_are_wrong(
    factor: float, call: Call, well_calibrated: Path, tmp_path: Path
) -> None:
    """Three times as wide is 20 log10(3) = 9.5 dB of rounding noise more, against a margin of 1; narrower saturates."""
    out = Path(shutil.copytree(well_calibrated, tmp_path / "out"))
    assert call("verify", out)[0] == 0
    model = ir.load(out / "model.onnx")
    ir.external_data.load_to_model(model)
    tables = [value for name, value in model.graph.initializers.items() if "activation_scale" in name]
    assert len(tables) == 8  # four inputs in each of two blocks
    for value in tables:
        assert value.const_value is not None
        value.const_value = ir.tensor(np.asarray(value.const_value.numpy() * factor, dtype=np.float32), name=value.name)
    ir.save(model, out / "model.onnx", external_data="model.onnx.data")
    status, text, _ = call("verify", out)
    assert status == 4
    assert "FAILED" in text


def test_verify_of_a_damaged_graph_is_one_line(call: Call, copied: Path) -> None:
    (copied / "model.onnx").write_bytes(b"no graph")
    status, _, text = call("verify", copied)
    assert status == 1
    assert f"refuses {copied / 'model.onnx'}" in text
    assert len(text.splitlines()) == 1


def test_a_refused_run_changes_no_byte_of_another_ones_folder(call: Call, tiny_folder: Path, copied: Path) -> None:
    before = contents(copied)
    for words in (("--seed", "7"), ("--format", "onnx"), ("--exclude", "to_q$")):
        status, _, text = call("--model", tiny_folder, *FLAGS, *words, "-o", copied)
        assert status == 2
        assert "holds another run" in text
        assert contents(copied) == before


def test_quiet_prints_only_the_summary_and_verbose_every_pass(call: Call, tiny_folder: Path, copied: Path) -> None:
    _, out, text = call("--model", tiny_folder, *FLAGS, "-o", copied, "--quiet")
    assert "of all GEMM FLOPs" in out
    assert [line for line in text.splitlines() if not line.startswith("warning:")] == []
    _, out, text = call("--model", tiny_folder, *FLAGS, "-o", copied, "-v")
    assert "calibrate" in text
    for word in ("insert_qdq", "fold_scaling", "bench: "):
        assert word in out


def test_a_kill_in_the_middle_of_a_stage_leaves_the_old_outputs_whole(tmp_path: Path) -> None:
    def work(folder: Path) -> Result:
        (folder / "a").write_text("one")
        return Result()

    assert Ledger(tmp_path).stage("s", Result, {"in": 1}, ("a",), work)[1]
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom dq_export.ledger import Ledger, Result\n"
        "def work(folder):\n    (folder / 'a').write_text('half')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        f"Ledger(Path({str(tmp_path)!r})).stage('s', Result, {{'in': 2}}, ('a',), work)"
    )
    result = subprocess.run([sys.executable, "-c", code], check=False)
    assert result.returncode == -signal.SIGKILL
    assert (tmp_path / "a").read_text() == "one"
    assert Ledger(tmp_path).stage("s", Result, {"in": 1}, ("a",), work)[1] is False
    assert Ledger(tmp_path).stage("s", Result, {"in": 2}, ("a",), work)[1] is True
    assert not (tmp_path / ".partial").exists(), "the next stage clears what the kill left"


def test_an_output_that_a_stage_forgets_to_write_is_not_recorded(tmp_path: Path) -> None:
    def work(folder: Path, names: str) -> Result:
        for name in names:
            (folder / name).write_text("text")
        return Result()

    with pytest.raises(FileNotFoundError):
        Ledger(tmp_path).stage("s", Result, {}, ("a", "b"), lambda folder: work(folder, "a"))
    assert Ledger(tmp_path).stages == {}
    assert Ledger(tmp_path).stage("s", Result, {}, ("a", "b"), lambda folder: work(folder, "ab"))[1]
