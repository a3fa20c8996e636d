"""How far long work is: who is told, and nobody."""

from __future__ import annotations

from typing import Protocol


class Advance(Protocol):
    """Called with what is done and what there is in all."""

    def __call__(self, done: int, total: int, unit: str = "") -> None:
        """`unit`: what is counted, in the plural."""


class Progress(Protocol):
    """Shows what a run does, stage by stage."""

    def begin(self, stage: str, text: str) -> None:
        """A stage starts."""

    def advance(self, done: int, total: int, unit: str = "") -> None:
        """Work done and in all of the running stage."""

    def end(self, seconds: float, result: str, *, kept: bool) -> None:
        """The running stage is finished; `kept`: its results were there already."""


def unwatched(done: int, total: int, unit: str = "") -> None:
    """An `Advance` that shows nothing."""


class Silent:
    """A `Progress` that shows nothing."""

    def begin(self, stage: str, text: str) -> None:
        """Nothing."""

    def advance(self, done: int, total: int, unit: str = "") -> None:
        """Nothing."""

    def end(self, seconds: float, result: str, *, kept: bool) -> None:
        """Nothing."""
