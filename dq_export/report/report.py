"""The report of an export: one validated object (schema: report.schema.json)."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dq_export.core.rule import Rule
from dq_export.core.scheme import PRESETS, Action, Granularity, scheme_of
from dq_export.deploy.audit import Audit
from dq_export.deploy.parity import CallParity, Parity
from dq_export.passes.base import PassReport

FLOAT_STAGE = "float-onnx"
REPLAY_MARGIN = 1.0
"""dB that a replay may lose against the export's own numbers: other kernels round otherwise."""
FRONT = "search.svg"
"""The picture of a search beside its winner, and in an export's folder."""


class Part(BaseModel):
    """A part of the report."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LinearReport(Part):
    """One linear of the network."""

    name: str = Field(description="module name")
    action: Action = Field(description="the deciding rule's action: w8a8, w4a8, fp8 … as --bits, weight-only or float")
    granularity: Granularity | None = Field(description="granularity of its input's scales; null where it stays float")
    group_size: int | None = Field(ge=0, description="inputs that share a weight scale; 0 or null: all of an output channel's")
    rule: str = Field(description="what the deciding rule matches: a role, a regular expression, or both")
    reason: str = Field(description="why it is weight-only or float; empty where it is not")
    site: str = Field(description="name of the input that it shares with other linears; empty where it stays float")
    scaling: str = Field(description="equivalent scaling of its input")
    fold: str = Field(description="what absorbs that scaling; empty where nothing is scaled")
    bins: int = Field(description="timestep bins of its input's scale table; 0 where it stays float")
    sqnr: list[float | None] = Field(default=[], description="dB of its output at each of the timesteps; null: not measured")
    error: float | None = Field(description="measured noise power / signal power of the site's output; null where it stays float")

    @property
    def decided(self) -> Rule:
        """The completed rule that decided."""
        return Rule(action=self.action, granularity=self.granularity, group_size=self.group_size, reason=self.reason)

    @model_validator(mode="after")
    def _names_a_scheme(self) -> LinearReport:
        try:
            scheme_of(self.action, self.granularity, self.group_size)
        except KeyError as error:
            raise ValueError("the report has the recipe's own bits in their place") from error
        return self


class TableReport(Part):
    """The scales of one site's input."""

    site: str
    granularity: str = Field(description="tensor: the table below; token or token-group: computed while the engine runs")
    edges: list[float] = Field(description="timesteps between bins")
    scales: list[Annotated[float, Field(gt=0)]] = Field(description="one per bin; empty if none is stored")
    alternatives: dict[str, float] = Field(description="noise power / signal power of each scaling that auto measured")

    @model_validator(mode="after")
    def _one_a_bin(self) -> TableReport:
        if self.scales and len(self.scales) != len(self.edges) + 1:
            raise ValueError(f"{len(self.edges)} edges and {len(self.scales)} scales")
        return self


class EngineReport(Part):
    """One engine's latency."""

    median_ms: float
    least_ms: float
    memory_mb: float | None = Field(default=None, description="memory that loading and one call added; null where not measured")


class LatencyReport(Part):
    """One network call; the engines are timed in turn, each in its own processes."""

    batch: int
    baseline: str = Field(description="what ran the float graph: the engine's own runtime")
    float_ms: float = Field(gt=0, description="the float graph there, median")
    engine_ms: float = Field(gt=0, description="engine, median")
    ratio: float = Field(description="float / engine: above 1 the engine is faster")
    engines: dict[str, EngineReport] = Field(description="float: the baseline; engine; torch if requested")
    profile: dict[str, dict[str, float]] = Field(description="ms of one call by operator, of float and engine, if requested")
    skipped: dict[str, str] = Field(description="what could not be timed, with the reason")


class SizeReport(Part):
    """Bytes on disk, weights included."""

    float_bytes: int = Field(gt=0, le=2**63)
    engine_bytes: int = Field(gt=0, le=2**63)


class EncoderReport(Part):
    """The text encoders of a server, with weights of 8 bits."""

    float_bytes: int = Field(gt=0, le=2**63, description="of all tensors of their graph in float32")
    stored_bytes: int = Field(gt=0, le=2**63, description="as the graph stores them")
    sqnr: float = Field(description="dB of the prompt that is farthest from PyTorch's encoding")
    prompt: str = Field(description="that prompt; empty: the empty prompt, of guidance")

    def __str__(self) -> str:
        """One short text, for a line of progress or a table."""
        sizes = f"{self.float_bytes / 1e6:.1f} -> {self.stored_bytes / 1e6:.1f} MB"
        return f"{sizes}, {self.sqnr:.1f} dB at worst"


class PicturesReport(Part):
    """The picture `parity/pictures.png`: rows of PyTorch, of the engine, and of four times their difference."""

    shown: int = Field(ge=0, description="pictures of a row, the first of the compared ones; 0: there is none")
    origin: str = Field(description="a sentence: what made pictures of the latents, or why nothing did")


