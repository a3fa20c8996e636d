"""Compares `dq-export search` with Q-DiT's search on dit-digits, for the table in docs/measured.md.

    pip install ".[cpu]" && python benchmarks/search.py [--evaluations 300] [--seeds 0 1]

All searches have the same number of evaluations and the same limit of bytes. Q-DiT's space is the group size of int4 weights and
8-bit activations of each linear, and it searches by evolution. Our space adds bits, granularity and exclusion, and our search
descends by measured errors. Evolution in our space is a third row. All searches round weights to nearest, and judge a mix by
the error of sampled trajectories. The dB are of trajectories with other noise and conditions.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from dq_export.core.recipe import Recipe
from dq_export.search.explore import explore
from dq_export.search.request import SearchRequest
from dq_export.search.space import CHOICES, Q_DIT

ROWS: tuple[tuple[str, str, Any, dict[str, Any]], ...] = (
    ("Q-DiT: evolution over group sizes", "evolve", Q_DIT, {"format": "onnx", "scaling": "none"}),
    ("Q-DiT's evolution over group sizes, with our scaling", "evolve", Q_DIT, {"format": "onnx"}),
    ("evolution in our space", "evolve", CHOICES, {}),
    ("descend in our space", "descend", CHOICES, {}),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--evaluations", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--sizes", type=float, nargs="*", default=[3.6], help="MB of weights")
    options = parser.parse_args()
    print(
        "| search | seed | at most MB | MB | dB | best single choice within the size |\n|---|---|---|---|---|---|",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as temporary:
        for seed in options.seeds:
            for size in options.sizes:
                for label, strategy, choices, more in ROWS:
                    recipe = Recipe.parse({"model": "dit-digits", "seed": seed, **more}, "benchmark")
                    out = Path(temporary) / f"{label}-{seed}-{size}"
                    request = SearchRequest(max_size=size, evaluations=options.evaluations, strategy=strategy)
                    outcome = explore(recipe, out, request, choices=choices)
                    fitting = [(sqnr, name) for name, mb, _, sqnr in outcome.uniform if mb <= size]
                    alone = "{:.1f} ({})".format(*max(fitting)) if fitting else "none fits"
                    print(f"| {label} | {seed} | {size} | {outcome.size:.2f} | {outcome.held_back:.1f} | {alone} |", flush=True)


if __name__ == "__main__":
    main()
