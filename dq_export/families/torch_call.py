"""One call of a torch network with arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from dq_export.core.network import Feed, Input, arguments

from .reference import Float32


def call(model: Any, inputs: Sequence[Input], feed: Feed) -> Float32:
    """One call."""
    import torch

    with torch.inference_mode():
        output = model(**tensors_of(model, inputs, feed), return_dict=False)[0]
    sample: Float32 = output.float().cpu().numpy()
    return sample


def tensors_of(model: Any, inputs: Sequence[Input], feed: Feed) -> dict[str, Any]:
    """The keyword arguments of a network's `forward`, in its own floating type and on its device.

    A timestep of one row is repeated for every sample, and keeps its type, which the network's sines need.
    """
    import torch

    tensors = {name: torch.as_tensor(value).to(model.device) for name, value in feed.items()}
    timestep = tensors.pop("timestep")
    batch = len(tensors[inputs[0].name])
    values = {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in tensors.items()}
    return arguments(inputs, {**values, "timestep": timestep.expand(batch)})


def placed(feed: Feed, device: str) -> Feed:
    """The feed as tensors on a device, which a call there need not copy."""
    import torch

    return cast(Feed, {name: torch.from_numpy(np.ascontiguousarray(value)).to(device) for name, value in feed.items()})


def parts_of(inputs: Sequence[Input], feed: Feed, rows: int) -> list[Feed]:
    """Split a network call into calls of at most `rows` samples; inputs with one row for all samples are not split."""
    batched = {item.name for item in inputs if item.batched and len(feed[item.name]) > 1}
    parts = [slice(start, start + rows) for start in range(0, len(feed[inputs[0].name]), rows)]
    return [{name: value[part] if name in batched else value for name, value in feed.items()} for part in parts]
