"""Family `dit`: class-conditional diffusers `DiTTransformer2DModel` of any size, learned sigma or not."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dq_export.core.network import InputSite, Linear, Observer
from dq_export.core.progress import Advance, unwatched
from dq_export.core.recipe import Rule

from .checkpoint import Checkpoint, broken_weights, digest
from .embeddings import settle_positions, settle_timesteps
from .float_graph import save, trace
from .network import load_network
from .reference import Feed, Float32, ModelError, Network, Reference, Samplers
from .repeat_block import repeat_block
from .sampling import load_scheduler, rehearsed_timesteps, sample
from .schedules import tabulate

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

ROW_REASON = "works on one row per sample: integer GEMMs gain nothing there, 8-bit blocks save memory"
EDGE_REASON = "embedders and final projection stay float"
RULES = (
    Rule(match=r"^transformer_blocks\.\d+\.(attn1|ff)\.", action="bits"),
    Rule(match=r"\.norm1\.linear$", action="weight-only", reason=ROW_REASON),
    Rule(match=r"\.emb\.|^proj_out_[12]$|^pos_embed", action="float", reason=EDGE_REASON),
)
ACTIVATION_BYTES = 16 << 20
"""Of the largest activation; a network call holds about four such."""
DEFAULT_SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "clip_sample": False,
}
"""DiT's own (section 4 of arXiv 2212.09748, the ADM schedule), for a folder without a scheduler."""


@dataclass(frozen=True)
class DiT:
    """The family: how a folder becomes a reference."""

    name: str = "dit"
    architecture: str = "DiTTransformer2DModel"
    default_guidance: float = 4.0

    def load(self, checkpoint: Checkpoint, guidance: float, progress: Advance = unwatched) -> Reference:
        """See `Family.load`. The default guidance is that of diffusers' DiTPipeline."""
        from diffusers import DiTTransformer2DModel

        scheduler = load_scheduler(checkpoint.scheduler, DEFAULT_SCHEDULER)
        model = load_network(DiTTransformer2DModel, checkpoint.folder, checkpoint.config, checkpoint.weights)
        _refuse_unfit(model, checkpoint.folder)
        settle_positions(model)
        settle_timesteps(model)
        return DiTReference(model, scheduler, guidance, checkpoint, progress)


DIT = DiT()


