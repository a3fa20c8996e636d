"""What a long command shows: estimates by a clock that the tests turn, lines that fit, a bar on a terminal."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from dq_export.cli import progress
from dq_export.cli.progress import Lines, duration


class Clock:
    """Stands still until it is set."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    instance = Clock()
    monkeypatch.setattr(progress, "time", instance)
    return instance


def ticks(lines: Lines, clock: Clock, *steps: tuple[float, int, int], unit: str = "calls") -> None:
    for second, done, total in steps:
        clock.now = 100 + second
        lines.advance(done, total, unit)


def test_the_first_piece_of_work_which_also_imports_is_not_in_the_estimate(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = Lines(quiet=False)
    lines.begin("float", "PyTorch to ONNX")
    ticks(lines, clock, (70, 1, 51), (78, 5, 51), (86, 9, 51))
    assert capsys.readouterr().err.splitlines()[1:] == [
        "float     1/51 calls",
        "float     5/51 calls, 92 s left",
        "float     9/51 calls, 84 s left",
    ]


def test_each_phase_of_a_stage_has_an_estimate_of_its_own(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines(quiet=False)
    lines.begin("calibrate", "4 calls, then 8 weights, then the 8 again")
    ticks(lines, clock, (10, 1, 4), (40, 3, 4), (50, 1, 8), (120, 8, 8), (130, 1, 8), (140, 2, 8), unit="")
    shown = [line.removeprefix("calibrate ") for line in capsys.readouterr().err.splitlines()[1:]]
    assert shown == ["1/4", "3/4, 15 s left", "1/8", "8/8, 0 s left", "1/8", "2/8, 60 s left"]


def test_a_line_at_most_every_five_seconds_where_there_is_no_terminal(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines(quiet=False)
    lines.begin("verify", "calls")
    ticks(lines, clock, *((second / 10, second, 200) for second in range(1, 121)))
    assert len(capsys.readouterr().err.splitlines()) == 1 + 2


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (43.4, "43 s"), (119, "119 s"), (900, "15 min"), (3504, "58 min"), (9000, "2.5 h")]
)
def test_a_duration_has_the_unit_that_suits_it(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_no_line_is_wider_than_80_columns_or_breaks_inside_a_word(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    lines, path = Lines(quiet=False), "/a/path/" + "of-many-parts/" * 8
    result = "engine at worst 31.4 dB (timestep 981), trajectory 25.9 dB, low-precision kernels [bold]everywhere[/]"
    lines.begin("verify", path)
    lines.end(12.3, result, kept=False)
    first, *rest = capsys.readouterr().err.splitlines()
    assert first.strip() == "verify"
    assert rest[0].strip() == path, "a word that is too long stays whole"
    assert max(map(len, rest[1:])) <= 80
    assert " ".join(" ".join(rest[1:]).split()) == f"verify done: {result}, 12 s"
    assert rest[2].startswith(" " * 10)


def test_a_name_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    Lines(quiet=False).begin("load", "model\x1b[2J\x07")
    assert capsys.readouterr().err == "load      model\\x1b[2J\\x07\n"


def test_a_terminal_gets_a_bar_that_is_gone_when_the_stage_ends(clock: Clock) -> None:
    screen = io.StringIO()
    lines = Lines(quiet=False)
    lines.console = Console(file=screen, force_terminal=True, width=80, highlight=False)
    lines.begin("verify", "4 calls")
    ticks(lines, clock, (10, 1, 4), (13, 2, 4))
    assert lines.bar is not None
    lines.bar.refresh()
    last = screen.getvalue().replace("\r", "\n").splitlines()[-1]
    assert re.search(r"verify\W.*━.* 2/4 +calls +0:00:13 +elapsed, +0:00:06 +left", re.sub(r"\x1b\[[\d;]*[mK]", "", last))
    for second, done in ((20, 1), (30, 2), (40, 3)):  # another phase: its first piece is not in its estimate, either
        clock.now = 100 + second
        lines.advance(done, 8, "weights")
    lines.bar.refresh()
    last = re.sub(r"\x1b\[[\d;]*[mK]", "", screen.getvalue().replace("\r", "\n").splitlines()[-1])
    assert re.search(r"3/8 +weights +0:00:40 +elapsed, +0:00:50 +left", last)
    assert len(last.rstrip()) <= 80
    lines.end(16, "", kept=False)
    assert lines.bar is None
    assert screen.getvalue().endswith("verify    done: 16 s\n")
    assert "\x1b[?25h" in screen.getvalue(), "the cursor is shown again"


def test_quiet_shows_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines(quiet=True)
    lines.begin("verify", "4 calls")
    ticks(lines, clock, (10, 1, 4), (20, 2, 4))
    lines.end(20, "done", kept=False)
    assert capsys.readouterr().err == ""
