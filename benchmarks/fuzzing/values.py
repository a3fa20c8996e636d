"""Mutations for every format: of JSON documents, of bytes, and of paths."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

NUMBERS: tuple[Any, ...] = (
    0, 1, -1, 2, 3, 7, 9, 13, 1000, 2**31, 2**63, 10**9, 10**12, 10**30, -(10**9), 0.5, -0.5, 1.5, 1e-30, 1e308, -1e308,
    float("nan"), float("inf"), float("-inf"),
)  # fmt: skip
TEXTS = (
    "", "a", "None", "true", "1", "1e9", "..", "../..", "../guard/canary.txt", "/etc/passwd", "/dev/zero", "x" * 10_000,
    "\x1b[31mred", "<script>alert(1)</script>", "[/]", "[bold]", "a\nb", "\u202e", "\ud800", "²", "name with space", "%s{}",
    "linear", "scaled_linear", "squaredcos_cap_v2", "epsilon", "v_prediction", "sample", "trailing", "linspace", "leading",
    "DDPMScheduler", "DiTTransformer2DModel", "Transformer2DModel", "UNet2DConditionModel", "AutoencoderKL", "os.system",
)  # fmt: skip
SHAPES: tuple[Any, ...] = (None, True, False, [], [1], [None], ["a", "b"], {}, {"a": 1}, [[1, 2], [3]], {"_class_name": "X"})


def value(rng: random.Random) -> Any:
    """Return a random value that JSON or YAML can hold, mostly one that does not fit."""
    return copy.deepcopy(rng.choice(rng.choice((NUMBERS, TEXTS, SHAPES))))


def nearby(rng: random.Random, old: Any) -> Any:
    """Return a value similar to the old one, like a person's mistake."""
    if isinstance(old, bool):
        return rng.choice((not old, int(old), str(old)))
    if isinstance(old, int | float):
        return rng.choice((old + 1, old - 1, old * 2, -old, old * 1000, old / 2, old // 1, str(old), [old], float(old)))
    if isinstance(old, str):
        return rng.choice((old[:-1], old + "x", old.upper(), [old], old.replace("_", "-"), None))
    if isinstance(old, list):
        return rng.choice((old[:-1], old + old, old[::-1], {str(i): item for i, item in enumerate(old)}))
    return rng.choice((None, [old], str(old)))


def places(document: Any, trail: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of keys of every value inside a document."""
    trails = []
    entries = document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    for key, item in entries:
        trails.append((*trail, key))
        trails += places(item, (*trail, key))
    return trails


def change(rng: random.Random, document: Any) -> tuple[Any, str]:
    """Return a copy of a document with one value changed, removed, renamed or added, and a description."""
    document = copy.deepcopy(document)
    trails = places(document)
    if not trails or rng.random() < 0.03:
        return value(rng), "the whole document replaced"
    trail = rng.choice(trails)
    holder = document
    for key in trail[:-1]:
        holder = holder[key]
    key, kind = trail[-1], rng.choice(("set", "set", "set", "near", "near", "remove", "rename", "add"))
    name = ".".join(map(str, trail))
    if kind == "remove":
        del holder[key]
    elif kind in ("rename", "add") and isinstance(holder, dict):
        new = rng.choice((f"{key}x", str(key)[:-1], "unknown", "", "__class__", "kwargs", "self"))
        holder[new] = holder.pop(key) if kind == "rename" else value(rng)
        name += f" -> {new}"
    else:
        holder[key] = nearby(rng, holder[key]) if kind == "near" else value(rng)
        name += f" = {holder[key]!r:.60}"
    return document, f"{kind} {name}"


def dump(document: Any) -> bytes:
    """Return a document as JSON, which may hold NaN and half surrogates."""
    return json.dumps(document, indent=1).encode("utf-8", "surrogatepass")


EXPLODING: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda text: b"",
    "brackets": lambda text: b"[" * 5000,
    "nested objects": lambda text: b'{"a":' * 5000 + b"1" + b"}" * 5000,
    "5,000 digits": lambda text: b'{"a": ' + b"9" * 5000 + b"}",
    "digits in place": lambda text: text.replace(b"1", b"1" * 5000, 1),
    "byte order mark": lambda text: b"\xef\xbb\xbf" + text,
    "utf-16": lambda text: text.decode("utf-8", "replace").encode("utf-16"),
    "latin-1": lambda text: b"\xe9" + text,
    "many keys": lambda text: b"{" + b", ".join(b'"k%d": 1' % i for i in range(50_000)) + b"}",
    "a key twice": lambda text: text.replace(b"{", b'{"_class_name": "X", "version": 9,', 1),
    "cut in half": lambda text: text[: len(text) // 2],
    "cut by one": lambda text: text[:-2],
    "comma": lambda text: text.replace(b"}", b",}", 1),
    "zeros": lambda text: bytes(len(text)),
    "large": lambda text: b'{"a": "' + b"x" * 30_000_000 + b'"}',
}


def mutate_json(rng: random.Random, text: bytes) -> tuple[bytes, str]:
    """Return a JSON file's bytes with changed content or form, and a description."""
    kind = rng.random()
    if kind < 0.1:
        name = rng.choice(list(EXPLODING))
        return EXPLODING[name](text), name
    if kind < 0.2:
        return mutate_bytes(rng, text)
    document, words = json.loads(text), []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        document, description = change(rng, document)
        words.append(description)
    return dump(document), "; ".join(words)


def mutate_bytes(rng: random.Random, data: bytes, until: int | None = None) -> tuple[bytes, str]:
    """Bytes flipped, cut, removed, repeated or put in, before byte `until`."""
    size = min(len(data), until or len(data)) or 1
    at, much = rng.randrange(size), rng.choice((1, 1, 2, 4, 8, 64))
    kind = rng.choice(("flip", "flip", "flip", "cut", "remove", "repeat", "insert", "ones", "append"))
    if kind == "flip":
        mutant = bytearray(data or b"\0")
        for _ in range(much):
            mutant[rng.randrange(min(size, len(mutant)))] = rng.randrange(256)
        return bytes(mutant), f"{much} bytes flipped"
    mutants = {
        "cut": data[:at],
        "remove": data[:at] + data[at + much :],
        "repeat": data[:at] + data[at : at + much] * 2 + data[at + much :],
        "insert": data[:at] + rng.randbytes(much) + data[at:],
        "ones": data[:at] + b"\xff" * much + data[at + much :],
        "append": data + rng.randbytes(much),
    }[kind]
    return mutants, f"{kind} {much} bytes at {at}"


SPECIAL = ("missing", "folder", "fifo", "endless", "loop", "dangling", "canary", "guard", "other")


def mutate_path(rng: random.Random, path: Path, guard: Path) -> str:
    """Put something else in a file's or folder's place: links, special files, nothing."""
    kind = rng.choice(SPECIAL)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    targets = {
        "endless": "/dev/zero", "loop": path.name, "dangling": "nowhere", "canary": str(guard / "canary.txt"),
        "guard": str(guard), "other": "/etc/hostname",
    }  # fmt: skip
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind in targets:
        path.symlink_to(targets[kind])
    return f"{path.name}: {kind}"
