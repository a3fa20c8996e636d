"""Equal networks go through PyTorch's exporter once in a process of the tests: it takes half the time of a small export."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from dq_export.families import torch_export

GRAPHS: dict[str, ir.Model] = {}
"""What the exporter made, by `key_of` what it was called with."""
PRODUCTS = torch_export.trace
PLAIN = (bool, int, float, str, tuple, list, type(None))


def trace(network: Any, example: tuple[Any, ...], inputs: list[str], outputs: list[str], dynamic: Sequence[Any]) -> ir.Model:
    """As the product's `trace`. Each caller gets a graph of its own, with copies of the first network's weights."""
    key = key_of(network, example, inputs, outputs, dynamic)
    if key not in GRAPHS:
        GRAPHS[key] = PRODUCTS(network, example, inputs, outputs, dynamic)
        for name, initializer in GRAPHS[key].graph.initializers.items():
            if initializer.const_value is not None:  # the network's memory, which an export frees when it needs it no more
                initializer.const_value = ir.tensor(np.array(initializer.const_value.numpy()), name=name)
    return GRAPHS[key].clone()


def key_of(network: Any, example: tuple[Any, ...], *more: Any) -> str:
    """A hash of all that the graph depends on: modules, their code, settings and tensors, and the inputs."""
    hashed = hashlib.sha256(repr((network, [(value.dtype, value.shape) for value in example], more)).encode())
    for name, module in network.named_modules():
        state = vars(module)  # a test may have replaced a method, a setting or a processor
        settings = {key: value for key, value in state.items() if isinstance(value, PLAIN)}
        forward = type(module).forward
        code = (type(module), getattr(forward, "__code__", forward), state.get("forward"), type(state.get("processor")))
        config = {key: value for key, value in getattr(module, "config", {}).items() if not key.startswith("_")}
        hashed.update(repr((name, code, settings, config)).encode())
    for tensors in (network.named_parameters(), network.named_buffers()):
        for name, value in tensors:
            hashed.update(repr((name, value.dtype, value.shape)).encode() + value.detach().numpy().tobytes())
    return hashed.hexdigest()
