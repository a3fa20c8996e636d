"""The table of the documentation: the answer of each backend about every scheme."""

from __future__ import annotations

from dq_export.core.scheme import Scheme, all_schemes

from .backend import Backend
from .backends import BACKENDS
from .lowerings import Refusal


def support_table() -> str:
    """Markdown, with one column for backends with equal answers and one row for bits whose other cells are equal."""
    schemes = tuple(all_schemes())
    columns: dict[tuple[str, ...], list[str]] = {}
    for backend in BACKENDS:
        titles = columns.setdefault(tuple(_answer(backend, scheme) for scheme in schemes), [])
        if backend.title not in titles:
            titles.append(backend.title)
    rows: dict[tuple[str, ...], list[str]] = {}
    for scheme, answers in zip(schemes, zip(*columns, strict=True), strict=True):
        rows.setdefault((*_scales(scheme), *answers), []).append(scheme.name)
    lines = [["bits", "activation scale", "weight scale", *map(", ".join, columns.values())]]
    lines += [["---"] * len(lines[0]), *([", ".join(names), *cells] for cells, names in rows.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _answer(backend: Backend, scheme: Scheme) -> str:
    answer = backend.supports(scheme)
    return f"refused: {answer}" if isinstance(answer, Refusal) else str(answer)


def _scales(scheme: Scheme) -> tuple[str, str]:
    activation, weight = ("float" if part is None else part.granularity for part in (scheme.activation, scheme.weight))
    return activation, weight