class DiTReference:
    """A loaded DiT. See `Reference` for every member."""

    def __init__(self, model: Any, scheduler: Any, guidance: float, checkpoint: Checkpoint, progress: Advance) -> None:
        self.model = model
        self.scheduler = scheduler
        self.guidance = guidance
        self.weights = checkpoint.weights
        self.classes = int(model.config.num_embeds_ada_norm)
        self.sampler = type(scheduler).__name__
        self.rules: tuple[Rule, ...] = RULES
        self.decoder = checkpoint.vae
        self.feed_shape = (model.config.in_channels, model.config.sample_size, model.config.sample_size)
        self.sites = tuple(site for i in range(len(model.transformer_blocks)) for site in _sites(i, model.inner_dim))
        self.attention = tuple(site.linears for site in self.sites if len(site.linears) == 3)
        tokens = (model.config.sample_size // model.config.patch_size) ** 2
        widest = 2 * 4 * tokens * 4 * model.inner_dim  # bytes of one picture's largest activation, guided
        self.batch = min(max(ACTIVATION_BYTES // widest, 1), 8)
        self.digest = digest(model, scheduler, progress)
        self.host: dict[str, torch.Tensor] = {}
        self.linears: Mapping[str, Linear] = _linears(model)

    def weight(self, linear: str) -> Float32:
        name = f"{linear}.weight"
        weight: Float32 = self.host.get(name, self.model.get_parameter(name)).detach().numpy()
        return weight

    def bias(self, linear: str) -> Float32:
        if self.model.get_submodule(linear).bias is None:
            return np.zeros(len(self.weight(linear)), dtype=np.float32)
        name = f"{linear}.bias"
        bias: Float32 = self.host.get(name, self.model.get_parameter(name)).detach().numpy()
        return bias

    @contextmanager
    def on(self, device: str) -> Iterator[None]:
        if device == "cpu":
            yield
            return
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        self.host = {name: tensor.data for name, tensor in tensors.items()}  # stays mapped from the checkpoint
        try:
            for tensor in tensors.values():
                tensor.data = tensor.data.to(device)
            yield
        finally:
            for name, tensor in tensors.items():
                tensor.data = self.host[name]
            self.host = {}

    def forward(self, feed: Feed) -> Float32:
        return _call(self.model, feed)

    def in_dtype(self, dtype: str) -> Network:
        import torch

        # torch's own `to`: diffusers' warns of modules that this architecture has not.
        model = torch.nn.Module.to(copy.deepcopy(self.model), {"bf16": torch.bfloat16}[dtype])
        return lambda feed: _call(model, feed)

    def timesteps(self, steps: int) -> list[float]:
        return rehearsed_timesteps(self.scheduler, steps, self.feed_shape[0])

    def release(self) -> None:
        import torch

        for parameter in self.model.parameters():  # the exporter's caches may still know the modules
            parameter.data = torch.empty(0)
        del self.model
        gc.collect()

    def noise(self, samples: int, seed: int) -> Float32:
        import torch

        # One generator for each sample: picture i does not depend on how many are drawn with it. PyTorch takes 64 bits.
        seeds = [(seed * 100_003 + i) % 2**64 for i in range(samples)]
        each = [torch.randn(self.feed_shape, generator=torch.Generator().manual_seed(value)) for value in seeds]
        noise: Float32 = torch.stack(each).numpy()
        return noise

    def trajectory(self, labels: npt.NDArray[np.int64], *, steps: int, seed: int, guidance: float) -> Iterator[float]:
        sampling = self._sample(self.noise(len(labels), seed), labels, steps=steps, guidance=guidance)
        feed = next(sampling)
        while True:
            yield float(feed["timestep"][0])  # type: ignore[arg-type]
            try:
                feed = sampling.send(self.forward(feed))
            except StopIteration:
                return

    def samplers(self, most: int, progress: Advance = unwatched) -> Samplers:
        return tabulate(self.scheduler, most, progress)

    def draw(self, network: Network, noise: Float32, labels: npt.NDArray[np.int64], *, steps: int, guidance: float) -> Float32:
        sampling = self._sample(noise, labels, steps=steps, guidance=guidance)
        feed = next(sampling)
        while True:
            try:
                feed = sampling.send(network(feed))
            except StopIteration as end:
                latents: Float32 = end.value
                return latents

    def _sample(
        self, noise: Float32, labels: npt.NDArray[np.int64], *, steps: int, guidance: float
    ) -> Generator[Feed, Float32, Float32]:
        return sample(self.scheduler, noise, labels, null=self.classes, steps=steps, guidance=guidance)

    @contextmanager
    def replace(
        self, weights: Mapping[str, Float32], biases: Mapping[str, Float32], rounded: Callable[[str, Float32, float], Float32]
    ) -> Iterator[None]:
        import torch

        timestep = 0.0
        seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

        def learn(module: torch.nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            nonlocal timestep
            timestep = float(named["timestep"][0])
            seen.clear()

        def swap(name: str) -> Any:
            def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
                value = inputs[0]
                if name not in seen or seen[name][0] is not value:  # readers of one tensor get one rounding of it
                    found = rounded(name, value.detach().flatten(0, -2).cpu().numpy(), timestep)
                    seen[name] = value, torch.from_numpy(found).to(value.device).reshape(value.shape)
                return (seen[name][1],)

            return hook

        changes = [(name, "weight", value) for name, value in weights.items()]
        changes += [(name, "bias", value) for name, value in biases.items()]
        before = [getattr(self.model.get_submodule(name), kind) for name, kind, _ in changes]
        handles = [self.model.register_forward_pre_hook(learn, with_kwargs=True)]
        for site in self.sites:
            handles += [self.model.get_submodule(name).register_forward_pre_hook(swap(site.name)) for name in site.linears]
        try:
            for name, kind, value in changes:  # a layer without a bias gets one, as in the graph
                module = self.model.get_submodule(name)
                new = torch.from_numpy(value).to(module.weight.device)
                setattr(module, kind, torch.nn.Parameter(new, requires_grad=False))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for (name, kind, _), parameter in zip(changes, before, strict=True):
                setattr(self.model.get_submodule(name), kind, parameter)

    @contextmanager
    def observe(self, observer: Observer) -> Iterator[None]:
        def watch(name: str) -> Any:
            def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
                observer(name, inputs[0].detach().flatten(0, -2))

            return hook

        handles = [
            self.model.get_submodule(s.linears[0]).register_forward_pre_hook(watch(s.name), prepend=True) for s in self.sites
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def export_onnx(self, path: Path, *, shared: bool) -> None:
        import torch

        batch = torch.export.Dim("batch", min=1, max=1024)
        timestep = torch.zeros(1 if shared else 2, dtype=torch.int64)
        dynamic = {"hidden_states": {0: batch}, "timestep": None if shared else {0: batch}, "class_labels": {0: batch}}
        example = (torch.zeros(2, *self.feed_shape), timestep, torch.zeros(2, dtype=torch.int64))
        model = self._trace(example, dynamic)
        save(model, path, self.weights.files, "transformer.")

    def _trace(self, example: tuple[torch.Tensor, ...], dynamic: Mapping[str, Any]) -> ir.Model:
        """Trace three blocks and repeat the third; all of them where there are no more, or where they are not alike."""
        blocks = self.model.transformer_blocks
        if len(blocks) <= 3:
            return trace(_named_wrapper(self.model), example, list(dynamic), "sample", dynamic)
        state = {f"transformer.{name}": value for name, value in self.model.state_dict().items()}
        try:
            self.model.transformer_blocks = blocks[:3]
            model = trace(_named_wrapper(self.model), example, list(dynamic), "sample", dynamic)
        finally:
            self.model.transformer_blocks = blocks
        if repeat_block(model, "transformer.transformer_blocks", len(blocks), state):
            return model
        return trace(_named_wrapper(self.model), example, list(dynamic), "sample", dynamic)


def _call(model: Any, feed: Feed) -> Float32:
    import torch

    tensors = {name: torch.from_numpy(np.asarray(value)).to(model.device) for name, value in feed.items()}
    states = tensors["hidden_states"].to(model.dtype)
    timestep = tensors["timestep"].expand(len(states))
    with torch.inference_mode():
        output = model(states, timestep=timestep, class_labels=tensors["class_labels"], return_dict=False)[0]
    sample: Float32 = output.float().cpu().numpy()
    return sample


def _named_wrapper(model: Any) -> Any:
    """The network with diffusers' tensor names as positional arguments; its module is called `transformer`."""
    import torch

    class Wrapper(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.transformer = model

        def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = self.transformer(
                hidden_states, timestep=timestep, class_labels=class_labels, return_dict=False
            )[0]
            return output

    return Wrapper().eval()


def _sites(block: int, width: int) -> tuple[InputSite, ...]:
    """The four quantized inputs of one block. adaLN's rows are shift, scale, gate of attention, then of the MLP."""
    prefix = f"transformer_blocks.{block}"
    query, key, value = (f"{prefix}.attn1.to_{letter}" for letter in "qkv")
    proj, fc1, fc2 = f"{prefix}.attn1.to_out.0", f"{prefix}.ff.net.0.proj", f"{prefix}.ff.net.2"
    modulation = f"{prefix}.norm1.linear"

    def rows(chunk: int) -> tuple[int, int]:
        return (chunk * width, (chunk + 1) * width)

    return (
        InputSite(
            name=query,
            linears=(query, key, value),
            fold="modulation",
            producer=modulation,
            shift_rows=rows(0),
            scale_rows=rows(1),
        ),
        InputSite(name=proj, linears=(proj,), fold="value", producer=value),
        InputSite(name=fc1, linears=(fc1,), fold="modulation", producer=modulation, shift_rows=rows(3), scale_rows=rows(4)),
        InputSite(name=fc2, linears=(fc2,), fold="explicit"),
    )


def _linears(model: Any) -> dict[str, Linear]:
    import torch

    found = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            edge = ".emb." in name or not name.startswith("transformer_blocks.")
            kind = "edge" if edge else "modulation" if name.endswith(".norm1.linear") else "gemm"
            found[name] = Linear(name=name, kind=kind, width=module.in_features)  # type: ignore[arg-type]
    return found


def _refuse_unfit(model: Any, folder: Path) -> None:
    broken = broken_weights(model)
    if broken:
        raise ModelError(f"{folder}: NaN or Inf in {len(broken)} weights ({', '.join(broken[:3])}); the checkpoint is damaged")
    if model.config.norm_type != "ada_norm_zero":
        raise ModelError(f"{folder}: norm_type '{model.config.norm_type}'; family dit supports 'ada_norm_zero'")
