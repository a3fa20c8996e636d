"""The choices of a search: how the readers of each input are quantized, and the costs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dq_export.core.recipe import Recipe, RecipeError
from dq_export.core.rule import Rule
from dq_export.core.scheme import Scheme, scheme_of
from dq_export.deploy.backend import Backend
from dq_export.deploy.lowerings import Lowering

from ..families.reference import Reference

FLOAT = 4
"""The bytes of an unquantized weight, a scale or a bias."""
CHOICES = (
    scheme_of("float"),
    scheme_of("w8a8", "token"),
    scheme_of("w8a8", "tensor"),
    scheme_of("w4a8", "token", 32),
    scheme_of("w4a8", "token", 64),
    scheme_of("w4a8", "tensor", 32),
    scheme_of("w4a8", "tensor", 64),
    scheme_of("w4a8", "tensor", 128),
)
Q_DIT = tuple(scheme_of("w4a8", "token-group", size) for size in (32, 64, 128, 192, 288))
"""Q-DiT's space: int4 weights and 8-bit activations, both in groups of one size (arXiv 2406.17343, section 4.2)."""
Genome = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Space:
    """A genome holds a choice for each site, an index into `choices`.

    Args:
        sites: names.
        linears: by site, module names of its readers.
        choices: the same for every site.
        allowed: bool[sites, choices]: whether the choice's groups divide the site's width.
        size: float64[sites, choices], bytes of the readers' weights with their scales.
        time: float64[sites, choices], milliseconds of the readers' GEMMs with the operators around them; None if not timed.
        rest: (bytes, milliseconds) of everything that the search does not change.
    """

    sites: tuple[str, ...]
    linears: Mapping[str, tuple[str, ...]]
    choices: tuple[Scheme, ...]
    allowed: np.ndarray[tuple[int, int], np.dtype[np.bool_]]
    size: np.ndarray[tuple[int, int], np.dtype[np.float64]]
    time: np.ndarray[tuple[int, int], np.dtype[np.float64]] | None = None
    rest: tuple[float, float] = (0.0, 0.0)

    def bytes_of(self, genome: Genome) -> float:
        """The bytes of the whole network's weights."""
        return self.rest[0] + float(self.size[np.arange(len(genome)), list(genome)].sum())

    def milliseconds_of(self, genome: Genome) -> float:
        """The milliseconds of one network call, from the table of kernels; NaN if they were not timed."""
        if self.time is None:
            return float("nan")
        return self.rest[1] + float(self.time[np.arange(len(genome)), list(genome)].sum())

    def quantizes(self, genome: Genome) -> bool:
        """Whether any site is quantized."""
        return any(self.choices[choice].low_precision for choice in genome)

    def everywhere(self, scheme: Scheme) -> Genome:
        """The genome with one choice wherever its groups fit, and elsewhere the first other choice that quantizes and fits."""
        index = self.choices.index(scheme)
        quantizes = np.asarray([choice.low_precision for choice in self.choices])
        return tuple(index if row[index] else int(np.argmax(row & quantizes)) for row in self.allowed)

    def rules(self, genome: Genome) -> tuple[Rule, ...]:
        """The genome as a recipe's rules, one for each site."""
        rules = []
        for site, choice in zip(self.sites, genome, strict=True):
            names = "|".join(name.replace(".", r"\.") for name in self.linears[site])
            reason = "" if self.choices[choice].low_precision else "chosen by the search"
            rules.append(Rule.of(f"^({names})$", self.choices[choice], reason))
        return tuple(rules)


def space_of(reference: Reference, recipe: Recipe, choices: Sequence[Scheme], backend: Backend | None) -> Space:
    """The space of a model.

    Args:
        recipe: resolved; its rules apply to everything that is not searched.
        backend: choices that it does not run are left out; None keeps all choices.

    Raises:
        RecipeError: fewer than two choices are left.
    """
    assigned = recipe.assign(reference.linears)
    sites = [
        site
        for site in reference.sites
        if assigned[site.linears[0]].scheme.activation and not reference.linears[site.linears[0]].convolution
    ]
    usable = tuple(scheme for scheme in choices if backend is None or isinstance(backend.supports(scheme), Lowering))
    shape = (len(sites), len(usable))
    allowed, size = np.zeros(shape, dtype=bool), np.zeros(shape)
    for i, site in enumerate(sites):
        width = reference.weight(site.linears[0]).shape[1]
        outputs = sum(len(reference.weight(name)) for name in site.linears)
        for j, scheme in enumerate(usable):
            allowed[i, j] = _fits(scheme, width)
            size[i, j] = weight_bytes(scheme, outputs, width) if allowed[i, j] else np.inf
    if len(usable) < 2 or not sites:
        raise RecipeError(f"{len(usable)} choices for {len(sites)} inputs: nothing to search; choose another --format or model")
    chosen = {name for site in sites for name in site.linears}
    rest, digests = 0.0, set()
    for name, rule in assigned.items():
        weight = reference.weight(name)
        content = hashlib.sha256(np.ascontiguousarray(weight).tobytes()).digest() if name not in chosen else b""
        if content and content not in digests:  # the graph keeps one of equal weights
            digests.add(content)
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
