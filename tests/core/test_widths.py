"""What a width is exported with where the recipe names nothing else."""

from __future__ import annotations

import pytest

from dq_export.core.folds import explicit
from dq_export.core.network import InputSite, Linear
from dq_export.core.recipe import Recipe
from dq_export.core.rule import DEFAULT_RULES
from dq_export.core.widths import PLAIN, WIDTHS

BLOCKS = tuple(f"blocks.{index}" for index in (0, 1, 2, 3, 10))


def site(*linears: str) -> InputSite:
    return InputSite(name=linears[0], linears=linears, fold=explicit(linears[0], 64))


def actions(sites: list[InputSite], static: tuple[str, ...] = ()) -> dict[str, str]:
    """By linear: the action that w4a8 gives it."""
    names = [name for item in sites for name in item.linears]
    linears = {name: Linear(name=name, role="static" if name in static else "gemm", width=64) for name in names}
    rules = (*WIDTHS["w4a8"].rules(BLOCKS, sites, linears), *DEFAULT_RULES)
    recipe = Recipe.parse({"model": "m", "bits": "w4a8"}, "here").model_copy(update={"rules": rules})
    return {name: rule.action for name, rule in recipe.assign(linears).items()}


def test_w4a8_keeps_a_third_of_the_blocks_from_the_first_at_8_bit_weights() -> None:
    actual = actions([site(f"{block}.q") for block in BLOCKS])
    assert actual == dict(zip([f"{block}.q" for block in BLOCKS], ["w8a8", "w8a8", "w4a8", "w4a8", "w4a8"], strict=True))


def test_readers_of_an_input_that_later_blocks_read_keep_the_widths_bits() -> None:
    actual = actions([site("blocks.0.q"), site("blocks.0.k", "blocks.2.k")])
    assert actual == {"blocks.0.q": "w8a8", "blocks.0.k": "w4a8", "blocks.2.k": "w4a8"}


def test_linears_that_read_the_text_in_all_blocks_keep_the_widths_bits() -> None:
    text = ("blocks.0.text_k", "blocks.1.text_k", "blocks.2.text_k")
    assert actions([site("blocks.0.q"), site(*text)], static=text) == {"blocks.0.q": "w8a8", **dict.fromkeys(text, "w4a8")}
    assert actions([site(*text), site("blocks.3.q")], static=text) == {**dict.fromkeys(text, "w4a8"), "blocks.3.q": "w4a8"}


def test_a_network_without_blocks_and_other_widths_get_no_rule() -> None:
    linears = {name: Linear(name=name, role="gemm", width=64) for name in ("a", "blocks.0.q")}
    assert WIDTHS["w4a8"].rules((), [site("a")], linears) == ()
    assert PLAIN.rules(BLOCKS, [site("blocks.0.q")], linears) == ()


@pytest.mark.parametrize(
    ("options", "rounding"),
    [
        ({"bits": "w4a8"}, "gptq"),
        ({"bits": "w4a8", "rounding": "rtn"}, "rtn"),
        ({"bits": "w4a8", "tables": "t.safetensors"}, "rtn"),
        ({}, "rtn"),
    ],
)
def test_a_rounding_that_is_not_named_is_that_of_the_width(options: dict[str, str], rounding: str) -> None:
    assert Recipe.parse({"model": "m", **options}, "here").settled().rounding == rounding
