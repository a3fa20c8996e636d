"""The conditions of requests: class labels, or prompts and their embeddings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .call import LABELS, NEGATIVE, Call, suffix

Array = npt.NDArray[Any]
Feed = Mapping[str, Array]
PROMPT = "prompt"
PROMPT_BYTES = 16384
"""The longest prompt in bytes; a tokenizer's time grows with the length."""
ENCODED = 16
"""Number of prompts whose conditions are cached. Every guided picture needs those of the empty prompt."""


class BadRequestError(ValueError):
    """A request is wrong; the message names the input and what is expected."""


@dataclass(frozen=True)
class RequestConditions:
    """The conditions of one request.

    Args:
        count: number of pictures.
        rows: returns the network's inputs by name, a row for each picture. With guidance (True) as many rows of the negative
            condition follow. It may call the text encoder, so it must not run in the thread that receives requests.
        unguided: why there can be no guidance; empty if there can.
    """

    count: int
    rows: Callable[[bool], Feed]
    unguided: str = ""


class Conditions(Protocol):
    """One kind of conditions."""

    def read(self, inputs: Feed) -> RequestConditions:
        """Check the conditions of a request.

        Raises:
            BadRequestError: the message names the input, the expected and the actual value.
        """


@dataclass(frozen=True)
class Labels:
    """Class labels from 0 to classes - 1. The null label of guidance is `classes`.

    Args:
        name: name of the network's input. In requests it is `class_labels`.
    """

    name: str
    classes: int
    max_images: int

    def read(self, inputs: Feed) -> RequestConditions:
        """Check `class_labels`, int64[n, 1]; see `Conditions`."""
        if LABELS not in inputs:
            raise BadRequestError(f"{LABELS}: missing; expected a label for each picture")
        labels = self._labels(inputs[LABELS])

        def rows(guided: bool) -> Feed:
            return {self.name: np.concatenate([labels, np.full_like(labels, self.classes)]) if guided else labels}

        return RequestConditions(len(labels), rows)

    def _labels(self, column: Array) -> npt.NDArray[np.int64]:
        # The server's own check of the batch size reads its lower 32 bits alone.
        if column.ndim != 2 or column.shape[1] != 1 or not 1 <= len(column) <= self.max_images:
            expected = f"[n, 1] with n from 1 to {self.max_images}"
            raise BadRequestError(f"{LABELS}: expected shape {expected}, found {list(column.shape)}")
        labels: npt.NDArray[np.int64] = np.array(column[:, 0], dtype=np.int64)
        if labels.min() < 0 or labels.max() >= self.classes:
            outside = [int(label) for label in labels if not 0 <= label < self.classes]
            raise BadRequestError(f"{LABELS}: expected 0 to {self.classes - 1}, found {', '.join(map(str, outside))}")
        return labels


