"""The common parts of the converters of trained tables: options, names, and the file that they write (docs/tables.md)."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dq_export.core.table_file import Codes, Entry, Header, save_table_file

Tensor = torch.Tensor
Rows = dict[str, tuple[Tensor, Tensor]]
"""Steps and zero points by module, float[T] or float[T, C], of codes that start at 0."""


def options(description: str) -> argparse.ArgumentParser:
    """The options of a converter from a file of torch.save."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="state_dict of the quantized network, of torch.save")
    parser.add_argument("output", type=Path, help="safetensors for --tables")
    parser.add_argument(
        "--timesteps", type=timesteps, required=True, help="of the tables' rows, in their order: 1:1000:10, or 1,11,21"
    )
    parser.add_argument("--activation-bits", type=int, required=True)
    parser.add_argument("--rename", action="append", default=[], metavar="REGEX=NAME", help="of modules; repeatable, in order")
    parser.add_argument("--skip", default="$^", metavar="REGEX", help="modules, by their new names, to leave out")
    parser.add_argument(
        "--shared",
        default=r"(.*\battn1)\.to_[qkv]$",
        metavar="REGEX",
        help="modules with one first group read one input: one table",
    )
    return parser


def shared(rows: Rows, pattern: str, bits: int) -> Rows:
    """The rows with one table for all modules that read one input: steps that cover the tables of all of them."""
    groups: dict[str, list[str]] = {}
    for name in rows:
        match = re.search(pattern, name)
        groups.setdefault(match[1] if match else name, []).append(name)
    result: Rows = {}
    for names in groups.values():
        low = torch.stack([-zero * delta for delta, zero in (rows[name] for name in names)]).amin(0)
        high = torch.stack([(2**bits - 1 - zero) * delta for delta, zero in (rows[name] for name in names)]).amax(0)
        step = (high - low) / (2**bits - 1)
        one = rows[names[0]] if len(names) == 1 else (step, (-low / step).round())
        result |= dict.fromkeys(names, one)
        wider = max(float((one[0] / rows[name][0]).max()) for name in names) - 1
        if wider > 1e-6:
            print(f"{', '.join(names)}: one table, whose steps are up to {wider:.0%} wider")
    return result


def timesteps(text: str) -> list[float]:
    """Timesteps as START:STOP:STEP, where STOP is not one of them, or one after the other."""
    if ":" in text:
        start, stop, step = map(int, text.split(":"))
        return [float(value) for value in range(start, stop, step)]
    return [float(value) for value in text.split(",")]


def read_state(path: Path) -> dict[str, Any]:
    """The content of a file of torch.save, read by torch's restricted loader: no code of the file runs."""
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


@dataclass
class Tables:
    """The tables that a converter writes.

    Args:
        rename: pairs of a regular expression and its replacement in the names of modules.
        skip: a regular expression for the new names of modules to leave out.
    """

    method: str
    timesteps: list[float]
    rename: list[str]
    skip: str
    linears: dict[str, Entry] = field(default_factory=dict)
    tensors: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pairs = [text.split("=", 1) for text in self.rename]

    def name(self, module: str) -> str:
        """The network's name of a module; empty for one that is left out."""
        for pattern, text in self.pairs:
            module = re.sub(pattern, text, module)
        return "" if re.search(self.skip, module) else module

    def add(self, name: str, parts: Mapping[str, Tensor | None], activation: Codes | None, weight: Codes | None = None) -> None:
        """Add a linear. Rows of `activation.*` are in the order of the timesteps that the user gave."""
        order = np.argsort(self.timesteps, kind="stable")
        for part, value in parts.items():
            if value is None:
                continue
            array = value.detach().numpy()
            if part.startswith("activation."):
                if array.shape != (len(order),):
                    raise SystemExit(f"{name}.{part} has {array.size} rows, and --timesteps are {len(order)}")
                array = array[order]
            self.tensors[f"{name}.{part}"] = array if array.dtype.kind in "iu" else array.astype(np.float32)
        self.linears[name] = Entry(activation=activation, weight=weight)

    def write(self, path: Path) -> None:
        """Write the file."""
        header = Header(method=self.method, timesteps=tuple(sorted(self.timesteps)), linears=self.linears)
        save_table_file(path, header, self.tensors)
        print(f"{path}: {len(self.linears)} linears at {len(self.timesteps)} timesteps")


def weight_parts(weight: Tensor, delta: Tensor, zero_point: Tensor, bits: int, *, up: Tensor | None = None) -> dict[str, Tensor]:
    """The codes of float32[out, in], which start at 0, with scale[out] and zero point[out].

    Args:
        delta, zero_point: one per output channel; the zero point is rounded, which moves only the ends of the range.
        up: bool[out, in], of adaptive rounding: round up where it is true, else down; None: round to nearest.
    """
    step, zero = delta.flatten()[:, None], zero_point.flatten()[:, None].round()
    rounded = torch.round(weight / step) if up is None else torch.floor(weight / step) + up
    codes = (rounded + zero).clamp(0, 2**bits - 1)
    return {"weight.codes": codes.to(torch.uint8), "weight.scale": step[:, 0], "weight.zero_point": zero[:, 0]}


def float_parts(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weight that the codes of `weight_parts` stand for, to be rounded anew."""
    centred = parts["weight.codes"] - parts["weight.zero_point"][:, None]
    return {"weight": centred * parts["weight.scale"][:, None]}
