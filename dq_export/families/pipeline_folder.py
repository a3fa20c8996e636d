"""Writes a pipeline's folder for optimum's ORTDiffusionPipeline: ONNX files in place of its networks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from dq_export.core.documents import shown, shown_path

from .checkpoint import CONFIG, INDEX, SCHEDULER, Checkpoint
from .encoder_graph import export_encoder
from .family import Family
from .hub import TEXTS
from .reference import ModelError
from .sampling import load_scheduler
from .text_encoders import require_prompts
from .text_parts import Part, parts_of
from .vae_graphs import export_vae

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline")
"""Classes of diffusers for text to image that optimum-onnx 0.1 supports and for whose networks a family exists."""
GRAPH = "model.onnx"
"""The graph's file in the folder of each part."""
VAE_ENCODER, VAE_DECODER = "vae_encoder", "vae_decoder"
OUTPUTS = {"transformer": "out_hidden_states", "unet": "out_sample"}
"""Optimum's name of the graph's output, by the pipeline's name of its network."""
INSTEAD = "leave out --layout, and set the pipeline's network to dq_export.load(FOLDER)"


def require_pipeline(family: Family, checkpoint: Checkpoint) -> None:
    """Check the parts of the future folder before any work.

    Raises:
        ModelError: there is no pipeline, optimum does not support it, or its parts are damaged.
    """
    place = shown_path(checkpoint.home / INDEX)
    if not checkpoint.index:
        raise ModelError(f"--layout diffusers: {place}: no such file; pass the whole pipeline's folder, or {INSTEAD}")
    if checkpoint.pipeline not in PIPELINES:
        raise ModelError(
            f"--layout diffusers: {place}: {shown(checkpoint.index.get('_class_name'))}, and the folder is for "
            f"{', '.join(PIPELINES)}; {INSTEAD}"
        )
    if present_parts(family, checkpoint):
        require_prompts(family, checkpoint, ())


def write_pipeline(
    family: Family, checkpoint: Checkpoint, config: Mapping[str, Any], graph: Path, folder: Path
) -> tuple[str, ...]:
    """Write model_index.json, the network with its configuration, and the other parts that the checkpoint has.

    Args:
        config: the network's configuration.
        graph: the network's graph.
        folder: to be made.

    Returns:
        What the folder goes without.

    Raises:
        ModelError: a part of the checkpoint is damaged.
    """
    folder.mkdir()
    _write_network(graph, OUTPUTS[family.part], _graph_path(folder, family.part, config))
    scheduler = load_scheduler(checkpoint.scheduler, family.scheduler_of(config), family.prediction)
    scheduler.save_pretrained(folder / SCHEDULER)
    index = {name: value for name, value in checkpoint.index.items() if not isinstance(value, list)}
    index |= {name: [None, None] for name, value in checkpoint.index.items() if isinstance(value, list)}
    index |= {family.part: ["diffusers", config["_class_name"]], SCHEDULER: ["diffusers", type(scheduler).__name__]}
    parts = present_parts(family, checkpoint)
    for name, part in parts.items():
        index[name] = ["transformers", part.kind]
        _write_text_part(part, checkpoint, folder / name)
    optional = family.optional.get(checkpoint.pipeline, ())
    missing = [name for name in family.encoders if name not in parts and name not in optional]
    vae = _write_vae(checkpoint, folder)
    if vae:
        index["vae"] = ["diffusers", vae]
    else:
        missing.append("vae")
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return tuple(missing)


def present_parts(family: Family, checkpoint: Checkpoint) -> dict[str, Part]:
    """Return the parts that encode prompts, by folder; empty if the checkpoint lacks one, as it may with --conditions."""
    entries = [name for name in family.encoders if checkpoint.index.get(name) not in (None, [None, None])]
    if not entries or not all((checkpoint.home / name).is_dir() for name in entries):
        return {}
    return parts_of(family, checkpoint)


def _graph_path(folder: Path, name: str, config: Mapping[str, Any]) -> Path:
    """Make a folder for a graph, write its configuration, and return the graph's path."""
    (folder / name).mkdir()
    (folder / name / CONFIG).write_text(json.dumps(dict(config), indent=2, sort_keys=True) + "\n")
    return folder / name / GRAPH


def _write_network(graph: Path, output: str, target: Path) -> None:
    """Copy a graph, with another name of its output. Weights are not read."""
    model = ir.load(graph)
    model.graph.outputs[0].name = output
    weights = {
        initializer.const_value.location
        for initializer in model.graph.initializers.values()
        if isinstance(initializer.const_value, ir.ExternalTensor)
    }
    ir.save(model, target)
    for name in weights:
        shutil.copyfile(graph.parent / name, target.parent / name)  # not a link: onnx refuses linked data


def _write_text_part(part: Part, checkpoint: Checkpoint, folder: Path) -> None:
    """Write a tokenizer's files, or an encoder's graph and configuration."""
    folder.mkdir()
    for path in sorted(part.folder.iterdir()):
        if path.is_file() and path.suffix in TEXTS and not path.name.endswith(".index.json"):
            shutil.copyfile(path, folder / path.name)
    if part.encodes:
        export_encoder(part, checkpoint, folder / GRAPH)


def _write_vae(checkpoint: Checkpoint, folder: Path) -> str:
    """Return the class of the written VAE, for encoder and decoder, as optimum needs it; empty without a VAE of that class."""
    if checkpoint.vae is None:
        return ""
    encoder, decoder = folder / VAE_ENCODER, folder / VAE_DECODER
    encoder.mkdir()
    decoder.mkdir()
    config = export_vae(checkpoint.vae, encoder / GRAPH, decoder / GRAPH, checkpoint.weights.variant)
    if config is None:
        encoder.rmdir()
        decoder.rmdir()
        return ""
    for part in (encoder, decoder):
        (part / CONFIG).write_text(json.dumps(dict(config), indent=2, sort_keys=True) + "\n")
    return str(config["_class_name"])
