"""Mutates finished output folders and Triton repositories."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from pathlib import Path

import yaml

from .cases import Case, Format
from .materials import EXPORT
from .models import mutate_header
from .values import change, mutate_bytes, mutate_json, mutate_path

GRAPH = ("model.onnx", "model.onnx.data")
REPLAY = ("parity/inputs.json", "parity/outputs.json", "parity/pytorch.safetensors", "parity/command.txt")
READ_BY: dict[str, tuple[str, ...]] = {
    "verify": (*REPLAY, *REPLAY, *GRAPH, "recipe.yaml", "report.json"),
    "audit": (*GRAPH, "recipe.yaml", "recipe.yaml"),
    "bench": (*GRAPH, *REPLAY, "recipe.yaml", "recipe.yaml", "float/model.onnx", "engine/session.json"),
    "explain": ("report.json",),
    "finish": (*GRAPH, "recipe.yaml", "report.json", "report.json", "triton/denoiser/config.pbtxt"),
    "triton": ("stages.json", "stages.json", "recipe.yaml", *GRAPH, "report.json", "calibration.safetensors"),
    "continue": (
        "stages.json", "stages.json", "recipe.yaml", "calibration.safetensors", "calibration.safetensors", *REPLAY, *GRAPH,
        "float/model.onnx", "float/model.onnx.data", "float/diffusion_pytorch_model.safetensors", "engine/optimized.onnx",
        "engine/session.json", "report.json",
    ),
}  # fmt: skip
"""Files by the command that reads them. Important files are listed twice."""
CONTINUE = (
    ["--recipe", "out/recipe.yaml", "-o", "out"], ["--model", "MODEL", *EXPORT, "--triton", "-o", "out"],
    ["--model", "MODEL", *EXPORT, "--triton", "--overwrite", "-o", "out"],
    ["quantize", "--recipe", "out/recipe.yaml", "-o", "out", "--overwrite"],
)  # fmt: skip
LINKS = (
    ".lock", ".recipe.yaml.new", ".stages.json.new", ".report.html.new", ".report.json.new", ".partial", ".calibration", "parity",
    "float", "engine", "triton", "search.svg", "report.html", "report.json", "recipe.yaml", "stages.json", "model.onnx",
    "model.onnx.data", "calibration.safetensors", "parity/inputs.json", "parity/outputs.json", "parity/command.txt",
    "parity/pictures.png", "engine/session.json", "engine/optimized.onnx", "float/model.onnx", "triton/README.md",
    "parity/pytorch.safetensors", ".model.onnx.new", "parity/model.onnx",
)  # fmt: skip
POLYGRAPHY = (
    "--data-loader-script x.py", "--save-outputs ../f", "-h", "--snr-threshold sample:-200", "'", "\xff", "--trt", "; touch ../f",
    "--load-inputs ../guard/canary.txt", "--load-outputs /dev/zero", "--script x.py", "--gen-script ../f", "--compare",
)  # fmt: skip


def export_folder(rng: random.Random, materials: Path, work: Path, guard: Path) -> Case:
    """Change a file of a finished export, and choose a command that reads it."""
    out = Path(shutil.copytree(materials / "out", work / "out", symlinks=True))
    kind = rng.choice(sorted(READ_BY))
    words = {
        "continue": rng.choice(CONTINUE),
        "explain": ["explain", "out", rng.choice(("transformer_blocks.0.attn1.to_q", "x"))],
        "audit": ["audit", "out", *rng.choice(((), ("--json",)))],
    }.get(kind, [kind, "out"])
    words = [word.replace("MODEL", str(materials / "plain")) for word in words]
    for folder in (out, work):
        (folder / "x.py").write_text("open('../guard/owned', 'w')")
    if rng.random() < 0.25:
        mutation = mutate_path(rng, out / rng.choice(LINKS), guard)
    else:
        file = out / rng.choice([name for name in READ_BY[kind] if (out / name).exists()])
        mutation = mutate_file(rng, file)
        if rng.random() < 0.5 and file.name != "stages.json":
            record(out, file)
    compared = kind in ("verify", "audit", "explain")
    return Case(words, f"{' '.join(words)[:40]}: {mutation}", judge=(lambda: "equal") if compared else (lambda: "other"))


def record(out: Path, file: Path) -> None:
    """Write the changed file's hash into the ledger, so that a run that continues accepts the file."""
    name, ledger = str(file.relative_to(out)), json.loads((out / "stages.json").read_text())
    for stage in ledger.values():
        if name in stage["outputs"]:
            stage["outputs"][name] = hashlib.sha256(file.read_bytes()).hexdigest()
    (out / "stages.json").write_text(json.dumps(ledger))


