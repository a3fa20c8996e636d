"""What other packages add by entry points: families, scale methods, passes and backends."""

from __future__ import annotations

import traceback
from collections.abc import Collection
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, get_args

from .documents import printable
from .violations import nearest

Kind = Literal["families", "methods", "passes", "backends"]


REASON = 400
"""Characters of what a plug-in's error says."""


class PluginError(Exception):
    """A plug-in cannot be used; the message names it and its package."""


def plugin_names(kind: Kind) -> tuple[str, ...]:
    """The names of what the installed packages add; nothing is imported."""
    return tuple(dict.fromkeys(point.name for point in _points(kind)))


def described_plugins(kind: Kind) -> list[str]:
    """`name (package version)` of each, in the order of their names: what a run depends on."""
    return [f"{point.name} ({_package(point)})" for point in _points(kind)]


def load_plugins(kind: Kind, expected: Any, reserved: Collection[str] = ()) -> dict[str, Any]:
    """By name, what the installed packages add.

    Args:
        expected: the class that each must be an object of; `Callable` for anything that can be called.
        reserved: the names of dq-export's own.

    Raises:
        PluginError: a plug-in cannot be imported, is of another class, or has a name that is taken.
    """
    plugins: dict[str, Any] = {}
    for point in _points(kind):
        if point.name in reserved or point.name in plugins:
            raise PluginError(f"{_title(kind, point)}: there is another of that name; uninstall one of the packages")
        try:
            loaded = point.load()
        except Exception as error:  # of a stranger's module, which may raise anything
            raise PluginError(
                f"{_title(kind, point)} cannot be imported: {type(error).__name__}: {printable(str(error))}"
            ) from error
        if not isinstance(loaded, expected):
            expectation = f"an object of {expected.__name__}"
            raise PluginError(f"{_title(kind, point)}: expected {expectation}, found {point.value} of {type(loaded).__name__}")
        plugins[point.name] = loaded
    return plugins


def fault_of_plugin(error: Exception, *, within: bool = False) -> PluginError | None:
    """What to say of an error that came up while a plug-in's code ran; None where none ran.

    The message names the plug-in whose code ran last, and the line of it.

    Args:
        within: only of an error that its own code raised, not a library that it calls.
    """
    points = [(kind, point) for kind in get_args(Kind) for point in _points(kind)]
    frames = list(traceback.walk_tb(error.__traceback__))[::-1]
    for frame, line in frames[:1] if within else frames:
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        for kind, point in points:
            if package == point.module.partition(".")[0] != __name__.partition(".")[0]:
                place = f"{frame.f_code.co_filename.rpartition('/')[2]}, line {line}"
                text = printable(" ".join(str(error).split()), REASON)
                return PluginError(f"{_title(kind, point)} fails: {type(error).__name__}: {text} ({printable(place)})")
    return None


@dataclass(frozen=True)
class OneOf:
    """A check of a text: one of dq-export's own words, or the name of a plug-in."""

    kind: Kind
    built_in: tuple[str, ...]

    def words(self) -> tuple[str, ...]:
        """All that it may be."""
        return (*self.built_in, *plugin_names(self.kind))

    def __call__(self, text: str) -> str:
        """The text itself.

        Raises:
            ValueError: it is none of the words.
        """
        words = [f"'{word}'" for word in self.words()]
        if text not in self.words():
            raise ValueError(f"expected {', '.join(words[:-1])} or {words[-1]}.{nearest(text, list(self.words()))}")
        return text


def _points(kind: Kind) -> list[EntryPoint]:
    return sorted(entry_points(group=f"dq_export.{kind}"), key=lambda point: (point.name, point.value))


def _title(kind: Kind, point: EntryPoint) -> str:
    return f"plug-in '{printable(point.name)}' (dq_export.{kind}) of {_package(point)}"


def _package(point: EntryPoint) -> str:
    return printable(f"{point.dist.name} {point.dist.version}") if point.dist else "an unknown package"
