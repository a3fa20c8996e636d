"""What a picture is asked for with: class labels, or prompts and what a text encoder makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .call import NEGATIVE, Call, suffix

Array = npt.NDArray[Any]
Feed = Mapping[str, Array]
PROMPT = "prompt"
PROMPT_BYTES = 16384
"""Of one prompt; tokenizers take time that grows with it."""
ENCODED = 16
"""Prompts whose conditions are kept: that of no prompt is asked for by every guided picture."""


class BadRequestError(ValueError):
    """The request asks for what cannot be; the message says what is expected."""


@dataclass(frozen=True)
class Wanted:
    """The conditions of one request.

    Args:
        count: its pictures.
        rows: the network's inputs by name, a row for each picture; with guidance as many more without the condition behind
            them. May call the text encoder, so it is called outside of the thread that takes requests.
    """

    count: int
    rows: Callable[[bool], Feed]


class Conditions(Protocol):
    """A kind of conditions."""

    def read(self, inputs: Feed) -> Wanted:
        """Check a request's conditions.

        Raises:
            BadRequestError: with the input, what is expected and what was found.
        """


@dataclass(frozen=True)
class Labels:
    """Class labels, 0 to classes - 1; the null label of guidance is `classes`.

    Args:
        name: of the network's input; a request calls it `class_labels`.
    """

    name: str
    classes: int
    max_images: int

    def read(self, inputs: Feed) -> Wanted:
        """See `Conditions`. `class_labels` is int64[n, 1]."""
        if "class_labels" not in inputs:
            raise BadRequestError("class_labels: missing; expected a label for each picture")
        labels = self._labels(inputs["class_labels"])

        def rows(guided: bool) -> Feed:
            return {self.name: np.concatenate([labels, np.full_like(labels, self.classes)]) if guided else labels}

        return Wanted(len(labels), rows)

    def _labels(self, given: Array) -> npt.NDArray[np.int64]:
        # The server checks this, too, on the lower 32 bits of the batch.
        if given.ndim != 2 or given.shape[1] != 1 or not 1 <= len(given) <= self.max_images:
            expected = f"[n, 1] with n from 1 to {self.max_images}"
            raise BadRequestError(f"class_labels: expected shape {expected}, found {list(given.shape)}")
        labels: npt.NDArray[np.int64] = np.array(given[:, 0], dtype=np.int64)
        if labels.min() < 0 or labels.max() >= self.classes:
            wrong = [int(label) for label in labels if not 0 <= label < self.classes]
            raise BadRequestError(f"class_labels: expected 0 to {self.classes - 1}, found {', '.join(map(str, wrong))}")
        return labels


class Texts:
    """Prompts, or what a text encoder made of them.

    Every prompt is encoded alone, so its conditions depend on nothing else that the server does.

    Args:
        shapes: by what a request calls the embeddings, the shape of one picture's.
        tokenizers: of the package `tokenizers`; each fills a text up to the length that its encoder takes, and cuts it there.
        encode: the text encoder: its inputs, of one prompt, to the network's conditions by name.
    """

    def __init__(
        self, call: Call, shapes: Mapping[str, tuple[int, ...]], tokenizers: Sequence[Any], encode: Callable[[Feed], Feed],
        max_images: int,
    ) -> None:  # fmt: skip
        self.call, self.shapes, self.tokenizers, self.encode, self.max_images = call, shapes, tokenizers, encode, max_images
        self.encoded = lru_cache(ENCODED)(self._encoded)

    def read(self, inputs: Feed) -> Wanted:
        """See `Conditions`. `prompt` is text[n, 1], and so are embeddings float32[n, ...]; with `negative_` before the name
        they stand for the rows without the condition, for which there is "" otherwise."""
        count = next((len(inputs[name]) for name in (PROMPT, *self.shapes) if name in inputs and inputs[name].ndim), 0)
        if not self._side(inputs, ""):
            raise BadRequestError(f"{PROMPT}: missing; send {PROMPT}, or {self._embeddings('')}")
        if not 1 <= count <= self.max_images:
            raise BadRequestError(f"{PROMPT}: expected 1 to {self.max_images} pictures, found {count}")
        positive = self._rows(inputs, "", count)
        negative = self._rows(inputs, NEGATIVE, count)

        def rows(guided: bool) -> Feed:
            sides = [positive(), negative()] if guided else [positive()]
            return {name: np.concatenate([side[name] for side in sides]) for name in self.call.conditions}

        return Wanted(count, rows)

    def _side(self, inputs: Feed, front: str) -> list[str]:
        """What a request holds for the rows with the condition, or for those without."""
        return [name for name in (front + PROMPT, *(front + name for name in self.shapes)) if name in inputs]

    def _embeddings(self, front: str) -> str:
        return " with ".join(front + name for name in self.shapes)

    def _rows(self, inputs: Feed, front: str, count: int) -> Callable[[], Feed]:
        given = self._side(inputs, front)
        if not given:
            texts = [""] * count
        elif given == [front + PROMPT]:
            texts = [self._text(front + PROMPT, value) for value in _column(front + PROMPT, inputs[front + PROMPT], count)]
        elif front + PROMPT in given:
            raise BadRequestError(f"{front}{PROMPT}: send it or {given[1]}, not both")
        elif len(given) < len(self.shapes):
            raise BadRequestError(f"{given[0]}: expected {self._embeddings(front)} together")
        else:
            found = {name: self._embedding(front + known, inputs, count) for name, known in self.call.conditions.items()}
            return lambda: found
        return lambda: _stacked([self.encoded(text) for text in texts])

    def _text(self, name: str, value: Any) -> str:
        """One prompt as the network's own pipeline writes it.

        Raises:
            BadRequestError: no UTF-8, or longer than every encoder reads.
        """
        content = value if isinstance(value, bytes) else str(value).encode()
        if len(content) > PROMPT_BYTES:
            raise BadRequestError(f"{name}: {len(content)} bytes; expected {PROMPT_BYTES} at the most")
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            raise BadRequestError(f"{name}: expected UTF-8, found other bytes") from error
        text = text.lower().strip() if self.call.lowercase else text
        cut = [tokenizer.encode(text) for tokenizer in self.tokenizers]
        if all(item.overflowing for item in cut):
            most = max(len(item.ids) for item in cut)
            raise BadRequestError(f"{name}: more than {most} tokens, which is what the text encoder reads; shorten it")
        return text

    def _encoded(self, text: str) -> Feed:
        feed = {}
        for number, tokenizer in enumerate(self.tokenizers):
            item = tokenizer.encode(text)
            for name, values in (("input_ids", item.ids), ("attention_mask", item.attention_mask)):
                feed[name + suffix(number)] = np.array([values], dtype=np.int64)
        return self.encode(feed)

    def _embedding(self, name: str, inputs: Feed, count: int) -> npt.NDArray[np.float32]:
        rows: npt.NDArray[np.float32] = np.array(inputs[name], dtype=np.float32)
        expected = (count, *self.shapes[name.removeprefix(NEGATIVE)])
        if rows.shape != expected:
            raise BadRequestError(f"{name}: expected shape {list(expected)}, found {list(rows.shape)}")
        if not np.isfinite(rows).all():
            raise BadRequestError(f"{name}: NaN or Inf; expected finite numbers")
        if name.endswith("_mask") and not (np.isin(rows, (0, 1)).all() and rows.any(axis=1).all()):
            raise BadRequestError(f"{name}: expected 1 for tokens and 0 for filling, and a token or more in every row")
        return rows


def load_tokenizers(folder: Path, names: Sequence[str]) -> list[Any]:
    """The tokenizers of files in a folder.

    Raises:
        ModuleNotFoundError: the package is not installed.
        Exception: of the package, where a file is none.
    """
    from tokenizers import Tokenizer

    return [Tokenizer.from_file(str(folder / name)) for name in names]


def _column(name: str, values: Array, count: int) -> list[Any]:
    if values.shape != (count, 1):
        raise BadRequestError(f"{name}: expected shape {[count, 1]}, found {list(values.shape)}")
    return list(values[:, 0])


def _stacked(rows: Sequence[Feed]) -> Feed:
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
