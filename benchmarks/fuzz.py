"""Mutates every format that a user can provide. The real command line reads each mutant in a process with limits.

    pip install -c constraints.txt ".[cpu,triton]" && python benchmarks/fuzz.py --inputs 10000 --seed 0

Prints a table by format and the kinds of all faults. `--format NAME --only INDEX --keep FOLDER` repeats one input. Exits with
status 1 if there is a fault: a traceback, a hang, a crash, too much memory, a write outside the output folder, a wrong result
without an error, or an error without a readable message.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fuzzing import fork_server, materials
from fuzzing.cases import Case, Format, guarded
from fuzzing.folders import FORMATS as FOLDERS
from fuzzing.folders import SEARCH
from fuzzing.fork_server import Limits, Outcome, command, serve
from fuzzing.graphs import FORMATS as GRAPHS
from fuzzing.judge import ENDINGS, FAULTS, STOPPED, Verdict, judge
from fuzzing.models import FORMATS as MODELS
from fuzzing.recipes import FORMATS as RECIPES
from fuzzing.texts import FORMATS as TEXTS

FORMATS = (*MODELS, *RECIPES, *GRAPHS, *FOLDERS, *TEXTS)
LIMITS = Limits()


@dataclass
class Tally:
    """Counts of endings by format, and the inputs of each kind of fault."""

    endings: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    kinds: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    seconds: float = 0.0
    memory: int = 0

    def add(self, form: Format, index: int, verdict: Verdict, outcome: Outcome) -> None:
        """Count one input."""
        self.endings[form.name][verdict.ending] += 1
        self.memory = max(self.memory, outcome.memory)
        if verdict.ending in FAULTS:
            self.kinds[f"{verdict.ending}: {verdict.kind}"].append(f"{form.name} {index}")

    @property
    def faults(self) -> int:
        """The number of inputs that ended in a fault."""
        return sum(map(len, self.kinds.values()))

    def table(self) -> str:
        """Return a Markdown table with a row for each format and a column for each ending."""
        columns = [name for name in ENDINGS if name in FAULTS[:5] or any(row[name] for row in self.endings.values())]
        lines = [f"| format | inputs | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
        total: Counter[str] = Counter()
        for name, row in self.endings.items():
            total += row
            lines.append(f"| {name} | {row.total()} | {' | '.join(str(row[item]) for item in columns)} |")
        lines.append(f"| all | {total.total()} | {' | '.join(str(total[item]) for item in columns)} |")
        return "\n".join(lines)


def stop_before_float() -> None:
    """Make the run end before the float graph, which takes seconds for every input."""
    from dq_export.cli import errors
    from dq_export.cli.progress import Lines

    class Stopping(Lines):
        """Progress that ends the process when the float graph begins."""

        def begin(self, stage: str, text: str, *, shown: bool = True) -> None:
            if stage == "float":
                print(STOPPED, file=sys.stderr)
                raise SystemExit(0)
            super().begin(stage, text, shown=shown)

    vars(errors)["Lines"] = Stopping


def attempt(form: Format, index: int, seed: int, stock: Path, root: Path) -> None:
    """Make one mutant and run its command in this process."""
    guard, work = root / "guard", root / "work"
    (guard / "folder").mkdir(parents=True)
    work.mkdir()
    (guard / "canary.txt").write_text("the canary sings\n")
    (guard / "folder" / "inside.txt").write_text("untouched\n")
    case: Case = form.mutate(random.Random(f"{seed}/{form.name}/{index}"), stock, work, guard)
    (root / "case.json").write_text(json.dumps({"words": case.words, "mutation": case.mutation, "writes": case.writes}))
    (root / "before.json").write_text(json.dumps(guarded(root)))
    os.chdir(work)
    if not case.whole:
        stop_before_float()
    try:
        command(case.words)
    except SystemExit as end:
        if end.code:
            raise
    sys.stderr.flush()
    if STOPPED not in (root / "stderr").read_text(errors="replace"):
        (root / "judged.txt").write_text(case.judge())


READ = (
    ["verify", "out"], ["audit", "out"], ["audit", "out", "--json"], ["explain", "out", "transformer_blocks.0.attn1.to_q"],
    ["triton", "--check", "out"],
)  # fmt: skip
"""Commands whose output for a mutant is compared with that for the unmutated folder."""


def prepare(folder: Path) -> dict[str, str]:
    """Import everything, make the materials in `folder`, and return the output of the commands of `READ` for them.

    After that a mutant whose network equals an earlier one to the last bit takes the exporter's graph of that one.
    """
    quiet = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
    os.environ.update(quiet, MKL_CBWR="AUTO,STRICT", TOKENIZERS_PARALLELISM="false")
    from traced_once import TracedOnce

    from dq_export.families import torch_export

    torch_export.trace = TracedOnce(folder).trace
    materials.save_models(folder)
    materials.save_text(folder)
    export = ["--model", str(folder / "plain"), *materials.EXPORT, "--triton", "-o", str(folder / "out")]
    fork_server.preload(export, folder / "imports")
    materials.save_graphs(folder / "graphs", folder / "out")
    search = ["search", "--model", str(folder / "plain"), *SEARCH, "-o", str(folder / "search")]
    commands = [(folder / "searching", functools.partial(command, search))]
    for number, words in enumerate(READ):
        root = folder / f"expected{number}"
        shutil.copytree(folder / "out" / "triton" if "--check" in words else folder / "out", root / "work" / "out")
        commands.append((root, functools.partial(_inside, root / "work", words)))
    outcomes = dict(serve(commands, limits=Limits(seconds=600)))
    errors = [outcome.stderr for outcome in outcomes.values() if outcome.status not in (0, 1)]
    if errors:
        raise RuntimeError(f"a command fails on unmutated materials: {errors[0][-2000:]}")
    return {" ".join(words): outcomes[folder / f"expected{number}"].stdout for number, words in enumerate(READ)}


def _inside(folder: Path, words: list[str]) -> None:
    os.chdir(folder)
    command(words)


def jobs(inputs: list[tuple[Format, int]], seed: int, stock: Path, folder: Path) -> Iterator[tuple[Path, Callable[[], None]]]:
    """Yield a folder and the work of each input."""
    for form, index in inputs:
        root = folder / f"{FORMATS.index(form)}-{index}"
        root.mkdir()
        yield root, functools.partial(attempt, form, index, seed, stock, root)


def spread(inputs: int, names: list[str]) -> list[tuple[Format, int]]:
    """Distribute inputs over the formats by their shares, at least one each, in turn."""
    formats = [form for form in FORMATS if not names or form.name in names]
    shares = sum(form.share for form in formats)
    counts = {form.name: max(1, round(inputs * form.share / shares)) for form in formats}
    numbered = [(form, index) for form in formats for index in range(counts[form.name])]
    return sorted(numbered, key=lambda item: item[1] / counts[item[0].name])


def fuzz(
    inputs: list[tuple[Format, int]], seed: int, folder: Path, keep: Path | None = None, limits: Limits = LIMITS, workers: int = 2
) -> Tally:
    """Run inputs and judge each.

    Args:
        folder: an empty folder to work in.
        keep: folder for the mutants and outputs of faults; None: they are not kept.
    """
    stock = folder / "stock"
    stock.mkdir()
    expected = prepare(stock)
    tally, start = Tally(), time.monotonic()
    for root, outcome in serve(jobs(inputs, seed, stock, folder), workers=workers, limits=limits):
        number, index = map(int, root.name.split("-"))
        form = FORMATS[number]
        verdict = judge(form, root, outcome, expected)
        tally.add(form, index, verdict, outcome)
        if keep and verdict.ending in FAULTS:
            _keep(root, keep, verdict)
        with contextlib.suppress(OSError):
            shutil.rmtree(root)
    tally.seconds = time.monotonic() - start
    return tally


def _keep(root: Path, keep: Path, verdict: Verdict) -> None:
    """Copy a fault's folder with its links, and write the verdict into it."""
    target = keep / root.name
    shutil.rmtree(target, ignore_errors=True)
    with contextlib.suppress(shutil.Error, OSError):
        shutil.copytree(root, target, symlinks=True, ignore=_special)
    (target / "verdict.txt").write_text(f"{verdict.ending}: {verdict.kind}\n")


