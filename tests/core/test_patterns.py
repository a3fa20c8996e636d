"""Regular expressions of users: searched in linear time, refused in one line."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dq_export.core.patterns import PatternError, require_pattern, search


def test_a_pattern_that_backtracks_for_ever_elsewhere_is_searched_at_once() -> None:
    assert not search(r"(\w+\.?)+!", "transformer_blocks.0.attn1.to_q." * 4)  # Python's `re` does not end in a day


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("a{4294967295}", "repeats more than 1000 times"),
        ("(" * 900 + ")" * 900 + "(" * 200, "missing"),
        ("(" * 5000 + ")" * 5000, "may have 2000"),
        ("[", r"missing \]"),
        ("(?=a)", "invalid perl operator"),
        (r"(a)\1", "invalid escape"),
        ("(?:a{1000}){1000}", "repetition|too large"),
        ("\ud800", "surrogates"),
    ],
)
def test_a_text_that_is_not_a_pattern_is_refused_with_the_reason(pattern: str, reason: str) -> None:
    with pytest.raises(PatternError, match=reason) as refused:
        require_pattern(pattern)
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 300


@given(st.text("abq.0_", max_size=6), st.text("abq.0_", max_size=8), st.sampled_from(["{}", "^{}", "{}$", r"\.{}\.", "({}|b)+"]))
def test_what_both_syntaxes_have_means_the_same_as_in_python(part: str, text: str, form: str) -> None:
    pattern = form.format(re.escape(part))
    assert search(pattern, text) == (re.search(pattern, text) is not None)
