"""Random rows in the place of encoded texts, for networks of full size."""

from __future__ import annotations

import numpy as np

from dq_export.core.network import Conditions

TEXTS = 4
"""Of them, beside the one for no text."""


def as_conditions(rows: dict[str, np.ndarray], *, null: bool = True) -> Conditions:
    """Texts and one for no text.

    Args:
        rows: each [TEXTS + 1, ...], that of no text first.
        null: False leaves the one for no text out.
    """
    return Conditions(
        names=tuple(f"text {index + 1}" for index in range(TEXTS)),
        arrays={name: value[1:] for name, value in rows.items()},
        null={name: value[:1] for name, value in rows.items()} if null else {},
    )
