"""The pages name options, files and methods that exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
from test_readme import help_of

from dq_export.core.recipe import Recipe

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.fixture(scope="module")
def known() -> str:
    return help_of() + help_of("search") + help_of("verify")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_option_and_file_of_a_page_exists(page: Path, known: str) -> None:
    text = page.read_text()
    # The options of the scripts in examples/ are not those of dq-export.
    scripts = "".join(path.read_text() for path in (ROOT / "examples").glob("*.py"))
    for option in set(re.findall(r"`(--[a-z-]+)", text)):
        assert re.search(rf"{option}\b", known) or f'"{option}"' in scripts, option
    for path in set(re.findall(r"\b((?:examples|benchmarks|calibration)/[\w./]+\.py)", text)):
        assert (ROOT / path).is_file(), path
    for path in set(re.findall(r"\]\(([\w./]+\.md)\)", text)):
        assert (page.parent / path).is_file(), path


def test_the_page_of_methods_takes_words_that_options_have() -> None:
    text = (ROOT / "docs" / "methods.md").read_text()
    used: dict[str, set[str]] = {}
    for option, word in re.findall(r"--(scaling|rounding|granularity|calibration|bits) ([\w-]+)", text):
        used.setdefault(option, set()).add(word)
    assert len(used) == 5
    for option, words in used.items():
        assert words <= set(_words(Recipe.model_fields[option].annotation)), option


def _words(annotation: Any) -> list[str]:
    return [word for part in (annotation, *get_args(annotation)) for word in get_args(part) or (part,) if isinstance(word, str)]
