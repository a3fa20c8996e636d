"""The file that describes the denoiser's inputs and outputs, and their names in requests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FILE = "network.json"
TIMESTEPS = ("int64", "float32")
NEGATIVE = "negative_"
"""Prefix of a condition's name in a request, for the negative condition of guidance."""
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
        tokenizers: files in the same folder, in the order of the text encoder's inputs; empty: conditions are class labels.
        lowercase: whether the network was trained with prompts in lower case.
        size_values: values of further inputs by name: numbers, or names of SIZE_WORDS.
        zero_null: whether the negative condition of a request without `negative_prompt` is zeros, not that of "".
    """

    state: str
    output: str
    timestep: str
    conditions: Mapping[str, str]
    tokenizers: tuple[str, ...] = ()
    lowercase: bool = False
    size_values: Mapping[str, tuple[float | str, ...]] = field(default_factory=dict)
    zero_null: bool = False

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
        if not all(isinstance(values[key], bool) for key in ("lowercase", "zero_null")):
            raise CallError("expected lowercase and zero_null as true or false")
        sized = values["size_values"]
        if not (isinstance(sized, dict) and all(isinstance(row, list) and all(map(_is_value, row)) for row in sized.values())):
            raise CallError(f"expected size_values as lists of numbers, {', '.join(SIZE_WORDS)}")
        if not all(isinstance(item, str) and item for item in (*texts, *tokenizers, *conditions.values())):
            raise CallError("expected names as strings")
        if values["timestep"] not in TIMESTEPS:
            raise CallError(f"expected timestep {' or '.join(TIMESTEPS)}, found another type")
        if not conditions or any(_is_path(name) for name in tokenizers):
            raise CallError("expected one condition or more, and tokenizers in the same folder")
        rows = {name: tuple(row) for name, row in sized.items()}
        return Call(**{**values, "tokenizers": tuple(tokenizers), "size_values": rows})


def _is_value(value: Any) -> bool:
    return value in SIZE_WORDS if isinstance(value, str) else type(value) in (int, float) and abs(value) < 1e6


def suffix(number: int) -> str:
    """Suffix of the text encoder's input names for tokenizer `number`, counted from 0: empty, `_2`, `_3`."""
    return f"_{number + 1}" if number else ""


def _is_path(name: Any) -> bool:
    return "/" in name or "\0" in name or name in (".", "..")
