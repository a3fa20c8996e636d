"""The file that describes the denoiser's inputs and outputs, and their names in requests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .positions import PICTURE_WORDS, TEXT_WORDS

FILE = "network.json"
TIMESTEPS = ("int64", "float32")
LABELS = "class_labels"
"""The name of class labels in a request."""
NEGATIVE = "negative_"
"""Prefix of a condition's name in a request, for the negative condition of guidance."""
PLACE = "{}"
"""Where a template holds the prompt."""
GUIDED_BY = ("null", "input", "nothing")
"""The kinds of guidance: calls with the negative condition, an input of the network, or none."""
GUIDANCE = "guidance"
"""The input that holds the guidance scale, where an input guides."""
SIZE_WORDS = ("height", "width", "aspect")
"""Values that follow a picture's size: height and width in pixels, and height / width."""


class CallError(ValueError):
    """The file does not describe a network's call; the message names the fault."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """The tensors of one network call.

    Args:
        state: name of the input that holds the latents.
        output: name of the output.
        timestep: element type of the input `timestep`, as numpy names it.
        conditions: name in requests by input of the network: `class_labels`, or `prompt_embeds` and others.
        tokenizers: files in the same folder, in the order of the text encoder's inputs; empty: requests hold no prompts.
        lowercase: whether the network was trained with prompts in lower case.
        size_values: values of further inputs by name: numbers, or names of SIZE_WORDS.
        zero_null: whether the negative condition of a request without `negative_prompt` is zeros, not that of "".
        guided_by: one of GUIDED_BY.
        tokens: whether the state holds the places of the latents one after the other, [n, H * W, C], not [n, C, H, W].
        picture_positions, text_positions: by input, what each column holds of a token's place, see `positions`.
        batched: whether these inputs, as all others, have a row for each picture. Otherwise the rows of a call share them, so the
            server must not put requests together: the denoiser has no batch of the server's.
        template: the text that the tokenizers get, with `{}` in the prompt's place.
    """

    state: str
    output: str
    timestep: str
    conditions: Mapping[str, str]
    tokenizers: tuple[str, ...] = ()
    lowercase: bool = False
    size_values: Mapping[str, tuple[float | str, ...]] = field(default_factory=dict)
    zero_null: bool = False
    guided_by: str = "null"
    tokens: bool = False
    picture_positions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    text_positions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    batched: bool = True
    template: str = PLACE

    def written(self, prompt: str) -> str:
        """The text that the tokenizers get for a prompt."""
        return self.template.replace(PLACE, prompt.lower().strip() if self.lowercase else prompt)

    @property
    def labels(self) -> bool:
        """Whether the conditions are class labels."""
        return LABELS in self.conditions.values()

    @property
    def rows_of_picture(self) -> int:
        """The rows of a network call that a guided picture takes."""
        return 2 if self.guided_by == "null" else 1

    def save(self, folder: Path) -> None:
        """Write the file into a folder."""
        (folder / FILE).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def load(folder: Path) -> Call:
        """Read the file from a folder.

        Raises:
            CallError: see `parse`.
        """
        return Call.parse((folder / FILE).read_bytes())

    @staticmethod
    def parse(content: bytes) -> Call:
        """Parse the content of the file.

        Raises:
            CallError: the content is not JSON, has other keys, or has values of other types.
        """
        try:
            values = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise CallError("not JSON") from error
        keys = list(Call.__dataclass_fields__)
        if not isinstance(values, dict) or sorted(values) != sorted(keys):
            raise CallError(f"expected an object of {', '.join(keys)}")
        texts = [values["state"], values["output"], values["timestep"]]
        tokenizers, conditions = values["tokenizers"], values["conditions"]
        if not (isinstance(tokenizers, list) and isinstance(conditions, dict)):
            raise CallError("expected tokenizers as a list, conditions as an object")
        if not all(isinstance(values[key], bool) for key in ("lowercase", "zero_null", "tokens", "batched")):
            raise CallError("expected lowercase, zero_null, tokens and batched as true or false")
        if not isinstance(values["template"], str) or values["template"].count(PLACE) != 1:
            raise CallError(f"expected template as a text with one {PLACE}")
        if values["guided_by"] not in GUIDED_BY:
            raise CallError(f"expected guided_by as {', '.join(GUIDED_BY)}")
        for key, words in (("picture_positions", PICTURE_WORDS), ("text_positions", TEXT_WORDS)):
            if not _are_columns(values[key], words):
                raise CallError(f"expected {key} as lists of {', '.join(words)}")
        sized = values["size_values"]
        if not (isinstance(sized, dict) and all(isinstance(row, list) and all(map(_is_value, row)) for row in sized.values())):
            raise CallError(f"expected size_values as lists of numbers, {', '.join(SIZE_WORDS)}")
        if not all(isinstance(item, str) and item for item in (*texts, *tokenizers, *conditions.values())):
            raise CallError("expected names as strings")
        if values["timestep"] not in TIMESTEPS:
            raise CallError(f"expected timestep {' or '.join(TIMESTEPS)}, found another type")
        if not conditions or any(_is_path(name) for name in tokenizers):
            raise CallError("expected one condition or more, and tokenizers in the same folder")
        for key in ("size_values", "picture_positions", "text_positions"):
            values[key] = {name: tuple(row) for name, row in values[key].items()}
        return Call(**{**values, "tokenizers": tuple(tokenizers)})


def _is_value(value: Any) -> bool:
    return value in SIZE_WORDS if isinstance(value, str) else type(value) in (int, float) and abs(value) < 1e6


def _are_columns(value: Any, words: tuple[str, ...]) -> bool:
    return isinstance(value, dict) and all(
        isinstance(row, list) and 1 <= len(row) <= 8 and all(word in words for word in row) for row in value.values()
    )


def suffix(number: int) -> str:
    """Suffix of the text encoder's input names for tokenizer `number`, counted from 0: empty, `_2`, `_3`."""
    return f"_{number + 1}" if number else ""


def _is_path(name: Any) -> bool:
    return "/" in name or "\0" in name or name in (".", "..")
