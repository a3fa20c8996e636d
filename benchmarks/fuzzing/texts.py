"""Mutates inputs of models with prompts: files of prompts and of conditions, and text encoders."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

from .cases import Case, Format
from .materials import EXPORT
from .models import mutate_header
from .values import mutate_bytes, mutate_json, mutate_path, value

LINES = (
    "", " ", "a red square", "x" * 5000, "a " * 400, "\t", "\x1b[31mred", "\u202e", "\ufeffa", "\u2028", "<pad>", "</s>", "<unk>",
    "<extra_id_0>", "\u2581a", "雪" * 200, "👩\u200d🚀", "- a", "{a: b}", "null", "'", "a: b # c", "\0", "%s{}", "..", "é" * 3000,
)  # fmt: skip
ENCODER = (
    "model_index.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", "text_encoder/config.json",
    "text_encoder/model.safetensors", "tokenizer/spiece.model",
)  # fmt: skip


def _export(words: list[str], mutation: str) -> Case:
    return Case(["calibrate", "--model", "model", *EXPORT, "-o", "out", *words], mutation, whole=False)


def _model(materials: Path, work: Path) -> Path:
    return Path(shutil.copytree(materials / "text", work / "model"))


def prompts(rng: random.Random, materials: Path, work: Path, guard: Path) -> Case:
    """Mutate a file of prompts, which a flag names or which lies beside the checkpoint."""
    beside = rng.random() < 0.3
    file = _model(materials, work) / "prompts.txt" if beside else work / "prompts.txt"
    words = [] if beside else ["--prompts", file.name]
    lines = [rng.choice(LINES) for _ in range(rng.choice((0, 1, 2, 3, 1100)))]
    end = rng.choice(("\n", "\r\n", "\r", "\n\n"))
    file.write_text(end.join([*lines, *rng.choice(([], ["a blue circle"]))]) + rng.choice(("", end)), newline="")
    kind = rng.random()
    if kind < 0.15:
        return _export(words, mutate_path(rng, file, guard))
    if kind < 0.35:
        data, mutation = mutate_bytes(rng, file.read_bytes())
        file.write_bytes(data)
        return _export(words, mutation)
    if kind < 0.4:
        words = [*words, f"--conditions={value(rng)}".replace("\0", "")[:5000].encode("utf-8", "replace").decode()]
    return _export(words, f"{len(lines)} lines, {lines[:1]!r:.60}")


def conditions(rng: random.Random, materials: Path, work: Path, guard: Path) -> Case:
    """Mutate a file of conditions for a pipeline without a text encoder."""
    _model(materials, work)
    shutil.rmtree(work / "model" / "text_encoder")
    file = Path(shutil.copyfile(materials / "conditions.safetensors", work / "conditions.safetensors"))
    mutation = mutate_path(rng, file, guard) if rng.random() < 0.1 else mutate_header(rng, file)
    return _export(["--conditions", file.name], mutation)


def encoder(rng: random.Random, materials: Path, work: Path, guard: Path) -> Case:
    """Mutate a pipeline's index, tokenizer and text encoder."""
    model = _model(materials, work)
    file = model / rng.choice(ENCODER)
    if file.name == "spiece.model":
        (model / "tokenizer" / "tokenizer.json").unlink()
        file.write_bytes(rng.randbytes(rng.choice((0, 1, 100))))
    if rng.random() < 0.08:
        return _export([], f"{file.name}: {mutate_path(rng, rng.choice((file, file.parent)), guard)}")
    if file.suffix == ".json":
        data, mutation = mutate_json(rng, file.read_bytes())
        file.write_bytes(data)
    elif file.suffix == ".safetensors":
        mutation = mutate_header(rng, file)
    else:
        mutation = "no SentencePiece"
    return _export([], f"{file.name}: {mutation}")


FORMATS = (
    Format("prompts", 3, prompts),
    Format("conditions", 3, conditions),
    Format("text encoder", 5, encoder),
)
