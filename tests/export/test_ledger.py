"""Stages are finished whole or not at all, and never done twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dq_export.ledger import Ledger, Result, claim
from dq_export.output_folder import OutputError
from dq_export.report.report import SizeReport
from dq_export.stages.quantize import Quantized


class Work:
    """Writes `text` to file `a` and folder `b`; counts its calls."""

    def __init__(self, text: str, *, fail: bool = False) -> None:
        self.text, self.fail, self.calls = text, fail, 0

    def __call__(self, partial: Path) -> Result:
        self.calls += 1
        (partial / "a").write_text(self.text)
        (partial / "b").mkdir()
        (partial / "b" / "c").write_text(self.text)
        if self.fail:
            raise RuntimeError("half way")
        return Result(summary=self.text)


def stage(folder: Path, work: Work, inputs: str = "x") -> tuple[Result, bool]:
    return Ledger(folder).stage("s", Result, {"in": inputs}, ("a", "b"), work)


def test_a_stage_is_done_once(tmp_path: Path) -> None:
    work = Work("one")
    assert stage(tmp_path, work) == (Result(summary="one"), True)
    assert stage(tmp_path, work) == (Result(summary="one"), False)
    assert work.calls == 1


@pytest.mark.parametrize(
    "spoil",
    [lambda f: (f / "a").write_text("on"), lambda f: (f / "a").unlink(), lambda f: (f / "b" / "c").unlink(), lambda f: None],
)
def test_a_stage_is_done_again_when_inputs_or_outputs_changed(tmp_path: Path, spoil: Any) -> None:
    stage(tmp_path, Work("one"))
    spoil(tmp_path)
    same_outputs = (tmp_path / "a").exists() and (tmp_path / "a").read_text() == "one" and (tmp_path / "b" / "c").exists()
    _, now = stage(tmp_path, Work("one"), "y" if same_outputs else "x")
    assert now
    assert (tmp_path / "b" / "c").read_text() == "one"


def test_a_failure_leaves_the_old_outputs_whole(tmp_path: Path) -> None:
    stage(tmp_path, Work("one"))
    with pytest.raises(RuntimeError):
        stage(tmp_path, Work("two", fail=True), "y")
    assert (tmp_path / "a").read_text() == (tmp_path / "b" / "c").read_text() == "one"
    assert not (tmp_path / ".partial").exists()
    assert stage(tmp_path, Work("one"))[1] is False


def test_a_damaged_ledger_means_nothing_is_done(tmp_path: Path) -> None:
    stage(tmp_path, Work("one"))
    (tmp_path / "stages.json").write_text("{")
    assert stage(tmp_path, Work("one"))[1] is True


@pytest.mark.parametrize("result", [{}, {"size": {"float_bytes": 1, "engine_bytes": 0}}, {"passes": [], "more": 1}])
def test_a_stage_whose_result_is_described_badly_is_done_again(result: dict[str, Any], tmp_path: Path) -> None:
    """Somebody edited it, or another version wrote it, whose stages returned other results."""

    def work(target: Path) -> Quantized:
        return Quantized(size=SizeReport(float_bytes=2, engine_bytes=1))

    def run_again() -> bool:
        return Ledger(tmp_path).stage("s", Quantized, {}, (), work)[1]

    assert run_again()
    assert not run_again()
    ledger = json.loads((tmp_path / "stages.json").read_text())
    ledger["s"]["result"] = result
    (tmp_path / "stages.json").write_text(json.dumps(ledger))
    assert run_again()
    assert not run_again()


def take(folder: Path, recipe: str = "a: 1\nb: 2\n", *, overwrite: bool = False) -> None:
    with claim(folder, recipe, overwrite=overwrite):
        pass


def test_a_folder_of_the_same_recipe_is_continued(tmp_path: Path) -> None:
    take(tmp_path / "new" / "out")
    take(tmp_path / "new" / "out")


def test_a_folder_of_another_recipe_is_refused_and_unchanged(tmp_path: Path) -> None:
    take(tmp_path)
    with pytest.raises(OutputError, match=r"another run \(b: 2 -> 3\).*--overwrite"):
        take(tmp_path, "a: 1\nb: 3\n")
    assert (tmp_path / "recipe.yaml").read_text() == "a: 1\nb: 2\n"
    take(tmp_path, "a: 1\nb: 3\n", overwrite=True)
    assert (tmp_path / "recipe.yaml").read_text() == "a: 1\nb: 3\n"


def test_a_new_key_without_a_value_is_no_other_recipe(tmp_path: Path) -> None:
    take(tmp_path)
    take(tmp_path, "new: null\na: 1\nb: 2\n")
    assert (tmp_path / "recipe.yaml").read_text() == "new: null\na: 1\nb: 2\n"
    with pytest.raises(OutputError, match=r"another run \(new: None -> 4; b: 2 -> None\)"):
        take(tmp_path, "new: 4\na: 1\n")


def test_foreign_files_and_a_file_in_the_way_are_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=r"files of something else \(thesis.txt"):
            take(tmp_path, overwrite=overwrite)
    with pytest.raises(OutputError, match="is a file"):
        take(tmp_path / "thesis.txt")
    with pytest.raises(OutputError, match="cannot be made"):
        take(tmp_path / "thesis.txt" / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_two_runs_do_not_write_to_one_folder(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from dq_export.ledger import Result, claim\n"
        f"with claim(Path({str(tmp_path)!r}), 'a', overwrite=False): print('in', flush=True); input()"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdin is not None
    assert other.stdout.readline() == "in\n"
    with pytest.raises(OutputError, match="being written by another dq-export"):
        take(tmp_path, "a")
    other.kill()
    other.wait()
    other.stdin.close()
    other.stdout.close()
    take(tmp_path, "a")
