"""Files of people: what is read, and that everything else ends in one line, at once and in little memory."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dq_export.core.documents import (
    DEPTH,
    YAML_NODES,
    DocumentError,
    MissingError,
    parse_json,
    printable,
    read_bytes,
    read_json,
    read_text,
    read_yaml,
    shown,
)

BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}]\n" for a, b in zip("abcdefghijk", "bcdefghijkl", strict=True)
)
HOSTILE = {
    "alias bomb": (BOMB, "aliases are not read"),
    "brackets": ("[" * 5000, f"more than {DEPTH} levels"),
    "digits": ("seed: " + "9" * 5000, "too many digits"),
    "tag int": ("seed: !!int abc", "tag 'tag:yaml.org,2002:int' is not read"),
    "tag float": ("seed: !!float x", "tag 'tag:yaml.org,2002:float' is not read"),
    "tag python": ("a: !!python/object/apply:os.system [x]", "is not read"),
    "200000 keys": ("\n".join(f"k{i}: 1" for i in range(200_000)), "larger than"),
    "60000 keys": ("\n".join(f"k{i}: 1" for i in range(60_000)), f"more than {YAML_NODES} values"),
    "20000 rules": ("rules:\n" + "- {match: a, action: float}\n" * 20_000, f"more than {YAML_NODES} values"),
    "equal keys": ("a: 1\nb: 2\na: 3", "key 'a' stands there twice, line 3"),
    "list as a key": ("? [a]\n: 1", "as a key"),
    "half a pair": ('a: "\\ud800"', "not valid Unicode"),
    "no yaml": ("a: [1", "not readable as YAML"),
    "two documents": ("a: 1\n---\nb: 2", "not readable as YAML"),
    "null byte": ("a: \0", "not readable as YAML"),
    "escape": ("\x1b[31m", "not readable as YAML"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_yaml_that_explodes_is_refused_in_one_short_line(name: str, tmp_path: Path) -> None:
    text, reason = HOSTILE[name]
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(DocumentError) as refused:
        read_yaml(path)
    message = str(refused.value)
    assert message.startswith(str(path))
    assert reason in message
    assert message.isprintable()
    assert len(message) < 400


def test_every_hostile_recipe_is_refused_in_little_memory(tmp_path: Path) -> None:
    for name, (text, _) in HOSTILE.items():
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(DocumentError):
            read_yaml(path)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, name


def test_dates_and_merge_keys_are_text(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("seed: 2001-99-99\n<<: {a: yes}\nb: null")
    assert read_yaml(path) == {"seed": "2001-99-99", "<<": {"a": True}, "b": None}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, f"more than {DEPTH} levels"),
        ("[" * 40 + "]" * 40, f"more than {DEPTH} levels"),
        ('{"a": {"b": 1, "b": 2}}', "key 'b' stands there twice"),
        ("NaN", "'NaN' is not a finite number"),
        ("[-Infinity]", "not a finite number"),
        ("1e999", "not a finite number"),
        ("1" * 5000, "a number of 5000 digits"),
        ("\ufeff{}", "byte order mark"),
        ('{"a": "\\ud800"}', "not valid Unicode"),
        ("{} x", "not readable as JSON"),
        ("", "not readable as JSON"),
    ],
)
def test_json_out_of_bounds_is_refused(text: str, reason: str) -> None:
    with pytest.raises(DocumentError, match=r"^source: ") as refused:
        parse_json(text, "source")
    assert reason in str(refused.value)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=8,
)


@given(VALUES)
def test_json_of_any_value_reads_back(value: Any) -> None:
    import json

    assert parse_json(json.dumps(value), "source") == value


def test_infinities_of_pythons_own_writer_are_read_if_allowed(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a": Infinity}')
    assert read_json(path, finite=False) == {"a": float("inf")}


def test_only_regular_files_are_read_and_no_more_than_the_limit(tmp_path: Path) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_bytes(b"12345")
    link.symlink_to(file)
    assert read_bytes(link, 5) == b"12345"
    with pytest.raises(DocumentError, match="larger than the 4 bytes"):
        read_bytes(file, 4)
    with pytest.raises(DocumentError, match="cannot be read"):
        read_bytes(link, links=False)
    with pytest.raises(DocumentError, match=r"cannot be read \(Is a directory\)|not a regular file"):
        read_bytes(tmp_path)
    with pytest.raises(MissingError, match="no such file"):
        read_bytes(tmp_path / "none")
    with pytest.raises(DocumentError, match="not a regular file"):
        read_bytes(Path("/dev/zero"))
    with pytest.raises(DocumentError, match="cannot be read"):
        read_bytes(tmp_path / ("x" * 5000))
    with pytest.raises(DocumentError, match="cannot be read"):
        read_bytes(tmp_path / "a\0b")
    file.write_bytes(b"a\xff")
    with pytest.raises(DocumentError, match=r"not UTF-8 \(byte 1\)"):
        read_text(file)


def test_nothing_of_a_file_that_is_too_large_is_read(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 40)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DocumentError, match="larger than"):
        read_bytes(tmp_path / "large", 1 << 31)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_a_pipe_is_refused_and_does_not_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    code = (
        "import sys; from pathlib import Path; from dq_export.core.documents import *\n"
        "try: read_json(Path(sys.argv[1]))\n"
        "except DocumentError as error: print(error)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "pipe"], capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout == f"{tmp_path / 'pipe'}: not a regular file\n"


def test_values_are_shown_in_one_short_printable_line() -> None:
    assert shown("a") == "'a'"
    for value in ("\x1b[31m\n\u202e" * 50, "x" * 100_000, 10**5000, [[["a" * 1000] * 1000] * 1000], {"k" * 999: 1}):
        assert shown(value).isprintable()
        assert len(shown(value)) <= 121
    assert printable("a\x1b[2J\nb") == "a\\x1b[2J\\nb"
    assert len(printable("x" * 1000)) <= 300
