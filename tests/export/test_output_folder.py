"""An output folder that somebody prepared: nothing outside it is read or written, and nothing in it hangs a run."""

from __future__ import annotations

import os
import shutil
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from dq_export.core.recipe import Recipe
from dq_export.ledger import Ledger, Result, claim, require_usable
from dq_export.output_folder import OutputError, locked, require_plain, write_bytes, write_text
from dq_export.pipeline import run

RECIPE = "model: m\n"
NAMES = (
    ".lock", "recipe.yaml", "stages.json", "report.json", "report.html", "search.svg", "model.onnx", "model.onnx.data",
    "calibration.safetensors", ".recipe.yaml.new", ".stages.json.new", ".report.html.new", "float/model.onnx",
    "engine/session.json", "parity/command.txt", ".calibration/ranges.0", "triton/denoiser/1/model.onnx",
)  # fmt: skip
FOLDERS = ("float", "engine", "parity", "triton", ".partial", ".calibration")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder that a run of RECIPE has begun."""
    folder = tmp_path / "out"
    with claim(folder, RECIPE, overwrite=False):
        pass
    return folder


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A file outside, whose content and mode no run may change."""
    path = tmp_path / "victim"
    path.write_text("mine")
    path.chmod(0o600)
    return path


def take(folder: Path) -> None:
    with claim(folder, RECIPE, overwrite=True):
        pass


def files_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Mode and content of every file below a folder, links not followed."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()]
    return {str(path): (path.stat().st_mode, path.read_bytes()) for path in files}


@pytest.mark.parametrize("name", NAMES)
def test_a_link_to_a_file_is_refused_and_the_file_unchanged(name: str, out: Path, victim: Path) -> None:
    (out / name).parent.mkdir(exist_ok=True, parents=True)
    (out / name).unlink(missing_ok=True)
    (out / name).symlink_to(victim)
    (out / "recipe.yaml").touch()
    before = files_of(out.parent)
    with pytest.raises(OutputError, match=r": a link; .* not followed\. Remove it"):
        take(out)
    assert files_of(out.parent) == before


@pytest.mark.parametrize("name", [*FOLDERS, "engine/inner"])
def test_a_link_to_a_folder_is_refused_and_nothing_is_written_there(name: str, out: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).symlink_to(tmp_path / "outside")
    with pytest.raises(OutputError, match=r": a link; "):
        take(out)
    assert list((tmp_path / "outside").iterdir()) == []


def test_a_link_that_leads_nowhere_is_refused(out: Path, tmp_path: Path) -> None:
    (out / "report.html").symlink_to(tmp_path / "made by a write through it")
    with pytest.raises(OutputError, match=r"report\.html: a link; "):
        take(out)
    assert not (tmp_path / "made by a write through it").exists()


@pytest.mark.parametrize("name", [".lock", "recipe.yaml", "stages.json", "parity/inputs.json"])
def test_a_pipe_is_refused_at_once(name: str, out: Path) -> None:
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).unlink(missing_ok=True)
    os.mkfifo(out / name)
    with pytest.raises(OutputError, match="but a pipe, a socket or a device"):
        take(out)


