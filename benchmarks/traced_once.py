"""Equal networks go through PyTorch's exporter once in a run of the tests or the fuzzer: it takes half of a small export."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from made_once import made_once

from dq_export.families import torch_export

GRAPHS: dict[str, ir.Model] = {}
"""What the exporter made, by `key_of` what it was called with."""
PRODUCTS = torch_export.trace
PLAIN = (bool, int, float, str, tuple, list, type(None))


class TracedOnce:
    """Calls the product's `trace` in one process for all equal networks; the other processes read its graph.

    Args:
        root: the folder of the graphs, the same for all processes.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def trace(
        self, network: Any, example: tuple[Any, ...], inputs: list[str], outputs: list[str], dynamic: Sequence[Any]
    ) -> ir.Model:
        """As the product's. Each caller gets a graph of its own, with copies of the first network's weights."""
        key = key_of(network, example, inputs, outputs, dynamic)

        def write(folder: Path) -> None:
            folder.mkdir()
            ir.save(PRODUCTS(network, example, inputs, outputs, dynamic), folder / "graph.onnx")

        if key not in GRAPHS:
            GRAPHS[key] = ir.load(made_once(self.root, f"traced-{key[:16]}", write) / "graph.onnx")
            for name, initializer in GRAPHS[key].graph.initializers.items():
                if initializer.const_value is not None:  # an array, as the exporter gives
                    initializer.const_value = ir.tensor(np.array(initializer.const_value.numpy()), name=name)
        return GRAPHS[key].clone()


def key_of(network: Any, example: tuple[Any, ...], *more: Any) -> str:
    """A hash of all that the graph depends on: modules, their code, settings and tensors, and the inputs."""
    hashed = hashlib.sha256(repr((network, [(value.dtype, value.shape) for value in example], more)).encode())
    for name, module in network.named_modules():
        state = vars(module)  # a test may have replaced a method, a setting or a processor
        settings = {key: value for key, value in state.items() if isinstance(value, PLAIN)}
        code = (type(module), code_of(type(module).forward), state.get("forward"), type(state.get("processor")))
        config = {key: value for key, value in getattr(module, "config", {}).items() if not key.startswith("_")}
        hashed.update(repr((name, code, settings, config)).encode())
    for tensors in (network.named_parameters(), network.named_buffers()):
        for name, value in tensors:
            hashed.update(repr((name, value.dtype, value.shape)).encode() + value.detach().numpy().tobytes())
    return hashed.hexdigest()


def code_of(function: Any) -> Any:
    """What a function does, without its address, which differs between processes."""
    code = getattr(function, "__code__", None)
    return function if code is None else (code.co_filename, code.co_firstlineno, code.co_code, code.co_names, code.co_varnames)
