"""Family `dit`: class-conditional diffusers `DiTTransformer2DModel` of any size, learned sigma or not."""

from __future__ import annotations

from typing import Any

import numpy as np

from dq_export.core.network import BATCH, Conditions, Input

from .dit_values import DiTValues
from .embeddings import settle_positions, settle_timesteps
from .family import Family, Pictures
from .reference import Float32
from .sampling import sampled
from .stand_in import StandIn

DEFAULT_SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "clip_sample": False,
}
"""DiT's own scheduler (section 4 of arXiv 2212.09748, the ADM schedule), for a folder without one."""


class DiT(Family):
    """Data, and DiTPipeline's sampling loop, rewritten because the pipeline contains ImageNet's null label as a constant."""

    name = "dit"
    architectures = ("DiTTransformer2DModel",)
    values = DiTValues
    requests = {"class_labels": "class_labels"}  # noqa: RUF012
    blocks = ("transformer_blocks",)
    default_guidance = 4.0  # DiTPipeline's
    default_scheduler = DEFAULT_SCHEDULER

    def prepare(self, model: Any) -> None:
        """See `Family.prepare`."""
        settle_positions(model)
        settle_timesteps(model)

    def inputs(self, model: Any) -> tuple[Input, ...]:
        """See `Family.inputs`."""
        side, null = model.config.sample_size, model.config.num_embeds_ada_norm
        return (
            Input(name="hidden_states", role="state", dtype="float32", shape=(BATCH, model.config.in_channels, side, side)),
            Input(name="timestep", role="timestep", dtype="int64"),
            Input(name="class_labels", role="condition", dtype="int64", limit=null),
        )

    def conditions(self, model: Any) -> Conditions:
        """Every class label; the label after the last one is the null label of guidance."""
        classes = model.config.num_embeds_ada_norm
        labels = np.arange(classes + 1, dtype=np.int64)
        names = tuple(map(str, range(classes)))
        return Conditions(names=names, arrays={"class_labels": labels[:-1]}, null={"class_labels": labels[-1:]})

    def largest_activation(self, model: Any) -> int:
        """The inner activation of the MLP."""
        tokens = (model.config.sample_size // model.config.patch_size) ** 2
        return int(tokens * 4 * model.inner_dim)

    def draw(self, network: StandIn, scheduler: Any, pictures: Pictures, *, steps: int, guidance: float) -> Float32:
        """See `Family.draw`. With guidance > 1 a feed holds every sample twice: with its label, then with the null label."""
        return sampled(network, scheduler, pictures, steps=steps, guidance=guidance)


DIT = DiT()
