"""One call of a torch network with arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dq_export.core.network import Feed, Input, arguments

from .reference import Float32


def call(model: Any, inputs: Sequence[Input], feed: Feed) -> Float32:
    """One call, in the model's own floating type; a timestep keeps its type, which the network's sines need."""
    import torch

    tensors = {name: torch.from_numpy(np.asarray(value)).to(model.device) for name, value in feed.items()}
    timestep = tensors.pop("timestep")
    batch = len(tensors[inputs[0].name])
    values = {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in tensors.items()}
    with torch.inference_mode():
        output = model(**arguments(inputs, {**values, "timestep": timestep.expand(batch)}), return_dict=False)[0]
    sample: Float32 = output.float().cpu().numpy()
    return sample
