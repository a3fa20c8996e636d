"""Judges an input by its process: one word of `ENDINGS`, and the kind of a fault."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .cases import Format, guarded
from .fork_server import Outcome

GOOD = ("refused", "right", "other verdict", "loaded")
FAULTS = ("traceback", "hang", "memory", "crash", "outside", "silent", "long message", "no message", "no mutant")
ENDINGS = (*GOOD, *FAULTS)
"""`refused`: status 1, 2 or 5 with one error of a few lines. `right`: the result equals that of an independent reading or of the
unmutated input. `other verdict`: another verdict or result. `loaded`: accepted, and stopped before the float graph."""
LINES, LENGTH = 12, 3000
"""Greatest lines and characters of an error message. A recipe lists all its violations, one per line."""
STOPPED = "stopped before the float graph"
FRAME = re.compile(r'File "([^"]+)", line \d+, in (\S+)')
PRODUCT = re.compile(r"/(dq_export|calibration|passes|deploy)/")


@dataclass(frozen=True)
class Verdict:
    """The ending of one input, and the kind of a fault, which is the same for all inputs with one cause."""

    ending: str
    kind: str = ""


def judge(form: Format, root: Path, outcome: Outcome, expected: Mapping[str, str]) -> Verdict:
    """Return the verdict on one process.

    Args:
        root: the process's folder, with `case.json` and `before.json` from the child, and `judged.txt` if the command succeeded.
        expected: output for the unmutated input, by the words of the command.
    """
    if not (root / "before.json").exists():
        return Verdict("no mutant", outcome.stderr.strip().splitlines()[-1] if outcome.stderr.strip() else "")
    case = json.loads((root / "case.json").read_text())
    difference = _outside(root, case["writes"])
    if difference:
        return Verdict("outside", f"outside: {difference}")
    if outcome.stopped:
        place = last_frame(outcome.stderr) or f"{form.name}, {case['words'][0]}"
        return Verdict("hang" if outcome.stopped == "time" else "memory", f"{outcome.stopped} over: {place}")
    trace = "Traceback (most recent call last)" in outcome.stderr
    if trace and "MemoryError" in outcome.stderr[-300:]:
        return Verdict("memory", f"MemoryError in {last_frame(outcome.stderr)}")
    if trace:
        return Verdict("traceback", traceback_kind(outcome.stderr))
    if outcome.status < 0 or outcome.status > 128:
        return Verdict("crash", f"status {outcome.status} of {case['words'][0]}")
    if outcome.status in form.accepts:
        return _accepted(root, outcome, case["words"], expected)
    return _refused(outcome)


def _refused(outcome: Outcome) -> Verdict:
    errors = [index for index, line in enumerate(outcome.stderr.splitlines()) if line.lower().startswith("error")]
    if not errors:
        return Verdict("no message", f"status {outcome.status} without an error line")
    message = outcome.stderr.splitlines()[errors[0] :]
    if len(message) > LINES or sum(map(len, message)) > LENGTH:
        return Verdict("long message", f"{len(message)} lines, {sum(map(len, message))} characters: {message[0][:80]}")
    if any(character < " " and character != "\t" for line in message for character in line):
        return Verdict("long message", f"control characters: {message[0][:80]!r}")
    return Verdict("refused")


def _accepted(root: Path, outcome: Outcome, words: list[str], expected: Mapping[str, str]) -> Verdict:
    if outcome.stderr.rstrip().endswith(STOPPED):
        return Verdict("loaded")
    if outcome.status in (3, 4) and "error:" not in outcome.stderr and not outcome.stdout.strip():
        return Verdict("no message", f"status {outcome.status} without an error line")
    result = (root / "judged.txt").read_text() if (root / "judged.txt").exists() else "other"
    if result == "equal":
        result = "" if outcome.stdout == expected.get(" ".join(words)) else "other"
    if result == "other":
        return Verdict("other verdict")
    return Verdict("silent", re.sub(r"-?\d+", "N", result)) if result else Verdict("right")


def _outside(root: Path, writes: list[str]) -> str:
    """Return the first change in the job's folder that the command may not make; empty if there is none."""
    before = json.loads((root / "before.json").read_text())
    after = guarded(root)
    # ONNX Runtime stores an identifier of the machine in the user's cache.
    expected = ("tmp", "home/.cache", "stdout", "stderr", "before.json", "judged.txt", *writes)
    for name in sorted({*before, *after}):
        if before.get(name) != after.get(name) and not any(name == item or name.startswith(f"{item}/") for item in expected):
            return f"{name} {'changed' if name in before and name in after else 'made' if name in after else 'removed'}"
    return ""


def last_frame(text: str) -> str:
    """Return file and function of the product's innermost frame in a printed traceback."""
    frames = [(path, name) for path, name in FRAME.findall(text) if PRODUCT.search(path) and "site-packages" not in path]
    if not frames:
        return ""
    path, name = frames[-1]
    return f"{Path(path).parent.name}/{Path(path).name}:{name}"


def traceback_kind(text: str) -> str:
    """Return the exception and the product's innermost frame."""
    trace = text[text.rindex("Traceback (most recent call last)") :]
    lines = [line for line in trace.splitlines()[1:] if line and not line.startswith(" ")]
    name = next((re.split(r"[:\s]", line)[0] for line in lines if re.match(r"[\w.]+(:|$)", line)), "?")
    return f"{name.split('.')[-1]} in {last_frame(text)}"
