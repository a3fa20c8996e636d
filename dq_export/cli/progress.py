"""The progress of a long command: a bar on a terminal, plain lines elsewhere. Only the command line uses it."""

from __future__ import annotations

import textwrap
import time

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)  # fmt: skip

INTERVAL = 5.0
"""Seconds between two plain lines of a stage."""
AVERAGED = 3600.0
"""Seconds of past work that the bar's estimate uses: one call of a large network takes many seconds."""
INDENT = " " * 10
"""Continuation lines start under the text that follows a stage's name."""


class Lines:
    """Prints the progress of a run; see `core.progress.Progress`.

    On a terminal, a bar of rich shows the running stage below the lines of the finished ones: units done and in total, the
    time since the stage began, and the time left. Elsewhere a plain line appears every 5 seconds. No line is wider than the
    terminal (80 columns if there is none), and none breaks inside a word.
    """

    def __init__(self, *, quiet: bool) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.quiet = quiet
        self.interrupted = False
        self.bar: Progress | None = None
        self.task = TaskID(0)
        self.begin("", "", shown=False)

    def interrupt(self, number: int, frame: object) -> None:
        """Stop the run. Some libraries swallow the exception or report a failed import, so a flag also records it."""
        self.interrupted = True
        raise KeyboardInterrupt

    def begin(self, stage: str, text: str, *, shown: bool = True) -> None:
        """Print which stage starts."""
        if self.interrupted:
            raise KeyboardInterrupt
        self.stop()
        self.stage, self.done, self.total = stage, 0, 0
        self.first: tuple[float, int] | None = None
        self.started = self.printed = time.monotonic()
        if shown:
            self._print(f"{stage:9} {text}")

    def advance(self, done: int, total: int, unit: str = "") -> None:
        """Show how far the stage is and, from the second piece of work on, how long it will take.

        The first piece is not counted: it also loads libraries, and compiles.
        """
        if self.interrupted:
            raise KeyboardInterrupt
        now = time.monotonic()
        another = total != self.total or done < self.done  # phase of the stage
        self.done, self.total = done, total
        if self.quiet:
            return
        if self.console.is_terminal:
            self._draw(unit, another=another)
            return
        if another:
            self.first = None
        if not done:
            return
        left = ""
        if self.first is None:
            self.first = now, done
        elif done > self.first[1]:
            left = ", " + duration((now - self.first[0]) / (done - self.first[1]) * (total - done)) + " left"
        if now - self.printed >= INTERVAL:
            self.printed = now
            self._print(f"{self.stage:9} {done}/{total}{f' {unit}' if unit else ''}{left}")

    def end(self, seconds: float, result: str, *, kept: bool) -> None:
        """Print the stage's result."""
        self.stop()
        text = "kept from an earlier run" if kept else f"{seconds:.1f} s" if seconds < 10 else duration(seconds)
        self._print(f"{self.stage:9} done: {result + ', ' if result else ''}{text}")

    def stop(self) -> None:
        """Remove the bar, so that other text can be printed."""
        if self.bar:
            self.bar.stop()
            self.bar = None

    def _draw(self, unit: str, *, another: bool) -> None:
        if self.bar is None:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[unit]}"),
                TimeElapsedColumn(),
                TextColumn("elapsed,"),
                TimeRemainingColumn(),
                TextColumn("left"),
                console=self.console,
                transient=True,
                expand=True,
                get_time=lambda: time.monotonic(),
                speed_estimate_period=AVERAGED,
            )
            self.task = self.bar.add_task(escape(f"{self.stage:9}"), total=self.total, unit=unit)
            self.bar.start()
        elif another:
            self.bar.reset(self.task, total=self.total, unit=unit)
        self.bar.tasks[0].start_time = self.started
        self.bar.update(self.task, completed=self.done)

    def _print(self, text: str) -> None:
        if not self.quiet:
            from dq_export.core.documents import printable

            wrapped = textwrap.wrap(
                printable(text), self.console.width, subsequent_indent=INDENT, break_long_words=False, break_on_hyphens=False
            )
            self.console.print("\n".join(wrapped), markup=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """The duration in a suitable unit: `43 s`, `12 min`, `3.5 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
