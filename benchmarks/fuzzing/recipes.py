"""Mutates recipes, and options of the command line."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import yaml

from .cases import Case, Format
from .materials import EXPORT
from .values import change, mutate_bytes, mutate_path, value

PATTERNS = (
    "", ".*", "(", "a{4294967295}", r"(\w+\.?)+!", "(a+)+$", "(" * 5000 + ")" * 5000, "[", "(?P<a>x)(?P=a)", "(?<=a)b", r"\1",
    "x" * 100_000, "(?i)ATTN", "a{1000}{1000}", "\\p{L}", "[[:alpha:]]", "(?:" * 400 + ")" * 400, "\ud800", "(?=x)", "\\",
)  # fmt: skip
EXPLODING = {
    "alias bomb": "a: &a [x, x]\n" + "".join(f"k{i}: &k{i} [*{'a' if not i else f'k{i - 1}'}, *a]\n" for i in range(40)),
    "deep aliases": "model: &a {b: &b {c: *a}}\n",
    "brackets": "[" * 5000,
    "braces": "{a: " * 5000 + "1" + "}" * 5000,
    "nested": "".join(" " * i + "a:\n" for i in range(2000)),
    "5,000 digits": "seed: " + "9" * 5000 + "\n",
    "bad date": "seed: 2001-99-99\n",
    "bad time": "seed: 2001-01-01 99:99:99\n",
    "tag int": "seed: !!int abc\n",
    "tag float": "seed: !!float x\n",
    "tag python": "seed: !!python/object/apply:os.system ['echo owned > ../guard/owned']\n",
    "tag binary": "model: !!binary '@@@'\n",
    "tag set": "rules: !!set {a, b}\n",
    "tag omap": "rules: !!omap [a, b]\n",
    "tag unknown": "seed: !x 1\n",
    "merge": "<<: 1\n",
    "merge list": "<<: [{seed: 1}, {seed: 2}]\n",
    "unknown keys": "".join(f"k{i}: 1\n" for i in range(200_000)),
    "rules": "rules:\n" + "- {match: '.', action: float}\n" * 20_000,
    "a key twice": "seed: 1\nseed: 2\n",
    "a list": "- seed\n",
    "a word": "seed\n",
    "empty": "",
    "two documents": "seed: 1\n---\nseed: 2\n",
    "tab": "seed:\t1\n\tx: 2\n",
    "nul": "seed: 1\0\n",
    "null key": "? \n: 1\n",
    "list as key": "? [a, b]\n: 1\n",
    "sexagesimal": "seed: 1:30\n",
    "octal": "seed: 010\n",
    "infinite": "guidance_scale: .inf\n",
    "not a number": "min_sqnr: .nan\n",
    "large": "model: " + "x" * 20_000_000 + "\n",
    "byte order mark": "\ufeffseed: 1\n",
}
OPTIONS = (
    "format", "provider", "dtype", "target", "min-shapes", "opt-shapes", "max-shapes", "bits", "granularity", "group-size",
    "rounding", "attention", "timesteps", "method", "percentile", "bins", "scaling", "alpha", "rho", "exclude", "calibration",
    "calib-size", "steps", "parity-size", "guidance-scale", "seed", "min-coverage", "min-sqnr", "device", "max-memory",
    "model", "recipe", "prompts", "conditions", "metric-weights", "max-lpips",
)  # fmt: skip


def recipe(rng: random.Random, materials: Path, work: Path, guard: Path) -> Case:
    """Mutate a recipe file."""
    file = work / "recipe.yaml"
    text = (materials / "out" / "recipe.yaml").read_text()
    kind = rng.random()
    whole = rng.random() < 0.03
    words = ["--recipe", file.name, "-o", "out", *EXPORT]
    if kind < 0.3:
        name = rng.choice(list(EXPLODING))
        file.write_text(EXPLODING[name] + (text if rng.random() < 0.3 else ""), errors="surrogatepass")
        return Case(words, name, whole, lambda: changed_values(file, work / "out" / "recipe.yaml"))
    file.write_text(text)
    if kind < 0.35:
        return Case(words, mutate_path(rng, file, guard), whole)
    if kind < 0.5:
        data, mutation = mutate_bytes(rng, text.encode())
        file.write_bytes(data)
        return Case(words, mutation, whole, lambda: changed_values(file, work / "out" / "recipe.yaml"))
    document, mutation = _mutate(rng, yaml.safe_load(text))
    file.write_text(yaml.safe_dump(document, sort_keys=False, allow_unicode=rng.random() < 0.5), errors="surrogatepass")
    return Case(words, mutation, whole, lambda: changed_values(file, work / "out" / "recipe.yaml"))


def _mutate(rng: random.Random, document: Any) -> tuple[Any, str]:
    if rng.random() < 0.3:
        pattern = rng.choice(PATTERNS)
        document["rules"].insert(0, {"match": pattern, "action": rng.choice(("float", "w8a8", "w4a16", "fp8"))})
        return document, f"rule {pattern!r:.60}"
    words = []
    for _ in range(rng.choice((1, 1, 2))):
        document, mutation = change(rng, document)
        words.append(mutation)
    return document, "; ".join(words)


def changed_values(source: Path, output: Path) -> str:
    """Return the values of an accepted recipe that differ in the recipe that the export wrote."""
    if not output.is_file():
        return "other"
    before, after = yaml.safe_load(source.read_bytes()), yaml.safe_load(output.read_bytes())
    flags = {"steps", "calib_size", "parity_size", "min_sqnr", "model"}
    changes = [
        key
        for key in before
        if key not in flags and before[key] is not None and key != "rules" and before[key] != after.get(key, "not there")
    ]
    return f"silent: {', '.join(map(str, changes))} became another value" if changes else ""


def options(rng: random.Random, materials: Path, work: Path, guard: Path) -> Case:
    """Choose options of any command, with values of any kind."""
    out = rng.choice(("out", "out", "out", "out/../out", "", "a\nb", "~/x"))
    words = ["--model", str(materials / "plain"), *EXPORT, "-o", out]
    for _ in range(rng.choice((1, 1, 2, 3))):
        name = rng.choice(OPTIONS)
        text = rng.choice(PATTERNS) if name == "exclude" else str(value(rng))
        words += [f"--{name}={text[:10_000]}".encode("utf-8", "replace").decode().replace("\0", "")]
    return Case(words, " ".join(words[-3:])[:200], rng.random() < 0.03, writes=("work", "home"))


FORMATS = (Format("recipe", 9, recipe, accepts=(0, 3, 4)), Format("options", 4, options, accepts=(0, 3, 4)))
