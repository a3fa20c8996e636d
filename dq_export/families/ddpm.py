"""Family `ddpm`: diffusers `UNet2DModel`, of pictures or latents, without a condition or with a class label, of any size."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from dq_export.core.network import BATCH, Conditions, Input

from .ddpm_values import DDPMValues
from .embeddings import settle_timesteps
from .family import Family, Pictures
from .old_names import todays_name
from .reference import Float32
from .sampling import sampled
from .stand_in import StandIn
from .torch_blocks import UNET_LISTS
from .upsampling import settle_upsamplers

DEFAULT_SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "variance_type": "fixed_large",
    "clip_sample": True,
}
"""DDPM's own scheduler (section 4 of arXiv 2006.11239), for a folder without one."""
LABEL = "class_labels"


class DDPM(Family):
    """Data, and the loop of DDPMPipeline and DDIMPipeline, which take neither noise nor labels."""

    name = "ddpm"
    part = "unet"
    chain_lists = UNET_LISTS
    architectures = ("UNet2DModel",)
    values = DDPMValues
    default_guidance = 1.0
    default_scheduler = DEFAULT_SCHEDULER

    def todays_name(self, tensor: str) -> str:
        """See `Family.todays_name`."""
        return todays_name(tensor)

    def prepare(self, model: Any) -> None:
        """See `Family.prepare`."""
        settle_timesteps(model)
        settle_upsamplers(model)

    def inputs(self, model: Any) -> tuple[Input, ...]:
        """See `Family.inputs`. A network with class labels also takes a label."""
        config = model.config
        state = (BATCH, config.in_channels, config.sample_size, config.sample_size)
        inputs = [
            Input(name="sample", role="state", dtype="float32", shape=state),
            Input(name="timestep", role="timestep", dtype="float32"),
        ]
        if config.num_class_embeds is not None:
            inputs.append(Input(name=LABEL, role="condition", dtype="int64", limit=config.num_class_embeds - 1))
        return tuple(inputs)

    def conditions(self, model: Any) -> Conditions:
        """See `Family.conditions`. They are all class labels, or one entry for a network without labels. There is no null."""
        classes = model.config.num_class_embeds
        if classes is None:
            return Conditions(names=("any picture",), arrays={}, null={})
        return Conditions(names=tuple(map(str, range(classes))), arrays={LABEL: np.arange(classes, dtype=np.int64)}, null={})

    def guided_by(self, config: Any) -> Literal["null", "input", "nothing"]:
        """See `Family.guided_by`. Nothing guides it, because it has no null condition."""
        return "nothing"

    def largest_activation(self, model: Any) -> int:
        """See `Family.largest_activation`. It is the input of the last level's first convolution, with its skip."""
        first, *rest = model.config.block_out_channels
        return int((first + max(rest, default=first)) * model.config.sample_size**2)

    def draw(self, network: StandIn, scheduler: Any, pictures: Pictures, *, steps: int, guidance: float) -> Float32:
        """See `Family.draw`. The pipelines clamp the result to -1 … 1."""
        return sampled(network, scheduler, pictures, steps=steps, guidance=1.0)


DDPM_FAMILY = DDPM()
