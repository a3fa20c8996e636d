"""Tokenizers and text encoders of a pipeline: find them in its index, and check their files before use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dq_export.core.documents import DocumentError, read_json, shown, shown_path

from .checkpoint import CONFIG, INDEX, Checkpoint
from .config_values import reason_of, refused, values_of
from .encoder_values import ENCODERS, EncoderValues
from .family import Family
from .loading import read_config, silenced
from .reference import ModelError

VOCABULARIES: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "T5": (("tokenizer.json",), ("spiece.model",)),
    "CLIP": (("tokenizer.json",), ("vocab.json", "merges.txt")),
    "Qwen2": (("tokenizer.json",), ("vocab.json", "merges.txt")),
}
"""For the beginning of a tokenizer's class, the alternative files that it needs; without any of them transformers would create
an empty tokenizer."""
TOKENIZER_BYTES = 64 << 20
"""The greatest size of a tokenizer's file in bytes; the largest of T5 has 2.4 million, Qwen's 11 million."""
INSTEAD = "or pass --conditions FILE with prompts that are encoded already"


TOKENIZERS = tuple(f"{name}Tokenizer{form}" for name in VOCABULARIES for form in ("", "Fast"))
"""Classes of transformers that a checkpoint may name."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A tokenizer or an encoder of a pipeline.

    Args:
        kind: its class of transformers.
    """

    folder: Path
    kind: str

    @property
    def encodes(self) -> bool:
        """Whether it has weights."""
        return self.kind in ENCODERS

    def config(self) -> EncoderValues:
        """The values that determine the network of an encoder. Files have more values, some of which would change the network.

        Raises:
            ModelError: a value is missing, of another type or out of range.
        """
        path = self.folder / CONFIG
        config = read_config(path)
        values = values_of(ENCODERS[self.kind], config, path)
        if config.get("quantization_config"):
            raise ModelError(f"{shown_path(path)}: quantized already (quantization_config); a float encoder is needed, {INSTEAD}")
        return values

    def tokenizer(self) -> Any:
        """The tokenizer.

        Raises:
            ModelError: its files are missing or damaged.
        """
        import transformers

        _require_vocabulary(self)
        with self.damage(), silent():
            return getattr(transformers, self.kind).from_pretrained(str(self.folder), local_files_only=True)

    @contextmanager
    def damage(self) -> Iterator[None]:
        """A context for calls of transformers and tokenizers on the files; any error becomes a ModelError of one line."""
        try:
            yield
        except (ImportError, MemoryError):
            raise
        except Exception as error:  # the package tokenizers raises plain Exception
            raise ModelError(
                f"{shown_path(self.folder)}: makes no {self.kind} ({reason_of(error)}); download it again, {INSTEAD}"
            ) from error


def parts_of(family: Family, checkpoint: Checkpoint) -> dict[str, Part]:
    """The tokenizers and encoders of a pipeline by folder, without optional parts that it leaves out.

    Raises:
        ModelError: a pipeline of another class, without one of the family's parts, or with an encoder and no tokenizer for it.
    """
    place = shown_path(checkpoint.home / INDEX)
    if not checkpoint.index:
        raise ModelError(f"{place}: no such file, so nothing says what encodes prompts; pass the pipeline's folder, {INSTEAD}")
    if checkpoint.pipeline not in family.prompt_tokens:
        raise ModelError(
            f"{place}: {shown(checkpoint.index.get('_class_name'))} does not draw with the family {family.name}; expected "
            f"{' or '.join(family.prompt_tokens)}: correct it, {INSTEAD}"
        )
    optional = family.optional.get(checkpoint.pipeline, ())
    present = [name for name in family.encoders if name not in optional or _names(checkpoint.index.get(name))]
    for name in present:
        partner = other(name)
        if partner in optional and partner not in present:
            raise ModelError(f"{place}: {name} without {partner}; add what is missing, or leave out both, {INSTEAD}")
    return {name: _part(checkpoint, name) for name in present}


def other(name: str) -> str:
    """The encoder's folder for a tokenizer's, or the tokenizer's folder for an encoder's."""
    first, second = "tokenizer", "text_encoder"
    return name.replace(first, second) if name.startswith(first) else name.replace(second, first)


def _names(entry: Any) -> bool:
    """Whether an index's entry of a part names a class; a part that is left out has `[null, null]`."""
    return entry not in (None, [None, None])


def files_of(family: Family, checkpoint: Checkpoint) -> list[tuple[str, int, int]]:
    """Name, size and time of change of each file of tokenizers and encoders; a comparison of gigabytes would take too long.

    Raises:
        ModelError: see `parts_of`.
    """
    files = []
    for name, part in parts_of(family, checkpoint).items():
        for path in sorted(path for path in part.folder.iterdir() if path.is_file()):
            status = path.stat()
            files.append((f"{name}/{path.name}", status.st_size, status.st_mtime_ns))
    return files


@contextmanager
def silent() -> Iterator[None]:
    """A context without transformers' warnings about keys of old files."""
    from transformers.utils import logging

    with silenced(logging):
        yield


def _part(checkpoint: Checkpoint, name: str) -> Part:
    entry, folder = checkpoint.index.get(name), checkpoint.home / name
    classes = (*ENCODERS, *TOKENIZERS)
    if not (isinstance(entry, list) and len(entry) == 2 and entry[0] == "transformers" and entry[1] in classes):
        raise ModelError(
            f"{shown_path(checkpoint.home / INDEX)}: {name} is {shown(entry)}; expected ['transformers', one of "
            f"{', '.join(classes)}]: download the whole pipeline, {INSTEAD}"
        )
    if not folder.is_dir():
        raise ModelError(f"{shown_path(folder)}: no such folder, and it encodes prompts; download it, {INSTEAD}")
    return Part(folder=folder, kind=entry[1])


def _require_protobuf() -> None:
    """Import the packages with which transformers reads spiece.model; if that fails, it would assume another format.

    Raises:
        ModelError: the packages, as installed, do not work together.
    """
    try:
        from sentencepiece import sentencepiece_model_pb2  # noqa: F401
    except Exception as error:  # protobuf's VersionError is not an ImportError
        raise ModelError(
            f"sentencepiece and protobuf, as installed, do not work together ({reason_of(error)}); pip install 'dq-export[text]'"
        ) from error


def _require_vocabulary(part: Part) -> None:
    """Check a tokenizer's files before transformers reads them, because it reads some damaged ones as an empty vocabulary.

    Raises:
        ModelError: there is none, or one is too large or damaged.
    """
    folder = part.folder
    forms = next(forms for start, forms in VOCABULARIES.items() if part.kind.startswith(start))
    present = [files for files in forms if all((folder / name).is_file() for name in files)]
    if not present:
        expected = " and no ".join(" with ".join(files) for files in forms)
        raise ModelError(f"{shown_path(folder)}: no {expected}; download it again, {INSTEAD}")
    try:
        for path in sorted(folder.iterdir()):
            if path.suffix == ".json" and not isinstance(read_json(path, TOKENIZER_BYTES, finite=False), dict):
                raise DocumentError(f"{shown_path(path)}: expected a JSON object")
    except DocumentError as error:
        raise ModelError(f"{error}; download it again, {INSTEAD}") from error
    if present == [("spiece.model",)]:
        import sentencepiece

        _require_protobuf()
        with refused(f"{shown_path(folder / 'spiece.model')}: not a SentencePiece model", f"download it again, {INSTEAD}"):
            sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
