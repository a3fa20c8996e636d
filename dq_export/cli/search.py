"""The command that searches."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from .errors import watching
from .export import recipe_of
from .options import NOT_GIVEN, RUN, option, parameters_of, path_option, recipe_options, with_options
from .tables import print_search

SEARCHED = ("model", "revision", "variant", "prompts", "conditions", "rounding", "seed")
"""The recipe's options that a search takes as flags."""
GOAL, EFFORT = "Goal", "Effort"


def search_options(
    recipe: Annotated[Path | None, path_option("YAML with everything that is not searched", "--recipe", group=RUN)] = None,
    target_sqnr: Annotated[float | None, option("dB to keep, at the least size", "--target-sqnr", group=GOAL)] = None,
    max_size: Annotated[float | None, option("MB of weights, for the best pictures", "--max-size", group=GOAL)] = None,
    max_latency: Annotated[float | None, option("ms of a call of batch 2, timed here", "--max-latency", group=GOAL)] = None,
    evaluations: Annotated[int, option("mixes to try (default 300)", "--evaluations", group=EFFORT)] = 300,
    strategy: Annotated[
        str, option("descend, or evolve as Q-DiT does (default descend)", "--strategy", group=EFFORT)
    ] = "descend",
    pictures: Annotated[int, option("that judge a mix (default 4)", "--pictures", group=EFFORT)] = 4,
    steps: Annotated[int, option("sampler steps of those pictures (default 12)", "--steps", group=EFFORT)] = 12,
    output_dir: Annotated[
        Path, path_option("new, or of the same search to continue (default search)", "--output-dir", "-o", group=RUN)
    ] = Path("search"),
    quiet: Annotated[bool, option("only errors and the summary", "--quiet", "-q", group=RUN)] = False,
) -> None:
    """The options of a search, besides the recipe's."""


def _search(**options: Any) -> None:
    from ..search.explore import WINNER, explore
    from ..search.request import SearchRequest

    flags = {name: value for name in SEARCHED if (value := options.pop(name)) not in NOT_GIVEN}
    base = recipe_of(options.pop("recipe"), flags)
    folder, quiet = options.pop("output_dir"), options.pop("quiet")
    request = SearchRequest(**options)
    with watching(quiet=quiet, advice="the same command continues after the last evaluation") as watch:
        outcome = explore(base, folder, request, progress=watch)
    print_search(outcome)
    print(f"{outcome.evaluations} evaluations; export it: dq-export --recipe {folder / WINNER} -o out")


TEXT = """Look for the best mix of bits, groups and granularities; export its winner.yaml with --recipe.

\b
Example:
  dq-export search -m dit-digits --target-sqnr 30 -o search
  dq-export --recipe search/winner.yaml -o out

Exit status 6: nothing that was tried meets the goal; there is no winner.yaml.
"""
search = with_options(_search, (*recipe_options(*SEARCHED), *parameters_of(search_options)), TEXT)
