"""The interface of a family: the part of a network architecture that differs from other torch networks."""

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
from .serving import Serving
from .stand_in import StandIn


@dataclass(frozen=True, kw_only=True, eq=False)
class Pictures:
    """The starting point of a sampler.

    Args:
        noise: float32[P, ...], in the shape of the network's state.
        conditions: P rows of each conditional input.
        null: P rows of each of these inputs for the empty condition; empty if the network has none.
        size: height and width in pixels; None for the network's own.
        controlnet: the ControlNet that sends residuals; None where the network takes none.
    """

    noise: Float32
    conditions: Feed
    null: Feed
    size: tuple[int, int] | None = None
    controlnet: Any = None


class Family(ABC):
    """How the networks of one architecture are called.

    Attributes:
        name: its name in the report.
        part: the name of its networks in diffusers' pipelines and their folders: `pipe.transformer`, `transformer/`.
        architectures: the diffusers classes of its networks, as `architecture_of` returns them.
        values: the possible values of their configurations.
        encoders: folders of a pipeline that encode prompts, including tokenizers; empty if the family does not draw prompts.
        optional: for each class of a pipeline, those of `encoders` that it may leave out, a tokenizer and its encoder together.
        prompt_tokens: for each class of a pipeline in model_index.json, the greatest number of tokens of a prompt; only for a
            family with `encoders`.
        lowercase: whether its pipelines write prompts in lower case, without white space around them.
        template: the text that its pipelines give to their tokenizers, with `{}` in the prompt's place.
        requests: by condition input, what diffusers' pipelines call its embeddings and a server's request calls it; without
            those that no request holds.
        size_values: values of inputs that no request holds, by name: numbers, or what follows a picture's size; see the server's
            `Call`.
        picture_positions, text_positions: what each column of an input holds of the place of each token, by name; see the
            server's `positions`.
        packing: latents along a side that its pipelines pack into one token, and that a VAE takes apart from each other.
        timestep_divisor: the scheduler's timesteps are divided by this for the network.
        controlled: classes of its pipelines in which a ControlNet sends residuals to its networks, see `residuals`.
        blocks: names of the lists of blocks, in the order in which the network calls them. Of a run of equal blocks an export
            traces three; without any name it traces the whole network.
        chain_lists: last parts of the names of the lists whose modules are trained one by one, where they are not `blocks`: a
            UNet's, whose later modules read what earlier ones put out.
        unit: pixels that the height and the width of its pictures are multiples of, before the network's own patches; 0: its
            pictures have one size.
        default_guidance: guidance scale for a checkpoint that has no better one.
        prediction: what its networks give, which decides the schedulers that sample them.
        default_scheduler: configuration, with the class as `_class_name`, for a folder without a scheduler.
        rules: the default recipe rules; together they match every linear. By default they are by role.
    """

    name: str
    part: str = "transformer"
    architectures: tuple[str, ...]
    values: type[Values]
    encoders: tuple[str, ...] = ()
    optional: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    prompt_tokens: Mapping[str, int] = MappingProxyType({})
    lowercase: bool = False
    template: str = "{}"
    requests: Mapping[str, str] = MappingProxyType({})
    size_values: Mapping[str, tuple[float | str, ...]] = MappingProxyType({})
    picture_positions: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    text_positions: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    packing: int = 1
    timestep_divisor: float = 1.0
    controlled: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()
    chain_lists: tuple[str, ...] = ()
    unit: int = 0
    default_guidance: float
    prediction: Prediction = NOISE
    default_scheduler: Mapping[str, Any]
    rules: tuple[Rule, ...] = DEFAULT_RULES

    def network_class(self, architecture: str) -> Any:
        """The class of one of `architectures`; by default diffusers' class of that name."""
        import diffusers

        return getattr(diffusers, architecture)

    def todays_name(self, tensor: str) -> str:
        """Of a checkpoint's tensor, as diffusers calls it today."""
        return tensor

    @abstractmethod
    def prepare(self, model: Any) -> None:
        """Replace parts of a loaded network that would export badly or compute differently on another machine."""

    @abstractmethod
    def inputs(self, model: Any) -> tuple[Input, ...]:
        """The network's inputs, by the names of its `forward`, the state first."""

    def residuals(self, model: Any) -> tuple[Input, ...]:
        """Further inputs, behind those, in a pipeline that is `controlled`: what a ControlNet gives, in its order."""
        return ()

    def conditions(self, model: Any) -> Conditions:
        """The conditions that the network draws; only for a family without `encoders`."""
        raise NotImplementedError

    def scheduler_of(self, config: Any) -> Mapping[str, Any]:
        """`default_scheduler`, or another one that fits a network of this configuration."""
        return self.default_scheduler

    def guided_by(self, config: Any) -> Literal["null", "input", "nothing"]:
        """The kind of guidance above a scale of 1: calls without a condition, an input of the network, or none."""
        return "null"

    def task(self, config: Any) -> str:
        """What the hub calls the task of the pipeline that draws with a network of this configuration; empty: it has no name."""
        return "text-to-image" if self.encoders else ""

    def zero_null(self, config: Any) -> bool:
        """Whether the empty condition of guidance is zeros, not that of the prompt ""."""
        return False

    def scheduler_at(self, scheduler: Any, inputs: Sequence[Input]) -> Any:
        """A scheduler that sends the same timesteps at every size: those of pictures of these inputs."""
        return scheduler

    def follows_size(self, scheduler: Any) -> bool:
        """Whether the timesteps that the family's pipeline sends follow the picture's size."""
        return False

    def set_timesteps(self, scheduler: Any, steps: int, inputs: Sequence[Input]) -> None:
        """Set a scheduler's timesteps as the family's pipeline does it, for pictures of these inputs."""
        scheduler.set_timesteps(steps)

    def serving(self, config: Any, inputs: Sequence[Input], scheduler: Any) -> Serving:
        """How a server calls a network of this configuration, of these inputs, with the checkpoint's scheduler."""
        sizes = {item.name: item.shape[1:] for item in inputs}
        # A network of the family may take other values under that name, which do not follow the size.
        values = {name: row for name, row in self.size_values.items() if sizes.get(name) == (len(row),)}
        return Serving(
            requests=self.requests,
            size_values=values,
            zero_null=self.zero_null(config),
            lowercase=self.lowercase,
            template=self.template,
            batched=all(item.batched for item in inputs),
            tokens=len(inputs[0].shape) == 3,
            picture_positions=self.picture_positions,
            text_positions=self.text_positions,
            packing=self.packing,
            follows_size=self.follows_size(scheduler),
        )

    def sizes(self, height: int, width: int) -> Mapping[str, int]:
        """For each axis of the inputs, its size for a picture of the given multiples of `unit`; only for a family with a
        `unit`."""
        return {"height": height, "width": width}

    def output_shape(self, config: Any, state: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the network's output, from that of the state: channels after the batch, twice as many with a learned
        sigma."""
        return (state[0], config.get("out_channels") or state[1], *state[2:])

    def written(self, prompt: str) -> str:
        """A prompt as the family's pipelines give it to their tokenizers."""
        return self.template.replace("{}", prompt.lower().strip() if self.lowercase else prompt)

    def embed(self, pipeline: str, parts: Mapping[str, Any], prompts: Sequence[str], config: Any) -> Mapping[str, Any]:
        """The condition inputs' float32 tensors [prompts, ...], as the pipeline makes them. Of a family with `encoders`.

        Called with a few prompts at a time: the tensors' sizes behind the first must not depend on them. A server's graph is
        traced through this.

        Args:
            pipeline: the pipeline's class, one of `prompt_tokens`.
            parts: for each folder of `encoders`, the loaded tokenizer or encoder; encoders compute in float32. Optional parts
                that the pipeline leaves out are missing.
            config: the configuration of the network, as diffusers has it.
        """
        raise NotImplementedError

    def encode(self, pipeline: str, parts: Mapping[str, Any], prompts: Sequence[str], config: Any) -> Conditions:
        """The conditions of prompts, with "" as the null; see `embed`."""
        rows, null = (
            {name: tensor.cpu().numpy() for name, tensor in self.embed(pipeline, parts, texts, config).items()}
            for texts in (prompts, [""])
        )
        return Conditions(names=tuple(prompts), arrays=rows, null=null)

    def latents(self, sampled: Float32, size: tuple[int, int] | None) -> Float32:
        """What `draw` returned as a VAE takes it, float32[P, C, h, w].

        Args:
            size: height and width of the pictures in pixels; None for the network's own.
        """
        return sampled

    @abstractmethod
    def largest_activation(self, model: Any) -> int:
        """The number of elements of the largest activation of one sample."""

    @abstractmethod
    def draw(self, network: StandIn, scheduler: Any, pictures: Pictures, *, steps: int, guidance: float) -> Float32:
        """The latents that a scheduler samples with a network, float32 of the shape of the noise.

        A diffusers pipeline takes `network` in its denoiser's place; a custom loop calls `network.run`.

        It is called before any other work with a network that returns zeros, to check that the scheduler runs: errors of
        the scheduler, and ValueError for timesteps that the network does not take, become the user's error.
        """
