"""The error of a sampled trajectory under a mix of choices, simulated on the float network and never computed twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dq_export.calibration.simulation import Simulation
from dq_export.core.artifacts import CalibrationResult
from dq_export.core.compare import decibels
from dq_export.core.documents import DocumentError, parse_json, read_text
from dq_export.core.network import Feed
from dq_export.core.recipe import Recipe
from dq_export.core.scheme import Scheme

from ..families.reference import Float32, Network, Reference
from ..output_folder import OutputError, write_text
from .space import Genome, Space

EVALUATIONS = "evaluations.jsonl"
JOURNAL_LIMIT = 1 << 28
"""The greatest size of the journal in bytes; 100,000 evaluations take less."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Trajectories:
    """Pictures with their float trajectories, which judge a genome.

    Args:
        simulations: for each choice, the simulation of the whole network.
        exact: for every batch, the latents before every network call and at the end.
        journal: the file that stores each result.
        conditions: int64[pictures], the index of each picture's condition.
        sqnrs: the results so far.
    """

    reference: Reference
    space: Space
    recipe: Recipe
    simulations: tuple[Simulation, ...]
    noise: Float32
    conditions: npt.NDArray[np.int64]
    exact: Float32
    journal: Path
    sqnrs: dict[Genome, float] = field(default_factory=dict)

    @staticmethod
    def of(
        reference: Reference, space: Space, recipe: Recipe, calibrated: Mapping[Scheme, CalibrationResult], *,
        seed: int, size: int, journal: Path,
    ) -> Trajectories:  # fmt: skip
        """Sample `size` float pictures, and read the results of an earlier search with the same arguments.

        Raises:
            OutputError: the journal is of another search.
        """
        simulations = []
        for scheme in space.choices:
            if not scheme.low_precision:
                simulations.append(Simulation(weights={}, biases={}, plans={}))
            else:
                assigned = uniform(recipe, space, scheme).assign(reference.linears)
                simulations.append(Simulation.of(reference, calibrated[scheme], assigned))
        noise, conditions = reference.noise(size, seed), np.arange(size, dtype=np.int64) % len(reference.conditions)
        trajectories = Trajectories(
            reference=reference, space=space, recipe=recipe, simulations=tuple(simulations), noise=noise,
            conditions=conditions, exact=np.zeros(0, dtype=np.float32), journal=journal,
        )  # fmt: skip
        object.__setattr__(trajectories, "exact", trajectories.latents(reference.forward))
        trajectories._read(
            [reference.digest, recipe.model_dump(mode="json"), [str(scheme) for scheme in space.choices], seed, size]
        )
        return trajectories

    def sqnr(self, genome: Genome) -> float:
        """The SQNR in dB: the power of the float latents over that of the difference, over all steps and the final picture."""
        if genome not in self.sqnrs:
            weights, biases = {}, {}
            simulations_of = {}
            for site, choice in zip(self.space.sites, genome, strict=True):
                simulation = self.simulations[choice]
                simulations_of[site] = simulation
                for name in self.space.linears[site]:
                    if name in simulation.weights:
                        weights[name] = simulation.weights[name]
                    if name in simulation.biases:
                        biases[name] = simulation.biases[name]
            with self.reference.replace(weights, biases, lambda site, rows, t: _rounded(simulations_of.get(site), site, rows, t)):
                latents = self.latents(self.reference.forward)
            noise = float(np.square(latents.astype(np.float64) - self.exact).sum())
            signal = float(np.square(self.exact.astype(np.float64)).sum())
            self.sqnrs[genome] = float(decibels(signal, noise))
            with self.journal.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"genome": genome, "sqnr": self.sqnrs[genome]}) + "\n")
        return self.sqnrs[genome]

    def latents(self, network: Network) -> Float32:
        """float32[calls + 1, pictures, ...]: the sampler's latents before each call and at the end."""
        batches = []
        for start in range(0, len(self.conditions), self.reference.batch):
            part = slice(start, start + self.reference.batch)
            batches.append(self._batch(network, part))
        return np.concatenate(batches, axis=1)

    def _batch(self, network: Network, part: slice) -> Float32:
        latents: list[Float32] = []
        conditions, state = self.conditions[part], self.reference.inputs[0].name

        def watched(feed: Feed) -> Float32:
            # A state that also holds a mask and a picture has them behind the latents.
            latents.append(np.array(feed[state][: len(conditions), : self.noise.shape[1]], dtype=np.float32))
            return network(feed)

        draw: Callable[..., Float32] = self.reference.draw
        final = draw(watched, self.noise[part], conditions, steps=self.recipe.steps, guidance=self.recipe.guidance_scale or 1.0)
        return np.stack([*latents, final])

    def _read(self, key: list[object]) -> None:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        if not self.journal.exists():
            write_text(self.journal, json.dumps({"search": digest}) + "\n")  # in one write: a kill leaves no empty journal
            return
        try:
            text = read_text(self.journal, JOURNAL_LIMIT, links=False)
        except DocumentError as error:
            raise OutputError(f"{error}; choose another --output-dir, or delete it") from error
        if not text.endswith("\n"):  # cut short by a kill: the next result starts a new line
            with self.journal.open("a", encoding="utf-8") as file:
                file.write("\n")
        lines = [_evaluation(line) for line in text.splitlines()]
        if not lines or lines[0].get("search") != digest:
            raise OutputError(f"{self.journal}: of another search; choose another --output-dir, or delete it")
        for line in lines[1:]:
            genome, sqnr = line.get("genome"), line.get("sqnr")
            if not isinstance(genome, list) or not isinstance(sqnr, float) or len(genome) != len(self.space.sites):
                continue
            if all(choice in range(len(self.space.choices)) for choice in genome):
                self.sqnrs[tuple(genome)] = sqnr


def _evaluation(line: str) -> dict[str, Any]:
    """The content of a line of the journal; empty if the line is damaged."""
    try:
        value = parse_json(line, EVALUATIONS)
    except DocumentError:
        return {}
    return value if isinstance(value, dict) else {}


def uniform(recipe: Recipe, space: Space, scheme: Scheme) -> Recipe:
    """The recipe with one choice wherever its groups fit."""
    return recipe.model_copy(update={"rules": (*space.rules(space.everywhere(scheme)), *(recipe.rules or ()))})


def _rounded(simulation: Simulation | None, site: str, rows: Float32, timestep: float) -> Float32:
    return rows if simulation is None else simulation.rounded(site, rows, timestep)
