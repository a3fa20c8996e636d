"""The config.pbtxt of each model of a repository."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import onnx_ir as ir

from ..check.operand import shape_of
from .serving.call import LABELS, NEGATIVE, Call
from .serving.conditions import PROMPT
from .serving.health import PROBES_KEY
from .serving.model import PARAMETERS
from .serving.schedules import Schedules
from .serving.sizes import Sizes

DENOISER, DECODER, PIPELINE, STREAM, HEALTH = "denoiser", "decoder", "pipeline", "pipeline_stream", "health"
ENCODER = "text_encoder"
MAX_ROWS = 16
"""Rows of a network call, unless a plan sets another limit; a guided picture takes two. More gained nothing on a CPU."""
MAX_REQUESTS, CALLS = 64, 2
MODEL = "model.onnx"
"""The file name of a graph."""
NO_SHAPES: Mapping[str, Sequence[int]] = MappingProxyType({})
TYPES = {ir.DataType.FLOAT: "TYPE_FP32", ir.DataType.FLOAT16: "TYPE_FP16", ir.DataType.INT64: "TYPE_INT64"}
Config = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Served:
    """The files and settings of one repository.

    Args:
        backend: Triton's backend, `onnxruntime` or `tensorrt`.
        model: the graph, with its external data beside it.
        plan: the TensorRT plan; None if the backend is another, or if `finish` builds the plan later.
        call: names and types of the network's tensors.
        shapes: shape of one sample by input of the network, at the default size; empty for a scalar.
        latents: (C, H, W) of one picture's latents at the default size.
        sizes: the sizes of pictures that requests may ask for.
        encoder: folder with the text encoder's graph, its data and its tokenizers. They are moved into the repository.
            None: requests hold class labels, or embeddings that their clients make.
        decoder: the VAE's graph, in a folder with only its data. The folder's files are moved into the repository. None: no VAE.
        pictures: whether the latents themselves are pictures of 1 or 3 channels in [-1, 1].
        max_rows: the greatest batch of a network call.
        classes: number of labels without the null label; 0: no labels.
        steps, guidance, scheduler: defaults of requests.
        prompts: prompts of the export, for the examples of the README.
    """

    backend: str
    model: Path
    plan: Path | None
    call: Call
    shapes: Mapping[str, Sequence[int]]
    latents: Sequence[int]
    sizes: Sizes
    encoder: Path | None
    decoder: Path | None
    pictures: bool
    max_rows: int
    classes: int
    steps: int
    guidance: float
    scheduler: str
    schedules: Schedules
    prompts: Sequence[str] = ()

    @property
    def max_images(self) -> int:
        """The most pictures of one request: as many guided pictures as fit into one call."""
        return max(1, self.max_rows // self.call.rows_of_picture)

    @property
    def shared(self) -> set[str]:
        """Inputs of the denoiser without a row for each picture."""
        return set() if self.call.batched else {*self.call.picture_positions, *self.call.text_positions}

    @property
    def largest(self) -> Sequence[int]:
        """(C, H, W) of the greatest latents of a request."""
        return [self.latents[0], *self.sizes.latents(self.sizes.height.maximum, self.sizes.width.maximum)]

    def opened(self, dims: Sequence[int]) -> list[int]:
        """The dims (C, H, W) of latents with -1 for the sides that requests choose."""
        sides = (self.sizes.height, self.sizes.width)
        return [dims[0], *(-1 if side.varies else size for side, size in zip(sides, dims[1:], strict=True))]

    def condition_inputs(self) -> list[tuple[str, str, Sequence[int]]]:
        """Name, type and dims of a request's condition inputs. Those of prompts and embeddings are all optional."""
        if self.call.labels:
            return [(LABELS, "TYPE_INT64", [1])]
        inputs: list[tuple[str, str, Sequence[int]]] = []
        for prefix in ("", NEGATIVE) if self.call.guided_by == "null" else ("",):
            inputs += [(prefix + PROMPT, "TYPE_STRING", [1])] if self.encoder else []
            inputs += [(prefix + name, "TYPE_FP32", self.shapes[key]) for key, name in self.call.conditions.items()]
        return inputs


