"""A diffusers network under torch with its sampler; the part that the networks of all families share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dq_export.core.condition_file import misfit
from dq_export.core.documents import shown_path
from dq_export.core.network import Conditions, Feed, InputSite, Linear, Observer, axes_of, sized
from dq_export.core.progress import Advance, unwatched
from dq_export.passes.analysis.sites import Structure
from dq_export.passes.sizes import write_sizes

from ..collector import collect_everything
from .checkpoint import CONFIG, Checkpoint, architecture_of, broken_weights, configuration, digest
from .controlnet import load_controlnet
from .family import Family, Pictures
from .float_graph import exporting, save
from .loading import load_weights, make_empty
from .lora import Adapter, fuse
from .picture_size import inputs_at
from .prompt_graph import export_encoders
from .reference import Float32, ModelError, Network, PromptGraph, Samplers
from .sampler_tables import Sending, tabulate
from .sampling import Rehearsal, load_scheduler, noise_of
from .serving import Serving
from .stand_in import StandIn
from .structure import structure_of
from .text_encoders import encode_prompts
from .text_parts import files_of
from .torch_blocks import TorchChain, block_names, linears_computing, product_of
from .torch_call import call, parts_of
from .torch_export import export_graph
from .torch_hooks import inputs_replaced, moved, observed, parameters_replaced

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

ACTIVATION_BYTES = 16 << 20
"""The greatest size of the largest activation in bytes; a network call holds about four of that size."""
WITH_CONTROLNET = ", with the checkpoint's ControlNet, which reads outlines of random shapes"
"""What a report adds to the sampler."""


class TorchNetwork:
    """A loaded network of a family. See `Reference` for every member."""

    shared = True
    size: tuple[int, int] | None = None
    fused: frozenset[str] = frozenset()

    def __init__(
        self, family: Family, model: Any, checkpoint: Checkpoint, guidance: float, progress: Advance, controlnet: Any
    ) -> None:
        self.family = family
        self.model = model
        self.controlnet = controlnet
        self.architecture = type(model)
        self.config = configuration(model)
        self.scheduler = load_scheduler(checkpoint.scheduler, family.scheduler_of(self.config), family.prediction)
        self.guided_by = family.guided_by(self.config)
        self.guidance = 1.0 if self.guided_by == "nothing" else guidance
        self.checkpoint = checkpoint
        self.inputs = family.inputs(model) + (() if controlnet is None else family.residuals(model))
        if not family.encoders:
            self.conditions = family.conditions(model)
        self.sampler = type(self.scheduler).__name__ + ("" if controlnet is None else WITH_CONTROLNET)
        self.rules = family.rules
        self.decoder = checkpoint.vae
        self.graphs: dict[bool, ir.Model] = {}
        largest = 4 * family.largest_activation(model)  # bytes, of one row
        self.batch = min(max(ACTIVATION_BYTES // (2 * largest), 1), 8)  # with guidance a picture has two rows
        self.rows = max(ACTIVATION_BYTES // largest, 1)
        self.digest = digest([part for part in (model, controlnet) if part is not None], self.scheduler, progress)
        self.host: dict[str, torch.Tensor] = {}

    @staticmethod
    def load(
        family: Family,
        checkpoint: Checkpoint,
        guidance: float,
        progress: Advance = unwatched,
        adapters: Sequence[Adapter] = (),
        place: Path | None = None,
    ) -> TorchNetwork:
        """Load a checkpoint of one of the family's architectures, in float32.

        Args:
            guidance: the guidance scale of the checkpoint; 0 for its family's.
            progress: called with (tensors read, all tensors).
            adapters: fused into its weights.
            place: see `load_weights`.

        Raises:
            ModelError: its files are damaged or do not fit each other, a weight is not finite, or an error of `fuse`.
        """
        architecture = family.network_class(str(architecture_of(checkpoint.config)))
        empty = make_empty(architecture, family.values, checkpoint.folder / CONFIG, checkpoint.config)
        model = load_weights(empty, checkpoint.weights, place, family.todays_name)
        broken = broken_weights(model)
        if broken:
            raise ModelError(
                f"{shown_path(checkpoint.folder)}: NaN or Inf in {len(broken)} weights ({', '.join(broken[:3])}); the checkpoint "
                "is damaged"
            )
        fused = fuse(model, adapters)
        family.prepare(model)
        controlnet = load_controlnet(checkpoint, model.config, place) if checkpoint.pipeline in family.controlled else None
        network = TorchNetwork(family, model, checkpoint, guidance or family.default_guidance, progress, controlnet)
        network.fused = fused
        return network

    @cached_property
    def structure(self) -> Structure:
        """The structure of the network's graph. The graph is kept for `export_onnx`."""

        def graph() -> ir.Model:
            self.graphs[self.shared] = self._graph(shared=self.shared)
            return self.graphs[self.shared]

        return structure_of(self.model, self.inputs, graph)

    @property
    def feed_shape(self) -> tuple[int, ...]:
        state = self.inputs[0].zeros(1).shape
        # A state may also hold a mask and a picture, and an output variances: neither is sampled.
        return tuple(map(min, state, self.family.output_shape(self.config, state)))[1:]

    def draw_at(self, height: int, width: int) -> None:
        self.inputs = inputs_at(self.family, self.inputs, height, width)
        self.size = (height, width)
        self.graphs.clear()

    @contextmanager
    def at(self, size: tuple[int, int]) -> Iterator[None]:
        before = self.inputs, self.size
        self.inputs, self.size = inputs_at(self.family, self.inputs, *size), size
        try:
            yield
        finally:
            self.inputs, self.size = before

    @contextmanager
    def drawing(self, size: tuple[int, int] | None) -> Iterator[None]:
        if size is None:
            yield
            return
        scheduler, self.scheduler = self.scheduler, self.family.scheduler_at(self.scheduler, self.inputs)
        try:
            with self.at(size):
                yield
        finally:
            self.scheduler = scheduler

    @property
    def conditions(self) -> Conditions:
        return self._conditions

    @conditions.setter
    def conditions(self, conditions: Conditions) -> None:
        self._conditions = conditions
        self.inputs = sized(self.inputs, conditions)

    @property
    def sites(self) -> tuple[InputSite, ...]:
        return self.structure.sites

    @property
    def linears(self) -> Mapping[str, Linear]:
        return self.structure.linears

    @property
    def attention(self) -> tuple[tuple[str, ...], ...]:
        return self.structure.attention

    def weight(self, linear: str) -> Float32:
        parameter = self.host.get(f"{linear}.weight", self.model.get_submodule(linear).weight)
        weight: Float32 = parameter.detach().flatten(1).numpy()
        return weight

    def bias(self, linear: str) -> Float32:
        if self.model.get_submodule(linear).bias is None:
            return np.zeros(len(self.weight(linear)), dtype=np.float32)
        bias: Float32 = self.host.get(f"{linear}.bias", self.model.get_submodule(linear).bias).detach().numpy()
        return bias

    @contextmanager
    def on(self, device: str) -> Iterator[None]:
        try:
            with moved(self.model, device) as self.host, moved(self.controlnet, device):
                yield
        finally:
            self.host = {}

    @property
    def unit(self) -> int:
        return self.family.unit

    @property
    def serving(self) -> Serving:
        return self.family.serving(self.config, self.inputs, self.scheduler)

    def export_encoders(self, folder: Path, bits: int | None = None) -> PromptGraph | None:
        if not self.family.encoders:
            return None
        names = [item.name for item in self.inputs if item.name in self.family.requests]
        return export_encoders(self.family, self.checkpoint, self.config, names, folder, bits)

    def forward(self, feed: Feed) -> Float32:
        return np.concatenate([call(self.model, self.inputs, part) for part in self.parts(feed)])

    def parts(self, feed: Feed) -> list[Feed]:
        return parts_of(self.inputs, feed, self.rows)

    def in_dtype(self, dtype: str) -> Network:
        import torch

        # torch's own `to`: diffusers' warns of modules that an architecture does not have.
        model = torch.nn.Module.to(copy.deepcopy(self.model), {"bf16": torch.bfloat16}[dtype])
        return lambda feed: call(model, self.inputs, feed)

    def encode(self, prompts: Sequence[str], device: str, progress: Advance = unwatched) -> Conditions:
        encoded = encode_prompts(self.family, self.checkpoint, self.config, prompts, device, progress)
        names = [item.name for item in self.inputs if item.name in encoded.arrays]  # some of a family's networks take fewer
        conditions = encoded.only(names)
        if reason := misfit(conditions, self.inputs, guided=False):
            raise ModelError(
                f"{shown_path(self.checkpoint.home)}: the outputs of its text encoders do not fit its network: {reason}"
            )
        return conditions

    def encoding_files(self) -> list[tuple[str, int, int]]:
        return files_of(self.family, self.checkpoint)

    def timesteps(self, steps: int) -> list[float]:
        blank = Conditions.blank(self.inputs)

        def rehearsed(scheduler: Any, count: int, network: Network) -> Float32:
            noise = np.ones((1, *self.feed_shape), dtype=np.float32)
            pictures = Pictures(noise=noise, conditions=blank.arrays, null=blank.null, size=self.size)
            return self._draw(network, scheduler, pictures, steps=count, guidance=2.0)

        return Rehearsal(
            draw=rehearsed,
            state=self.inputs[0].name,
            output=lambda shape: self.family.output_shape(self.config, shape),
            prediction=self.family.prediction,
        ).timesteps(self.scheduler, steps)

    def release(self) -> None:
        import torch

        for parameter in self.model.parameters():  # the exporter's caches may still know the modules
            parameter.data = torch.empty(0)
        del self.model
        self.graphs.clear()
        collect_everything()

    def noise(self, samples: int, seed: int) -> Float32:
        return noise_of(self.feed_shape, samples, seed)

    def trajectory(
        self, conditions: npt.NDArray[np.int64], *, steps: int, seed: int, guidance: float, before: Callable[[Feed], None]
    ) -> None:
        def watched(feed: Feed) -> Float32:
            before(feed)
            return call(self.model, self.inputs, feed)  # in one piece: observers see one call

        self.draw(watched, self.noise(len(conditions), seed), conditions, steps=steps, guidance=guidance)

    def samplers(self, limit: int, progress: Advance = unwatched) -> Samplers:
        (timestep,) = (item.dtype for item in self.inputs if item.role == "timestep")
        sending = Sending(
            integers=timestep.startswith("int"),
            set_timesteps=lambda scheduler, count: self.family.set_timesteps(scheduler, count, self.inputs),
            divisor=self.family.timestep_divisor,
        )
        return tabulate(self.scheduler, limit, progress, self.family.prediction, sending)

    def draw(
        self, network: Network, noise: Float32, conditions: npt.NDArray[np.int64], *, steps: int, guidance: float
    ) -> Float32:
        rows, null = self.conditions.rows(conditions), self.conditions.null_rows(len(noise))
        pictures = Pictures(noise=noise, conditions=rows, null=null, size=self.size, controlnet=self.controlnet)
        return self._draw(network, self.scheduler, pictures, steps=steps, guidance=guidance)

    def latents(self, sampled: Float32) -> Float32:
        return self.family.latents(sampled, self.size)

    def _draw(self, network: Network, scheduler: Any, pictures: Pictures, *, steps: int, guidance: float) -> Float32:
        # A rehearsal calls no ControlNet, which takes as long as a part of the network.
        inputs = [item for item in self.inputs if item.role != "residual" or pictures.controlnet is not None]
        stand_in = StandIn(network, inputs, self.config, self.architecture, shared=True, part=self.family.part)
        return self.family.draw(stand_in, scheduler, pictures, steps=steps, guidance=guidance)

    @contextmanager
    def replace(
        self, weights: Mapping[str, Float32], biases: Mapping[str, Float32], rounded: Callable[[str, Float32, float], Float32]
    ) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(parameters_replaced(self.model, weights, biases))
            stack.enter_context(inputs_replaced(self.model, self.sites, rounded))
            yield

    def observe(self, observer: Observer) -> AbstractContextManager[None]:
        return observed(self.model, self.sites, observer)

    @property
    def blocks(self) -> tuple[str, ...]:
        return block_names(self.linears, self.family.chain_lists or self.family.blocks)

    @property
    def tower(self) -> tuple[str, ...]:
        return () if self.family.chain_lists else self.blocks

    def chain(self, feed: Feed) -> TorchChain:
        return TorchChain(self.model, self.inputs, self.blocks, feed)

    def product(self, linear: str) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
        return product_of(self.model.get_submodule(linear))

    def computing(self, linears: Mapping[str, Callable[[torch.Tensor], torch.Tensor]]) -> AbstractContextManager[None]:
        return linears_computing(self.model, linears)

    def export_onnx(self, path: Path, *, shared: bool) -> None:
        graph = self.graphs.pop(shared, None) or self._graph(shared=shared)
        self.graphs.clear()
        write_sizes(graph, axes_of(self.inputs))  # those of the conditions, which may have come after the graph
        save(graph, path, self.checkpoint.weights.files, f"{self.family.part}.", self.fused)
        del graph
        collect_everything()

    def _graph(self, *, shared: bool) -> ir.Model:
        with exporting(type(self.model).__name__):
            return export_graph(self.model, self.inputs, self.family.part, self.family.blocks, shared=shared)