def mutate_file(rng: random.Random, file: Path) -> str:
    """Change a file of an output folder, according to its kind."""
    if file.suffix == ".safetensors":
        mutation = mutate_header(rng, file)
    elif file.suffix == ".json":
        data, mutation = mutate_json(rng, file.read_bytes())
        file.write_bytes(data)
    elif file.suffix == ".yaml" and rng.random() < 0.7:
        document, mutation = change(rng, yaml.safe_load(file.read_text()))
        file.write_text(yaml.safe_dump(document, sort_keys=False), errors="surrogatepass")
    elif file.name == "command.txt" and rng.random() < 0.8:
        mutation = rng.choice(POLYGRAPHY)
        file.write_bytes(f"{file.read_text().strip()} {mutation}".encode("latin-1"))
    else:
        data, mutation = mutate_bytes(rng, file.read_bytes(), rng.choice((None, 200)))
        file.write_bytes(data)
    return f"{file.name}: {mutation}"


SEARCH_FILES = (
    ".lock", "choices", "statistics", "recipe.yaml", "search.json", "search.svg", "winner.yaml", "evaluations.jsonl",
    "held-back-evaluations.jsonl", ".winner.yaml.new", ".search.json.new", ".recipe.yaml.new", ".partial",
)  # fmt: skip
SEARCH = ("--target-sqnr", "30", "--evaluations", "2", "--steps", "1", "--pictures", "1")


def search_folder(rng: random.Random, materials: Path, work: Path, guard: Path) -> Case:
    """Change a file of a finished search, and continue the search."""
    out = Path(shutil.copytree(materials / "search", work / "out", symlinks=True))
    if rng.random() < 0.3:
        mutation = mutate_path(rng, out / rng.choice(SEARCH_FILES), guard)
    else:
        files = [path for path in sorted(out.rglob("*")) if path.is_file() and path.name != ".lock"]
        mutation = mutate_file(rng, rng.choice(files))
    return Case(["search", "--model", str(materials / "plain"), *SEARCH, "-o", "out"], mutation)


TOKENS = (
    "0", "-1", "1", "99999999999", "4294967296", "²", "1e9", "nan", '"x"', '""', "TYPE_INT64", "TYPE_STRING", "KIND_GPU", "[",
    "]", "{", "}", "true", "x: 1", '"\\377"', '"../../guard"', '"' + "x" * 5000 + '"', "{ " * 200, "\x00", "#", "1:", "\u202e",
)  # fmt: skip


def repository(rng: random.Random, materials: Path, work: Path, guard: Path) -> Case:
    """Change one file of a Triton repository, for `triton --check`."""
    root = Path(shutil.copytree(materials / "out" / "triton", work / "out", symlinks=True))
    files = [path for path in sorted(root.rglob("*")) if path.is_file() and "__pycache__" not in path.parts]
    configs = [path for path in files if path.name == "config.pbtxt"]
    file = rng.choice(configs if rng.random() < 0.6 else files)
    kind = rng.random()
    if kind < 0.2:
        folders = [path for path in sorted(root.rglob("*")) if path.is_dir()]
        new = rng.choice(folders) / rng.choice(
            ("²", "-1", "2", "007", "1x", "999999999999999999999", "x.onnx", "[/]", "\x1b[31m")
        )
        mutation = mutate_path(rng, rng.choice((file, rng.choice(folders), new)), guard)
    elif file.suffix == ".pbtxt" and kind < 0.8:
        mutation = mutate_words(rng, file)
    else:
        data, mutation = mutate_bytes(rng, file.read_bytes(), rng.choice((None, 128)))
        file.write_bytes(data)
    return Case(["triton", "--check", "out"], f"{file.parent.name}/{file.name}: {mutation}", judge=lambda: "equal", writes=())


def mutate_words(rng: random.Random, file: Path) -> str:
    """Change words of a text file: replace, remove, repeat, insert or swap."""
    words = file.read_text().replace("\n", " \n ").split(" ")
    changes = []
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(words))
        kind = rng.choice(("replace", "replace", "remove", "double", "insert", "swap"))
        new = rng.choice((*TOKENS, rng.choice(words)))
        changes.append(f"{kind} {words[at]!r:.30} {new!r:.20}")
        if kind == "replace":
            words[at] = new
        elif kind == "remove":
            del words[at]
        elif kind == "double":
            words[at:at] = words[at : at + rng.choice((1, 5, 30))]
        elif kind == "insert":
            words.insert(at, new)
        else:
            other = rng.randrange(len(words))
            words[at], words[other] = words[other], words[at]
    file.write_text(" ".join(words))
    return "; ".join(changes)


FORMATS = (
    Format("finished folder", 14, export_folder, accepts=(0, 3, 4)),
    Format("finished search", 2, search_folder),
    Format("Triton repository", 8, repository, accepts=(0, 1)),
)
