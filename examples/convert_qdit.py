"""Q-DiT's group sizes (arXiv 2406.17343, github.com/Juanerx/Q-DiT) as rules of a recipe for dq-export.

Its search prints lists of group sizes, four a block: of qkv, proj, fc1 and fc2, for weights and activations alike:

    python examples/convert_qdit.py groups.txt recipe.yaml --model dit --bits w4a8
    dq-export --recipe recipe.yaml -o out

There is no table to import, because Q-DiT's engine computes its scales: for each token and group with --granularity
token-group, whose kernels take groups of 16, 32, 64 and 128, or for each token, with groups of any size in the weights, with
token.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import yaml

PLACES = ("attn1.to_[qkv]", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")
"""diffusers' names of a block's linears, in Q-DiT's order."""
REST = (
    {"role": "vector", "action": "weight-only", "reason": "modulation"},
    {"role": "edge", "action": "float", "reason": "embedders and final projection stay float"},
)


def group_sizes(text: str) -> list[int]:
    """The numbers of the last list in a text, such as a line of Q-DiT's log: `cand: [128, 64, ...], loss: 6.4`."""
    lists = re.findall(r"\[([\d,\s]+)\]", text)
    if not lists:
        raise SystemExit("no list of group sizes, such as [128, 64, 32, 128]")
    sizes = [int(word) for word in lists[-1].split(",") if word.strip()]
    if len(sizes) % len(PLACES):
        raise SystemExit(f"{len(sizes)} group sizes; expected four a block")
    return sizes


def rules_of(sizes: list[int], bits: str, granularity: str) -> list[dict[str, Any]]:
    """A rule for each linear of each block, and rules for linears that Q-DiT leaves alone."""
    rules: list[dict[str, Any]] = []
    for index, size in enumerate(sizes):
        block, place = divmod(index, len(PLACES))
        match = rf"^transformer_blocks\.{block}\." + PLACES[place].replace(".", r"\.") + "$"
        rules.append({"match": match, "action": bits, "granularity": granularity, "group_size": size})
    return [*rules, *REST]


def main(words: list[str] | None = None) -> None:
    """Write a recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", type=Path, help="text with a list of group sizes")
    parser.add_argument("output", type=Path, help="YAML for --recipe")
    parser.add_argument("--model", default="dit")
    parser.add_argument("--bits", default="w4a8", choices=["w4a8", "w8a8"])
    parser.add_argument("--granularity", default="token-group", choices=["token-group", "token"])
    options = parser.parse_args(words)
    sizes = group_sizes(options.groups.read_text())
    recipe = {
        "model": options.model,
        "bits": options.bits,
        "rounding": "gptq",
        "rules": rules_of(sizes, options.bits, options.granularity),
    }
    options.output.write_text(yaml.safe_dump(recipe, sort_keys=False))
    print(f"{options.output}: {len(sizes)} rules of groups")


if __name__ == "__main__":
    main()