def denoiser_config(served: Served, graph: ir.Graph, kind: str) -> Config:
    """Return the denoiser's config. With inputs that all rows of a call share, the batch is a dimension of the others."""
    if served.call.batched:
        config = network_config(DENOISER, graph, served.backend, kind, served.max_rows, served.shapes)
        return open_tokens(config, served) if served.call.tokens else open_latents(config, served.call.state, served)
    rows = {name: [*shape] if name in served.shared else [-1, *shape] for name, shape in served.shapes.items()}
    return open_tokens(network_config(DENOISER, graph, served.backend, kind, 0, rows), served)


def open_tokens(config: Config, served: Served) -> Config:
    """Return a denoiser's config whose tokens of a picture have the number of requests."""
    if not served.sizes.vary:
        return config
    call, first = served.call, 0 if served.call.batched else 1
    axes = {call.state: first, **dict.fromkeys(call.picture_positions, 0)}
    inputs = []
    for item in config["input"]:
        axis = axes.get(item["name"])
        inputs.append({**item, "dims": [-1 if index == axis else size for index, size in enumerate(item["dims"])]})
    return {**config, "input": inputs}


def network_config(
    name: str, graph: ir.Graph, backend: str, kind: str, max_rows: int, shapes: Mapping[str, Sequence[int]] = NO_SHAPES
) -> Config:
    """Return the config of one network: the graph's tensors, one instance, no queue delay, warm-up with 1 and `max_rows` rows.

    Args:
        max_rows: the greatest batch; 0: the graph has no batch axis that varies, and the config's dims are the graph's.
        shapes: shape of one sample by input; inputs that are left out get the graph's dims. A warm-up has 1 in place of -1.
    """
    batched = max_rows > 0
    inputs = [_tensor(value, batched, shapes.get(str(value.name))) for value in graph.inputs]
    outputs = [_tensor(value, batched) for value in graph.outputs]

    def warm_up(rows: int) -> Config:
        samples = {}
        for item in inputs:
            content = "random_data" if "FP" in item["data_type"] else "zero_data"
            dims = [abs(size) for size in item["dims"]]
            samples[item["name"]] = {"data_type": item["data_type"], "dims": dims, content: True}
        return {"name": f"batch {rows}", "batch_size": rows, "inputs": samples}

    config = {
        "name": name,
        "backend": backend,
        "max_batch_size": max_rows,
        "input": inputs,
        "output": outputs,
        "instance_group": [{"count": 1, "kind": kind}],
        "model_warmup": [warm_up(rows) for rows in sorted({1, max(1, max_rows)})],
    }
    return {**config, "dynamic_batching": {"max_queue_delay_microseconds": 0}} if batched else config


def open_latents(config: Config, name: str, served: Served) -> Config:
    """Return a network's config whose input `name`, the latents, has the sizes of requests. The warm-up keeps the default."""
    inputs = [{**item, "dims": served.opened(item["dims"])} if item["name"] == name else item for item in config["input"]]
    return {**config, "input": inputs}