class Verdict(Part):
    """Whether the export keeps what its recipe requires."""

    outcome: Literal["passed", "failed", "unfinished"] = Field(description="unfinished: another machine must build the engine")
    status: int = Field(description="exit status: 0, 3: too much runs in float, 4: too far from PyTorch, 5: unfinished")
    min_coverage: float = Field(description="the recipe's: least share of the quantized GEMMs' FLOPs in low precision")
    coverage: float | None = Field(default=None, description="that share; null where no engine was audited")
    min_sqnr: float = Field(
        description="the recipe's: dB that every call of a quantized stage, and a prompt's encoding, must keep"
    )
    worst: CallParity | None = Field(default=None, description="the quantized call of the least SQNR; null: none was compared")
    reasons: list[str] = Field(default=[], description="what is not kept or not done, a sentence each; empty where it passed")
    advice: str = Field(default="", description="what to try")


class Report(Part):
    """Everything that an export did and proved. Parts are null until their stage has run."""

    version: Literal[3] = Field(default=3, description="of this schema")
    verdict: Verdict | None = Field(default=None, description="null where the run stopped before the engine was audited")
    model: str
    date: str = Field(default="", description="when it was written, in UTC")
    command: str = Field(default="", description="what the user typed; empty where Python called")
    recipe: dict[str, str] = Field(default={}, description="what the recipe chose, by key")
    digest: str = Field(description="sha256 of the checkpoint")
    sampler: str
    guidance_scale: float
    timesteps: str = Field(description="shared: timestep is [1]; per-sample: [B]")
    machine: str
    versions: dict[str, str] = Field(description="of dq-export and the libraries that decide the bytes, by distribution")
    engine: str = Field(default="", description="the runtime that the engine is for; empty where --format onnx builds none")
    seconds: dict[str, float] = Field(description="by stage, of the run that did it")
    measured_at: list[float] = Field(default=[], description="at which linears were measured")
    tables: list[TableReport] = Field(default=[], description="by site")
    linears: list[LinearReport]
    passes: list[PassReport] = Field(description="what each rewrite of the graph changed, and what it left alone with the reason")
    size: SizeReport | None = None
    text_encoder: EncoderReport | None = Field(default=None, description="null where no server has one, or it is float32")
    audit: Audit | None = None
    parity: Parity | None = None
    drawn: list[str] = Field(default=[], description="prompt or class label of each compared picture")
    pictures: PicturesReport | None = Field(default=None, description="null where nothing was drawn")
    latency: LatencyReport | None = None

    @model_validator(mode="after")
    def _one_a_timestep(self) -> Report:
        if any(linear.sqnr and len(linear.sqnr) != len(self.measured_at) for linear in self.linears):
            raise ValueError("a linear with more or fewer values than timesteps were measured at")
        return self

    def stages(self) -> list[str]:
        """The compared stages, from the float graph to the engine."""
        return list(dict.fromkeys(call.stage for call in self.parity.calls)) if self.parity else []

    def replay_floor(self, required: float) -> float:
        """dB that a replay on ONNX Runtime's CPU provider must keep, whatever the engine ran on.

        Args:
            required: what the recipe requires at least.
        """
        calls = self.parity.calls if self.parity else []
        values = [call.sqnr for call in calls if call.stage != FLOAT_STAGE]
        return max(min(values) - REPLAY_MARGIN, required) if values else required

    def ran(self) -> bool:
        """Whether the engine ran on the machine that exported."""
        return "engine" in self.stages()

    def drawn_by(self) -> str:
        """The runtime that drew the pictures which are compared with PyTorch's."""
        labels = {"engine": self.engine, "qdq-onnx": "the Q/DQ graph on ONNX Runtime's CPU provider, operator by operator"}
        return labels.get(self.stages()[-1], self.stages()[-1]) if self.stages() else ""

    def captions(self) -> list[str]:
        """Prompt or class label of each picture in `parity/pictures.png`."""
        return self.drawn[: self.pictures.shown] if self.pictures else self.drawn

    def worst_call(self, stage: str) -> CallParity | None:
        """The stage's network call of the least SQNR."""
        calls = [call for call in self.parity.calls if call.stage == stage] if self.parity else []
        return min(calls, key=lambda call: call.sqnr) if calls else None

    def mean_sqnr(self, stage: str) -> float:
        """Mean over the stage's calls, dB; NaN without any."""
        calls = [call.sqnr for call in self.parity.calls if call.stage == stage] if self.parity else []
        return sum(calls) / len(calls) if calls else math.nan

    def heat(self) -> list[LinearReport]:
        """Linears with at least one measured value."""
        return [linear for linear in self.linears if any(value is not None for value in linear.sqnr)]

    def left_alone(self) -> list[tuple[str, str, list[str]]]:
        """(pass, reason, places) of places that a pass examined and left unchanged."""
        places: dict[tuple[str, str], list[str]] = {}
        for item in self.passes:
            for line in item.skipped:
                place, _, reason = line.partition(": ")
                places.setdefault((item.name, reason), []).append(place.strip("'"))
        return [(name, reason, names) for (name, reason), names in places.items()]

    def skipped(self) -> list[tuple[str, int]]:
        """Reasons for linears that stay float or weight-only, and how many have each."""
        counts: dict[str, int] = {}
        for linear in self.linears:
            if not PRESETS[linear.action].low_precision:
                label = f"{linear.action}: {linear.reason or 'rule ' + linear.rule}"
                counts[label] = counts.get(label, 0) + 1
        return list(counts.items())
