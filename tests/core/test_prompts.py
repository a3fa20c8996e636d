"""Prompt files: read whole or refused with the line."""

from __future__ import annotations

from pathlib import Path

import pytest

from dq_export.core.documents import DocumentError
from dq_export.core.prompts import BYTES, read_prompts
from dq_export.core.recipe import Recipe, RecipeError
from dq_export.families.prompts import PACKAGED


def test_every_line_is_a_prompt(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(" a red cat \r\nein Käse, 雪, 👩‍🚀\na: 'quoted' \"text\" # no comment\n\n \n".encode())
    assert read_prompts(path) == ("a red cat", "ein Käse, 雪, 👩‍🚀", "a: 'quoted' \"text\" # no comment")


def test_the_packages_own_prompts_are_32_different_ones() -> None:
    prompts = read_prompts(PACKAGED)
    assert len(prompts) == len(set(prompts)) == 32
    assert max(map(len, prompts)) < 100


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty; expected a prompt on every line"),
        (b" \n\n", "empty; expected a prompt on every line"),
        (b"a\n\nb\n", "line 2 is empty; expected a prompt"),
        (b"a\n\xff\n", r"not UTF-8 \(byte 2\)"),
        (b"\xef\xbb\xbfa\n", r"line 1 holds the character '\\ufeff'"),
        (b"a\nb\tc\n", r"line 2 holds the character '\\t'; expected plain text"),
        (b"a\n\x1b[31mred\n", r"line 2 holds the character '\\x1b'"),
        (b"a\n" + b"x" * 4001, "line 2 has 4001 characters; expected 4000 at most"),
        (b"a\n" * 1001, "1001 prompts; expected 1 to 1000"),
        (b"x" * 300_000, f"larger than the {BYTES} bytes"),
    ],
)
def test_a_file_that_is_no_list_of_prompts_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(DocumentError, match=message) as error:
        read_prompts(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match=r"none\.txt: no such file"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(DocumentError, match="Is a directory"):
        read_prompts(tmp_path)


@pytest.mark.parametrize("value", [[], ["a", ""], ["a", "b\nc"], ["x" * 4001], "a cat", [1], ["\ud800"]])
def test_a_recipe_holds_prompts_as_a_file_does(value: object) -> None:
    with pytest.raises(RecipeError, match=r"^test: prompts") as error:
        Recipe.parse({"model": "m", "prompts": value}, "test")
    assert "\n" not in str(error.value)


def test_the_largest_prompts_come_back_from_a_recipes_file(tmp_path: Path) -> None:
    """What YAML escapes takes up to ten bytes a character."""
    prompts = ["👩" * 3999 + str(number % 10) for number in range(12)]
    recipe = Recipe.parse({"model": "m", "prompts": prompts}, "test")
    (tmp_path / "recipe.yaml").write_text(recipe.dump())
    assert Recipe.load(tmp_path / "recipe.yaml") == recipe