def pipeline_config(name: str, served: Served, image: Sequence[int]) -> Config:
    """Return the config of a model that samples whole pictures. A request is a batch of pictures.

    All inputs' dims are fixed and the batch has a maximum, so the server refuses any other shape before the program sees it.

    Args:
        image: (H, W, C) of the pictures, -1 for a side that requests choose; empty if the model gives latents alone.
    """
    streams, shape = name == STREAM, served.latents
    inputs = [*served.condition_inputs(), ("seed", "TYPE_UINT64", [1]), ("num_inference_steps", "TYPE_INT32", [1])]
    inputs += [("guidance_scale", "TYPE_FP32", [1]), ("scheduler", "TYPE_STRING", [1]), ("latents", "TYPE_FP32", [*shape])]
    inputs += [("height", "TYPE_INT32", [1]), ("width", "TYPE_INT32", [1])]
    outputs = [("latents", "TYPE_FP32", served.opened(shape)), ("seed", "TYPE_UINT64", [1])]
    outputs += [("images", "TYPE_UINT8", [*image])] if image else []
    if streams:
        inputs, outputs = [*inputs, ("preview_every", "TYPE_INT32", [1])], [*outputs, ("step", "TYPE_INT32", [1])]
    values = {
        "denoiser": DENOISER, "decoder": DECODER if served.decoder else "",
        "text_encoder": ENCODER if served.encoder else "", "classes": served.classes,
        "max_rows": served.max_rows, "max_requests": MAX_REQUESTS, "denoiser_calls": CALLS,
        "num_inference_steps": served.steps, "guidance_scale": served.guidance, "scheduler": served.scheduler,
        "schedulers": ",".join(served.schedules.tables), **served.sizes.parameters,
    }  # fmt: skip
    config = {
        "name": name,
        "backend": "python",
        "max_batch_size": served.max_images,
        "input": [
            {"name": key, "data_type": kind, "dims": [*dims], **({} if key == LABELS else {"optional": True})}
            for key, kind, dims in inputs
        ],
        "output": [{"name": key, "data_type": kind, "dims": dims} for key, kind, dims in outputs],
        "instance_group": [{"count": 1, "kind": "KIND_CPU"}],
        "parameters": {key: {"string_value": str(values[key])} for key in PARAMETERS},
    }
    return {**config, "model_transaction_policy": {"decoupled": True}} if streams else config


def health_config(served: Served) -> Config:
    """Return the config of the model `health`, which sends every other model a small request."""
    call, shapes = served.call, served.shapes
    kinds = {"timestep": call.timestep, **(dict.fromkeys(call.conditions, "int64") if call.labels else {})}
    if served.encoder:
        request = {PROMPT: ["bytes", [1, 1]]}
    else:
        request = {name: [kinds.get(key, "float32"), [1, *(shapes[key] or [1])]] for key, name in call.conditions.items()}
        request["guidance_scale"] = ["float32", [1, 1]]  # a one, without which the negative embeddings would be missing
    scalar = [1] if call.batched else []  # see `_tensor`
    state = {
        name: [kinds.get(name, "float32"), [*shape] if name in served.shared else [1, *(shape or scalar)]]
        for name, shape in shapes.items()
    }
    probes = [[name, "seed", request] for name in (PIPELINE, STREAM)]
    probes.append([DENOISER, call.output, state])
    if served.encoder:
        graph = ir.load(served.encoder / MODEL).graph
        tokens = {str(value.name): ["int64", [int(size or 0) for size in shape_of(value)]] for value in graph.inputs}
        probes.append([ENCODER, next(iter(call.conditions)), tokens])
    return {
        "name": HEALTH,
        "backend": "python",
        "input": [{"name": "probe", "data_type": "TYPE_BOOL", "dims": [1]}],
        "output": [{"name": "healthy", "data_type": "TYPE_BOOL", "dims": [1]}],
        "instance_group": [{"count": 1, "kind": "KIND_CPU"}],
        "parameters": {PROBES_KEY: {"string_value": json.dumps(probes)}},
    }


def dump(config: Config) -> str:
    """Return a config as the text of config.pbtxt."""
    from google.protobuf import json_format, text_format
    from tritonclient.grpc import model_config_pb2

    return str(text_format.MessageToString(json_format.ParseDict(config, model_config_pb2.ModelConfig())))


def _tensor(value: ir.Value, batched: bool, shape: Sequence[int] | None = None) -> dict[str, Any]:
    """Return a config's entry with the dims of one sample. A scalar has dims [1], reshaped to the graph's empty shape."""
    assert value.dtype is not None
    assert value.name is not None
    dims = [size or -1 for size in shape_of(value)[batched:]] if shape is None else [*shape]
    entry: dict[str, Any] = {"name": value.name, "data_type": TYPES[value.dtype], "dims": dims or [1]}
    return entry if dims else {**entry, "reshape": {"shape": []}}
