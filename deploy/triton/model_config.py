"""What a repository serves, as the config.pbtxt of each of its models."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import onnx_ir as ir

from ..check.operand import shape_of
from .serving.call import NEGATIVE, Call
from .serving.conditions import PROMPT
from .serving.health import ASKED
from .serving.model import PARAMETERS
from .serving.schedules import Schedules

DENOISER, DECODER, PIPELINE, STREAM, HEALTH = "denoiser", "decoder", "pipeline", "pipeline_stream", "health"
ENCODER = "text_encoder"
MOST_ROWS = 16
"""Of a network call, where no plan sets another: a guided picture is two. Measured: larger gains nothing on a processor."""
MOST_REQUESTS, CALLS = 64, 2
MODEL = "model.onnx"
"""A graph's file."""
NO_SHAPES: Mapping[str, Sequence[int]] = MappingProxyType({})
TYPES = {ir.DataType.FLOAT: "TYPE_FP32", ir.DataType.FLOAT16: "TYPE_FP16", ir.DataType.INT64: "TYPE_INT64"}
Config = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Served:
    """What is served, and how it is asked for.

    Args:
        backend: Triton's: `onnxruntime` or `tensorrt`.
        model: the graph, with its external data beside it.
        plan: for tensorrt; None where it is still to be built, with `finish`.
        call: how the network is called.
        shapes: by input of the network, one sample's shape; empty: a number.
        encoder: the folder of the text encoder's graph, its data and its tokenizers, which are moved into the repository;
            None: pictures are of class labels.
        decoder: the VAE's graph, alone with its data in a folder, which is moved into the repository; None: there is none.
        pictures: whether latents are pictures themselves, of 1 or 3 channels in [-1, 1].
        most_rows: the greatest batch of a network call.
        classes: number of labels without the null label; 0: there are none.
        steps, guidance, scheduler: what a request gets that does not say.
        prompts: that the export drew, for examples.
    """

    backend: str
    model: Path
    plan: Path | None
    call: Call
    shapes: Mapping[str, Sequence[int]]
    encoder: Path | None
    decoder: Path | None
    pictures: bool
    most_rows: int
    classes: int
    steps: int
    guidance: float
    scheduler: str
    schedules: Schedules
    prompts: Sequence[str] = ()

    @property
    def most_images(self) -> int:
        """Of a request: so many guided pictures fit into one call."""
        return max(1, self.most_rows // 2)

    @property
    def latents(self) -> Sequence[int]:
        """(C, H, W) of one picture's."""
        return self.shapes[self.call.state]

    def asked(self) -> list[tuple[str, str, Sequence[int]]]:
        """Name, type and dims of what a request asks for a picture with; none of it, or some of it, where there are texts."""
        if self.encoder is None:
            return [(name, "TYPE_INT64", [1]) for name in self.call.conditions.values()]
        given: list[tuple[str, str, Sequence[int]]] = []
        for front in ("", NEGATIVE):
            given.append((front + PROMPT, "TYPE_STRING", [1]))
            given += [(front + name, "TYPE_FP32", self.shapes[key]) for key, name in self.call.conditions.items()]
        return given


def network_config(
    name: str, graph: ir.Graph, backend: str, kind: str, most_rows: int, shapes: Mapping[str, Sequence[int]] = NO_SHAPES
) -> Config:
    """A model of one network: inputs and outputs of the graph, one instance, no queue delay, warmed up with 1 and most rows.

    Args:
        most_rows: 0: the graph takes one row alone, and its dims are those of the config.
        shapes: by input, one sample's shape; dims of the graph where they are left out.
    """
    batched = most_rows > 0
    inputs = [_tensor(value, batched, shapes.get(str(value.name))) for value in graph.inputs]
    outputs = [_tensor(value, batched) for value in graph.outputs]

    def warm_up(rows: int) -> Config:
        given = {}
        for item in inputs:
            filled = "random_data" if "FP" in item["data_type"] else "zero_data"
            given[item["name"]] = {"data_type": item["data_type"], "dims": item["dims"], filled: True}
        return {"name": f"batch {rows}", "batch_size": rows, "inputs": given}

    config = {
        "name": name,
        "backend": backend,
        "max_batch_size": most_rows,
        "input": inputs,
        "output": outputs,
        "instance_group": [{"count": 1, "kind": kind}],
        "model_warmup": [warm_up(rows) for rows in sorted({1, max(1, most_rows)})],
    }
    return {**config, "dynamic_batching": {"max_queue_delay_microseconds": 0}} if batched else config


def pipeline_config(name: str, served: Served, image: Sequence[int]) -> Config:
    """A model that samples whole pictures: a batch of them is a request.

    All dims are fixed and the batch has a maximum, so that the server refuses any other shape before it reaches the program.

    Args:
        image: (H, W, C) of the pictures; empty where there are none.
    """
    streams, shape = name == STREAM, served.latents
    given = [*served.asked(), ("seed", "TYPE_UINT64", [1]), ("num_inference_steps", "TYPE_INT32", [1])]
    given += [("guidance_scale", "TYPE_FP32", [1]), ("scheduler", "TYPE_STRING", [1]), ("latents", "TYPE_FP32", [*shape])]
    made = [("latents", "TYPE_FP32", [*shape]), ("seed", "TYPE_UINT64", [1])]
    made += [("images", "TYPE_UINT8", [*image])] if image else []
    if streams:
        given, made = [*given, ("preview_every", "TYPE_INT32", [1])], [*made, ("step", "TYPE_INT32", [1])]
    values = {
        "denoiser": DENOISER, "decoder": DECODER if served.decoder else "",
        "text_encoder": ENCODER if served.encoder else "", "classes": served.classes,
        "max_rows": served.most_rows, "max_requests": MOST_REQUESTS, "denoiser_calls": CALLS,
        "num_inference_steps": served.steps, "guidance_scale": served.guidance, "scheduler": served.scheduler,
        "schedulers": ",".join(served.schedules.tables),
    }  # fmt: skip
    config = {
        "name": name,
        "backend": "python",
        "max_batch_size": served.most_images,
        "input": [
            {"name": key, "data_type": kind, "dims": [*dims], **({} if key == "class_labels" else {"optional": True})}
            for key, kind, dims in given
        ],
        "output": [{"name": key, "data_type": kind, "dims": dims} for key, kind, dims in made],
        "instance_group": [{"count": 1, "kind": "KIND_CPU"}],
        "parameters": {key: {"string_value": str(values[key])} for key in PARAMETERS},
    }
    return {**config, "model_transaction_policy": {"decoupled": True}} if streams else config


def health_config(served: Served) -> Config:
    """A model that asks the others whether they answer."""
    call, shapes = served.call, served.shapes
    first = {PROMPT: ["bytes", [1, 1]]} if served.encoder else {"class_labels": ["int64", [1, 1]]}
    state = {call.state: ["float32", [1, *served.latents]], "timestep": [call.timestep, [1, 1]]}
    kind = "float32" if served.encoder else "int64"
    state |= {name: [kind, [1, *(shapes[name] or [1])]] for name in call.conditions}
    asked = [[name, "seed", first] for name in (PIPELINE, STREAM)]
    asked.append([DENOISER, call.output, state])
    if served.encoder:
        graph = ir.load(served.encoder / MODEL).graph
        tokens = {str(value.name): ["int64", [int(size or 0) for size in shape_of(value)]] for value in graph.inputs}
        asked.append([ENCODER, next(iter(call.conditions)), tokens])
    return {
        "name": HEALTH,
        "backend": "python",
        "input": [{"name": "probe", "data_type": "TYPE_BOOL", "dims": [1]}],
        "output": [{"name": "healthy", "data_type": "TYPE_BOOL", "dims": [1]}],
        "instance_group": [{"count": 1, "kind": "KIND_CPU"}],
        "parameters": {ASKED: {"string_value": json.dumps(asked)}},
    }


def dump(config: Config) -> str:
    """The text of config.pbtxt."""
    from google.protobuf import json_format, text_format
    from tritonclient.grpc import model_config_pb2

    return str(text_format.MessageToString(json_format.ParseDict(config, model_config_pb2.ModelConfig())))


def _tensor(value: ir.Value, batched: bool, shape: Sequence[int] | None = None) -> dict[str, Any]:
    """A config's entry: dims are of one sample; a number a sample is [1] there and no dimension in the graph."""
    assert value.dtype is not None
    assert value.name is not None
    dims = [size or -1 for size in shape_of(value)[batched:]] if shape is None else [*shape]
    entry: dict[str, Any] = {"name": value.name, "data_type": TYPES[value.dtype], "dims": dims or [1]}
    return entry if dims else {**entry, "reshape": {"shape": []}}