def _special(folder: str, names: list[str]) -> set[str]:
    return {name for name in names if not (Path(folder) / name).is_symlink() and (Path(folder) / name).is_fifo()}


def show(tally: Tally, seed: int, *, shown: int = 3) -> None:
    """Print the table and the kinds of faults."""
    print(tally.table())
    inputs = sum(row.total() for row in tally.endings.values())
    print(f"\n{inputs} inputs in {tally.seconds:.0f} s, {inputs / max(tally.seconds, 1e-9):.1f} a second; ", end="")
    print(f"at most {tally.memory / 1e6:.0f} MB above the imports; {tally.faults} faults of {len(tally.kinds)} kinds")
    for kind, inputs_ in sorted(tally.kinds.items(), key=lambda item: -len(item[1])):
        print(f"{len(inputs_):5}  {kind}  [{'; '.join(inputs_[:shown])}]")


def options(arguments: Mapping[str, object] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--format", action="append", default=[], choices=[form.name for form in FORMATS])
    parser.add_argument("--only", type=int, help="index of one input to repeat, with one --format")
    parser.add_argument("--keep", type=Path, help="folder for the mutants and outputs of faults")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=LIMITS.seconds, help="wall clock of one input")
    return parser.parse_args()


def main() -> None:
    """Fuzz, print, and fail on any fault."""
    arguments = options()
    if arguments.only is None:
        inputs = spread(arguments.inputs, arguments.format)
    else:
        inputs = [(form, arguments.only) for form in FORMATS if form.name in arguments.format]
    if arguments.keep:
        arguments.keep.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        tally = fuzz(inputs, arguments.seed, Path(folder), arguments.keep, Limits(seconds=arguments.seconds), arguments.workers)
    show(tally, arguments.seed)
    sys.exit(bool(tally.faults))


if __name__ == "__main__":
    main()
