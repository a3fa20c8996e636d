"""What a search may choose: for each input of the network how its readers are quantized, and what that costs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dq_export.core.recipe import Recipe, RecipeError, Rule
from dq_export.core.scheme import Scheme
from dq_export.deploy.backend import Backend
from dq_export.deploy.lowerings import Lowering

from ..families.reference import Reference

FLOAT = 4
"""Bytes of a weight that is not quantized, of a scale and of a bias."""
KNOWN = (
    Rule(match="", action="float", reason="chosen by the search"),
    Rule(match="", action="w8a8", granularity="token", group_size=0),
    Rule(match="", action="w8a8", granularity="tensor", group_size=0),
    Rule(match="", action="w4a8", granularity="token", group_size=32),
    Rule(match="", action="w4a8", granularity="token", group_size=64),
    Rule(match="", action="w4a8", granularity="tensor", group_size=32),
    Rule(match="", action="w4a8", granularity="tensor", group_size=64),
    Rule(match="", action="w4a8", granularity="tensor", group_size=128),
)
Q_DIT = tuple(Rule(match="", action="w4a8", granularity="token-group", group_size=size) for size in (32, 64, 128, 192, 288))
"""Q-DiT's space: int4 weights and 8-bit activations, both in groups of one size (arXiv 2406.17343, section 4.2)."""
Genome = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Space:
    """A genome holds a choice for each site, an index into `choices`.

    Args:
        sites: names.
        linears: by site, module names of its readers.
        choices: completed rules, the same for every site.
        allowed: bool[sites, choices]: whether the choice's groups divide the site's width.
        size: float64[sites, choices], bytes of the readers' weights with their scales.
        time: float64[sites, choices], milliseconds of the readers' GEMMs with what stands around them; None: not timed.
        rest: (bytes, milliseconds) of all that the search leaves alone.
    """

    sites: tuple[str, ...]
    linears: Mapping[str, tuple[str, ...]]
    choices: tuple[Rule, ...]
    allowed: np.ndarray[tuple[int, int], np.dtype[np.bool_]]
    size: np.ndarray[tuple[int, int], np.dtype[np.float64]]
    time: np.ndarray[tuple[int, int], np.dtype[np.float64]] | None = None
    rest: tuple[float, float] = (0.0, 0.0)

    def bytes_of(self, genome: Genome) -> float:
        """Bytes of the whole network's weights."""
        return self.rest[0] + float(self.size[np.arange(len(genome)), list(genome)].sum())

    def milliseconds_of(self, genome: Genome) -> float:
        """Of one network call, from the table of kernels; NaN if they were not timed."""
        if self.time is None:
            return float("nan")
        return self.rest[1] + float(self.time[np.arange(len(genome)), list(genome)].sum())

    def quantizes(self, genome: Genome) -> bool:
        """Whether any site is quantized."""
        return any(self.choices[choice].scheme.low_precision for choice in genome)

    def everywhere(self, rule: Rule) -> Genome:
        """One choice wherever its groups fit; elsewhere the first other that quantizes and fits."""
        index = self.choices.index(rule)
        quantizes = np.asarray([choice.scheme.low_precision for choice in self.choices])
        return tuple(index if row[index] else int(np.argmax(row & quantizes)) for row in self.allowed)

    def rules(self, genome: Genome) -> tuple[Rule, ...]:
        """The genome as a recipe's rules, one a site."""
        found = []
        for site, chosen in zip(self.sites, genome, strict=True):
            names = "|".join(name.replace(".", r"\.") for name in self.linears[site])
            found.append(self.choices[chosen].model_copy(update={"match": f"^({names})$"}))
        return tuple(found)


def space_of(reference: Reference, recipe: Recipe, choices: Sequence[Rule], backend: Backend | None) -> Space:
    """The space of a model.

    Args:
        recipe: resolved; its rules decide what is not chosen.
        backend: choices that it does not run are left out; None: none is.

    Raises:
        RecipeError: fewer than two choices are left.
    """
    assigned = recipe.assign(reference.linears)
    sites = [site for site in reference.sites if assigned[site.linears[0]].scheme.activation]
    usable = tuple(rule for rule in choices if backend is None or isinstance(backend.supports(rule.scheme), Lowering))
    shape = (len(sites), len(usable))
    allowed, size = np.zeros(shape, dtype=bool), np.zeros(shape)
    for i, site in enumerate(sites):
        width = reference.weight(site.linears[0]).shape[1]
        outputs = sum(len(reference.weight(name)) for name in site.linears)
        for j, rule in enumerate(usable):
            allowed[i, j] = _fits(rule.scheme, width)
            size[i, j] = weight_bytes(rule.scheme, outputs, width) if allowed[i, j] else np.inf
    if len(usable) < 2 or not sites:
        raise RecipeError(f"{len(usable)} choices for {len(sites)} inputs: nothing to search; choose another --format or model")
    chosen = {name for site in sites for name in site.linears}
    rest, seen = 0.0, set()
    for name, rule in assigned.items():
        weight = reference.weight(name)
        content = hashlib.sha256(np.ascontiguousarray(weight).tobytes()).digest() if name not in chosen else b""
        if content and content not in seen:  # the graph keeps one of equal weights
            seen.add(content)
            rest += weight_bytes(rule.scheme, *weight.shape)
    return Space(
        sites=tuple(site.name for site in sites),
        linears={site.name: site.linears for site in sites},
        choices=usable,
        allowed=allowed,
        size=size,
        rest=(rest, 0.0),
    )


def weight_bytes(scheme: Scheme, outputs: int, width: int) -> float:
    """Bytes of a weight[outputs, width] as the graph stores it: codes, scales, multipliers, zero points."""
    if scheme.weight is None:
        return float(FLOAT * outputs * width)
    bits, block = scheme.weight.qtype.stored_bits, scheme.block_size(width)
    blocks = width // block if block else 1
    if scheme.two_level:
        return outputs * (width * bits / 8 + (blocks if block else 0) + FLOAT + 1)
    return outputs * (width * bits / 8 + blocks * (FLOAT + bits / 8))


def _fits(scheme: Scheme, width: int) -> bool:
    try:
        scheme.fitted(width)
    except ValueError:
        return False
    return True
