"""What one network architecture adds to what all torch networks share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from dq_export.core.network import Conditions, Feed, Input
from dq_export.core.rule import DEFAULT_RULES, Rule

from .config_values import Values
from .prediction import NOISE, Prediction
from .reference import Float32
from .stand_in import StandIn


@dataclass(frozen=True, kw_only=True, eq=False)
class Pictures:
    """What a sampler starts from.

    Args:
        noise: float32[P, ...], in the shape of the network's state.
        conditions: the conditional inputs' rows, P of each.
        null: the same inputs' rows without a condition, P of each; empty where the network has none.
        size: height and width in pixels; None: the network's own.
    """

    noise: Float32
    conditions: Feed
    null: Feed
    size: tuple[int, int] | None = None


class Family(ABC):
    """How the networks of one architecture are called.

    Attributes:
        name: as in the report.
        part: what diffusers' pipelines call its networks, in their folders as well: `pipe.transformer`, `transformer/`.
        architectures: the diffusers classes of its networks, as `architecture_of` gives them.
        values: what their configurations may hold.
        encoders: folders of a pipeline that encode prompts, tokenizers among them; empty: prompts are nothing that it draws.
        optional: those of `encoders` that a pipeline may leave out, a tokenizer and its encoder together.
        prompt_tokens: by the class of a pipeline, as model_index.json names it, how many tokens a prompt may have; of a
            family with `encoders`.
        lowercase: whether its pipelines write prompts in lower case, without white space around them.
        requests: by condition input, what diffusers' pipelines call its embeddings and a server's request calls it; without
            those that no request holds.
        blocks: names of the lists of blocks, in the order in which the network calls them. Of a run of equal blocks an export
            traces three; without any name it traces the whole network.
        unit: pixels that the height and the width of its pictures are multiples of, before the network's own patches; 0: its
            pictures have one size.
        default_guidance: guidance scale for a checkpoint that has no better one.
        prediction: what its networks give, which decides the schedulers that sample them.
        default_scheduler: configuration, with the class as `_class_name`, for a folder without a scheduler.
        rules: the default recipe rules; together they match every linear. By role, where a family has none of its own.
    """

    name: str
    part: str = "transformer"
    architectures: tuple[str, ...]
    values: type[Values]
    encoders: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    prompt_tokens: Mapping[str, int] = MappingProxyType({})
    lowercase: bool = False
    requests: Mapping[str, str] = MappingProxyType({})
    blocks: tuple[str, ...] = ()
    unit: int = 0
    default_guidance: float
    prediction: Prediction = NOISE
    default_scheduler: Mapping[str, Any]
    rules: tuple[Rule, ...] = DEFAULT_RULES

    def network_class(self, architecture: str) -> Any:
        """The class of one of `architectures`; diffusers' own of that name."""
        import diffusers

        return getattr(diffusers, architecture)

    def todays_name(self, tensor: str) -> str:
        """Of a checkpoint's tensor, as diffusers calls it today."""
        return tensor

    @abstractmethod
    def prepare(self, model: Any) -> None:
        """Replace in a loaded network what would export badly or compute differently on another machine."""

    @abstractmethod
    def inputs(self, model: Any) -> tuple[Input, ...]:
        """The network's inputs, by the names of its `forward`, the state first."""

    def conditions(self, model: Any) -> Conditions:
        """What the network draws. Of a family without `encoders`."""
        raise NotImplementedError

    def scheduler_of(self, config: Any) -> Mapping[str, Any]:
        """`default_scheduler`, or another one that suits a network of this configuration."""
        return self.default_scheduler

    def guided_by(self, config: Any) -> Literal["null", "input", "nothing"]:
        """What a guidance scale above 1 takes: calls without a condition, an input of the network, or neither does it."""
        return "null"

    def sizes(self, height: int, width: int) -> Mapping[str, int]:
        """By axis of the inputs, the sizes for a picture of so many times `unit` pixels. Of a family with a `unit`."""
        return {"height": height, "width": width}

    def output_shape(self, config: Any, state: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the network's output, from that of the state: channels behind the batch, twice as many with a learned
        sigma."""
        return (state[0], config.get("out_channels") or state[1], *state[2:])

    def written(self, prompt: str) -> str:
        """A prompt as the family's pipelines give it to their tokenizers."""
        return prompt.lower().strip() if self.lowercase else prompt

    def embed(self, pipeline: str, parts: Mapping[str, Any], prompts: Sequence[str], config: Any) -> Mapping[str, Any]:
        """The condition inputs' float32 tensors [prompts, ...], as the pipeline makes them. Of a family with `encoders`.

        Called with a few prompts at a time: the tensors' sizes behind the first must not depend on them. A server's graph is
        traced through this.

        Args:
            pipeline: the pipeline's class, one of `prompt_tokens`.
            parts: by folder of `encoders`, the loaded tokenizer or encoder; encoders compute in float32. Without those
                of `optional` that the pipeline leaves out.
            config: of the network, as diffusers has it.
        """
        raise NotImplementedError

    def encode(self, pipeline: str, parts: Mapping[str, Any], prompts: Sequence[str], config: Any) -> Conditions:
        """The conditions of prompts, with "" as the null; see `embed`."""
        rows, null = (
            {name: tensor.cpu().numpy() for name, tensor in self.embed(pipeline, parts, texts, config).items()}
            for texts in (prompts, [""])
        )
        return Conditions(names=tuple(prompts), arrays=rows, null=null)

    @abstractmethod
    def largest_activation(self, model: Any) -> int:
        """Elements of the largest activation of one sample."""

    @abstractmethod
    def draw(self, network: StandIn, scheduler: Any, pictures: Pictures, *, steps: int, guidance: float) -> Float32:
        """The latents that a scheduler samples with a network, float32 of the shape of the noise.

        A diffusers pipeline takes `network` in its denoiser's place; a loop of one's own calls `network.run`.

        Called before any other work with a network that gives zeros, to see whether the scheduler runs: what the
        scheduler raises, and ValueError for timesteps that the network does not take, becomes the user's error.
        """
