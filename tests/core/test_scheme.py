"""Schemes: what a recipe's words mean, and what a linear of some width gets."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dq_export.core.qtypes import FP8, INT4, INT8, QuantType
from dq_export.core.recipe import Recipe
from dq_export.core.rule import Rule
from dq_export.core.scheme import PRESETS, Action, Bits, Scheme, TensorScheme, all_schemes, scheme_of

SCHEMES = tuple(all_schemes())


def read(text: str) -> Scheme:
    """The scheme that `str` of one names."""
    name, *words = text.split()
    options = dict(zip(words[::2], words[1::2], strict=True))
    size = options.get("group_size")
    return scheme_of(name, options.get("granularity"), None if size is None else int(size))  # type: ignore[arg-type]


def tensor(qtype: QuantType, granularity: str, size: int | None = None) -> TensorScheme:
    return TensorScheme(qtype=qtype, granularity=granularity, size=size)  # type: ignore[arg-type]


def test_every_word_that_a_recipe_takes_has_a_preset() -> None:
    assert {*PRESETS, "bits"} == set(get_args(Action))
    assert set(get_args(Bits)) == {name for name, preset in PRESETS.items() if preset.low_precision}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("w8a8",), Scheme(weight=tensor(INT8, "channel"), activation=tensor(INT8, "tensor"))),
        (("w4a8", "token", 32), Scheme(weight=tensor(INT4, "blocks", 32), activation=tensor(INT8, "token"))),
        (("w8a8", "token-group", 64), Scheme(weight=tensor(INT8, "blocks", 64), activation=tensor(INT8, "token-group", 64))),
        (("w4a4", None, 0), Scheme(weight=tensor(INT4, "channel"), activation=tensor(INT4, "tensor"))),
        (("fp8", "tensor"), Scheme(weight=tensor(FP8, "channel"), activation=tensor(FP8, "tensor"))),
        (("w4a16", "token"), Scheme(weight=tensor(INT4, "blocks"))),
        (("weight-only", None, 16), Scheme(weight=tensor(INT8, "blocks", 16), for_memory=True)),
        (("float", "token", 64), Scheme()),
    ],
)
def test_words_name_a_scheme(words: tuple[str, ...], expected: Scheme) -> None:
    assert scheme_of(*words) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_scheme_in_words_reads_back(scheme: Scheme) -> None:
    assert read(str(scheme)) == scheme
    assert read(str(scheme.fitted(1152))) == scheme.fitted(1152)


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(KeyError, match="bits"):
        scheme_of("bits")


@given(scheme=st.sampled_from((*SCHEMES, *PRESETS.values())), width=st.integers(1, 5000))
def test_a_fitted_scheme_has_blocks_that_divide_and_stays(scheme: Scheme, width: int) -> None:
    try:
        fitted = scheme.fitted(width)
    except ValueError:
        assert scheme.weight is not None
        assert scheme.weight.granularity == "blocks"
        assert not scheme.for_memory
        assert width % 128 != 0
        return
    assert fitted.fitted(width) == fitted
    size = scheme.block_size(width)
    assert size == 0 or width % size == 0
    if fitted.activation is not None and fitted.activation.granularity == "token-group":
        assert fitted.activation.size == size > 0


@pytest.mark.parametrize(
    ("words", "two_level", "graph_type"),
    [
        (("w8a8",), False, INT8),
        (("w4a8", "tensor"), True, INT8),
        (("w4a4", "token", 0), True, INT4),
        (("w6a6",), False, PRESETS["w6a6"].graph_type),
        (("w4a8", "token-group"), False, None),
        (("w4a16",), False, None),
        (("float",), False, None),
    ],
)
def test_int4_weights_under_codes_of_the_graph_have_two_levels(
    words: tuple[str, ...], two_level: bool, graph_type: object
) -> None:
    scheme = scheme_of(*words)  # type: ignore[arg-type]
    assert (scheme.two_level, scheme.graph_type) == (two_level, graph_type)


@pytest.mark.parametrize("scheme", [*SCHEMES, *PRESETS.values()], ids=str)
def test_a_rule_of_a_scheme_gives_it_whatever_the_recipe_says(scheme: Scheme) -> None:
    recipe = Recipe.parse({"model": "m", "bits": "w4a4", "granularity": "token", "group_size": 32}, "here")
    fitted = scheme.fitted(1152)
    assert recipe.complete(Rule.of("", fitted)).scheme == fitted
