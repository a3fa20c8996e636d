"""How the denoiser of a repository is called, and what requests call its conditions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FILE = "network.json"
TIMESTEPS = ("int64", "float32")
NEGATIVE = "negative_"
"""In front of a condition's name in a request: that from which guidance leads away."""


class CallError(ValueError):
    """The file does not describe a network; the message says what is wrong."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """The tensors of one network call.

    Args:
        state: name of the input that holds the latents; `output`: that of the network's output.
        timestep: numpy's name of the type of the input `timestep`.
        conditions: by input of the network, what a request calls it: `class_labels`, or `prompt_embeds` and more.
        tokenizers: files beside this one, in the order of the text encoder's inputs; empty: conditions are class labels.
        lowercase: whether the network was trained with prompts in lower case.
    """

    state: str
    output: str
    timestep: str
    conditions: Mapping[str, str]
    tokenizers: tuple[str, ...] = ()
    lowercase: bool = False

    def save(self, folder: Path) -> None:
        """Write FILE."""
        (folder / FILE).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def load(folder: Path) -> Call:
        """Read what `save` wrote.

        Raises:
            CallError: see `parse`.
        """
        return Call.parse((folder / FILE).read_bytes())

    @staticmethod
    def parse(content: bytes) -> Call:
        """The call that a file of `save` describes.

        Raises:
            CallError: no JSON, other keys, or values of other types.
        """
        try:
            values = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise CallError("no JSON") from error
        expected = list(Call.__dataclass_fields__)
        if not isinstance(values, dict) or sorted(values) != sorted(expected):
            raise CallError(f"expected an object of {', '.join(expected)}")
        texts = [values["state"], values["output"], values["timestep"]]
        lists = values["tokenizers"], values["conditions"]
        if not (isinstance(lists[0], list) and isinstance(lists[1], dict) and isinstance(values["lowercase"], bool)):
            raise CallError("expected tokenizers as a list, conditions as an object, lowercase as true or false")
        if not all(isinstance(item, str) and item for item in (*texts, *lists[0], *lists[1].values())):
            raise CallError("expected names as texts")
        if values["timestep"] not in TIMESTEPS:
            raise CallError(f"expected timestep {' or '.join(TIMESTEPS)}, found another type")
        if not lists[1] or any(_is_path(name) for name in lists[0]):
            raise CallError("expected one condition or more, and tokenizers in the same folder")
        return Call(**{**values, "tokenizers": tuple(lists[0])})


def suffix(number: int) -> str:
    """Behind the names of the text encoder's inputs for its tokenizer `number`, counted from 0: none, `_2`, `_3`."""
    return f"_{number + 1}" if number else ""


def _is_path(name: Any) -> bool:
    return "/" in name or "\0" in name or name in (".", "..")