class Texts:
    """Prompts, or their embeddings.

    Every prompt is encoded alone, so its conditions do not depend on other requests.

    Args:
        shapes: shape of one picture's embeddings, by their names in requests.
        tokenizers: objects of the package `tokenizers`. Each pads or cuts a text to the length that its encoder takes. None:
            there is no text encoder, and requests hold embeddings.
        encode: runs the text encoder on the tokens of one prompt, and returns the network's conditions by name.
    """

    def __init__(
        self, call: Call, shapes: Mapping[str, tuple[int, ...]], tokenizers: Sequence[Any], encode: Callable[[Feed], Feed],
        max_images: int,
    ) -> None:  # fmt: skip
        self.call, self.shapes, self.tokenizers, self.encode, self.max_images = call, shapes, tokenizers, encode, max_images
        self.encoded = lru_cache(ENCODED)(self._encoded)

    def read(self, inputs: Feed) -> RequestConditions:
        """Check `prompt`, text[n, 1], or embeddings, float32[n, ...]; see `Conditions`.

        Inputs whose names begin with `negative_` give the negative condition of guidance. Its default is the prompt "", or zeros
        if the call says so.
        """
        names = [*([PROMPT] if self.tokenizers else []), *self.shapes]
        count = next((len(inputs[name]) for name in names if name in inputs and inputs[name].ndim), 0)
        if not self._side(inputs, ""):
            alone = f"{self._embeddings('')}: missing; this server has no text encoder"
            raise BadRequestError(f"{PROMPT}: missing; send {PROMPT}, or {self._embeddings('')}" if self.tokenizers else alone)
        if not 1 <= count <= self.max_images:
            raise BadRequestError(f"{names[0]}: expected 1 to {self.max_images} pictures, found {count}")
        positive = self._rows(inputs, "", count)
        missing = not (self.tokenizers or self.call.zero_null or self._side(inputs, NEGATIVE))
        negative = positive if missing else self._rows(inputs, NEGATIVE, count)

        def rows(guided: bool) -> Feed:
            sides = [positive(), negative()] if guided else [positive()]
            return {name: np.concatenate([side[name] for side in sides]) for name in self.call.conditions}

        unguided = f"{self._embeddings(NEGATIVE)}: missing; guidance needs the embeddings of an empty prompt" if missing else ""
        return RequestConditions(count, rows, unguided)

    def _side(self, inputs: Feed, prefix: str) -> list[str]:
        """Names of the inputs that a request has for one side of guidance, which `prefix` selects."""
        return [name for name in (prefix + PROMPT, *(prefix + name for name in self.shapes)) if name in inputs]

    def _embeddings(self, prefix: str) -> str:
        return " with ".join(prefix + name for name in self.shapes)

    def _rows(self, inputs: Feed, prefix: str, count: int) -> Callable[[], Feed]:
        names = self._side(inputs, prefix)
        if not names and prefix and self.call.zero_null:
            zeros = {name: np.zeros((count, *self.shapes[key]), np.float32) for name, key in self.call.conditions.items()}
            return lambda: zeros
        if not names:
            texts = [self.call.written("")] * count
        elif names == [prefix + PROMPT]:
            texts = [self._text(prefix + PROMPT, value) for value in _column(prefix + PROMPT, inputs[prefix + PROMPT], count)]
        elif prefix + PROMPT in names:
            raise BadRequestError(f"{prefix}{PROMPT}: send it or {names[1]}, not both")
        elif len(names) < len(self.shapes):
            raise BadRequestError(f"{names[0]}: expected {self._embeddings(prefix)} together")
        else:
            feed = {name: self._embedding(prefix + key, inputs, count) for name, key in self.call.conditions.items()}
            return lambda: feed
        return lambda: _stacked([self.encoded(text) for text in texts])

    def _text(self, name: str, value: Any) -> str:
        """Decode one prompt, and normalize it as the network's own pipeline does.

        Raises:
            BadRequestError: the prompt is not UTF-8, or is too long for every encoder.
        """
        content = value if isinstance(value, bytes) else str(value).encode()
        if len(content) > PROMPT_BYTES:
            raise BadRequestError(f"{name}: {len(content)} bytes; expected at most {PROMPT_BYTES}")
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            raise BadRequestError(f"{name}: expected UTF-8, found other bytes") from error
        text = self.call.written(text)
        encodings = [tokenizer.encode(text) for tokenizer in self.tokenizers]
        if all(item.overflowing for item in encodings):
            limit = max(len(item.ids) for item in encodings)
            raise BadRequestError(f"{name}: more than {limit} tokens, the limit of the text encoder; shorten it")
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
            raise BadRequestError(f"{name}: expected 1 for tokens, 0 for padding, and at least one token in every row")
        return rows


def load_tokenizers(folder: Path, names: Sequence[str]) -> list[Any]:
    """Load the tokenizers of a folder's files.

    Raises:
        ModuleNotFoundError: the package is not installed.
        Exception: a file is not a tokenizer; the package raises Exception itself.
    """
    from tokenizers import Tokenizer

    return [Tokenizer.from_file(str(folder / name)) for name in names]


def _column(name: str, values: Array, count: int) -> list[Any]:
    if values.shape != (count, 1):
        raise BadRequestError(f"{name}: expected shape {[count, 1]}, found {list(values.shape)}")
    return list(values[:, 0])


def _stacked(rows: Sequence[Feed]) -> Feed:
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