def test_the_lock_itself_follows_no_link_and_waits_for_no_pipe(tmp_path: Path, victim: Path) -> None:
    """Also if the folder changes after the search."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".lock").symlink_to(victim)
    with pytest.raises(OutputError, match="cannot be written"), locked(tmp_path / "a"):
        pass
    assert victim.read_text() == "mine"
    (tmp_path / "b").mkdir()
    os.mkfifo(tmp_path / "b" / ".lock")
    with locked(tmp_path / "b"):
        pass


def test_a_socket_is_refused(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(out)  # a socket's path has at most 107 bytes
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("engine")
        with pytest.raises(OutputError, match="engine: neither a file nor a folder"):
            take(out)


@pytest.mark.parametrize(
    "name", [".lock", ".calibration/ranges.0", "evaluations.jsonl", "statistics/rows.0", "choices/w8a8.new", "timing.cache"]
)
def test_a_hard_link_is_refused_where_files_are_written_in_place(name: str, out: Path, victim: Path) -> None:
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).unlink(missing_ok=True)
    (out / name).hardlink_to(victim)
    with pytest.raises(OutputError, match="a hard link: writing to it would change the other file"):
        take(out)
    assert victim.read_text() == "mine"


@pytest.mark.parametrize("name", ["recipe.yaml", "stages.json", "float/model.onnx", "model.onnx"])
def test_other_hard_links_are_left_alone_because_writes_rename(name: str, out: Path, victim: Path) -> None:
    """The float graph's weights are a hard link to the checkpoint's."""

    def work(folder: Path) -> Result:
        (folder / "float").mkdir()
        for name in ("float/model.onnx", "model.onnx"):
            (folder / name).write_text("graph")
        return Result()

    (out / name).parent.mkdir(exist_ok=True)
    (out / name).unlink(missing_ok=True)
    (out / name).hardlink_to(victim)
    with claim(out, RECIPE, overwrite=True) as ledger:
        ledger.stage("float", Result, {}, ("float", "model.onnx"), work)
    assert (out / "float" / "model.onnx").read_text() == (out / "model.onnx").read_text() == "graph"
    assert victim.read_text() == "mine"
    assert stat.S_IMODE(victim.stat().st_mode) == 0o600


@pytest.mark.parametrize("name", FOLDERS)
def test_a_file_in_place_of_a_folder_is_refused_before_work(name: str, out: Path) -> None:
    (out / name).write_text("x")
    with pytest.raises(OutputError, match=rf"{name}: a file where an export has a folder\. Remove it"):
        take(out)


@pytest.mark.parametrize("name", ["recipe.yaml", "stages.json", "report.json", "calibration.safetensors", ".lock"])
def test_a_folder_in_place_of_a_file_is_refused_before_work(name: str, out: Path) -> None:
    (out / name).unlink(missing_ok=True)
    (out / name).mkdir()
    (out / "recipe.yaml").parent.mkdir(exist_ok=True)
    with pytest.raises(OutputError, match=rf"{name}: a folder where an export has a file\. Remove it"):
        take(out)


def test_the_output_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    take(tmp_path / "out")
    assert (tmp_path / "disk" / "recipe.yaml").read_text() == RECIPE


def test_a_name_that_is_too_long_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"cannot be made \(File name too long\)"):
        take(tmp_path / ("x" * 300))


def test_a_folder_of_endless_files_is_refused(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dq_export.output_folder.ENTRIES", 3)
    for i in range(4):
        (out / str(i)).touch()
    with pytest.raises(OutputError, match="more than 3 files"):
        require_plain(out)


def test_control_characters_of_a_name_are_shown_escaped(out: Path) -> None:
    (out / "a\x1b]0;owned\x07\n").symlink_to("x")
    with pytest.raises(OutputError) as error:
        require_plain(out)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("write", [write_text, lambda path, text: write_bytes(path, text.encode())])
def test_a_write_takes_no_name_that_was_prepared_and_the_systems_mode(
    write: Callable[[Path, str], None], out: Path, victim: Path
) -> None:
    (out / ".page.new").symlink_to(victim)
    (out / "page").hardlink_to(victim)
    write(out / "page", "page")
    assert (out / "page").read_text() == "page"
    assert victim.read_text() == "mine"
    (out / "plain").touch()
    assert (out / "page").stat().st_mode == (out / "plain").stat().st_mode


def test_files_of_a_killed_write_are_removed_by_the_next_run(out: Path) -> None:
    (out / ".report.html.0123456789abcdef.new").write_text("half")
    take(out)
    assert sorted(path.name for path in out.iterdir()) == [".lock", "recipe.yaml"]


def test_a_running_export_is_noticed_without_writing(out: Path, tmp_path: Path) -> None:
    before = files_of(tmp_path)
    require_usable(out)
    require_usable(tmp_path / "nothing")
    assert files_of(tmp_path) == before
    assert not (tmp_path / "nothing").exists()
    with locked(out), pytest.raises(OutputError, match="being written by another dq-export"):
        require_usable(out)


def test_a_bad_folder_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    """The model does not exist, and nothing looks for it."""
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(OutputError, match="files of something else"):
        run(Recipe(model="nothing/there"), tmp_path)
    (tmp_path / "thesis.txt").unlink()
    (tmp_path / "recipe.yaml").symlink_to(tmp_path)
    with pytest.raises(OutputError, match="a link; "):
        run(Recipe(model="nothing/there"), tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"[]", b"null", b"1", b"\xff\xfe", b"[" * 100_000, b'{"s": ' * 5000, b'{"s": 1}', b'{"s": {}}', b'{"s": []}', b"",
        b'{"s": {"inputs": 1, "outputs": {}, "result": {}}}', b'{"s": {"inputs": "x", "outputs": ["a"], "result": {}}}',
        b'{"s": {"inputs": "x", "outputs": {}, "result": []}}', b'{"s": {"inputs": "x", "outputs": {}}}',
        b'{"s": {"inputs": "x", "outputs": {}, "result": {"seconds": NaN}}}', b"9" * 5000,
    ],
)  # fmt: skip
def test_a_stage_that_the_ledger_describes_badly_is_not_done(content: bytes, out: Path) -> None:
    (out / "stages.json").write_bytes(content)
    assert Ledger(out).stages == {}


def test_a_badly_described_stage_does_not_hide_the_others(out: Path) -> None:
    (out / "stages.json").write_text('{"a": {"inputs": "x", "outputs": {}, "result": {"summary": "s"}}, "b": 3}')
    assert list(Ledger(out).stages) == ["a"]


def test_a_folder_that_cannot_be_read_is_one_line(out: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    (out / "engine").mkdir(mode=0)
    with pytest.raises(OutputError, match="cannot be read"):
        take(out)
    shutil.rmtree(out / "engine")
