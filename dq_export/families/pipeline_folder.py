"""A pipeline's folder as optimum's ORTDiffusionPipeline loads it: ONNX files in the place of its networks."""

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
"""Of diffusers' classes those that optimum-onnx 0.1 draws with and a family has networks for."""
GRAPH = "model.onnx"
"""In the folder of each part."""
VAE_ENCODER, VAE_DECODER = "vae_encoder", "vae_decoder"
OUTPUTS = {"transformer": "out_hidden_states", "unet": "out_sample"}
"""By a pipeline's name of its network, optimum's name of the graph's output."""
INSTEAD = "leave out --layout, and set the pipeline's network to dq_export.load(FOLDER)"


def require_pipeline(family: Family, checkpoint: Checkpoint) -> None:
    """Look at what a folder will be made of, before any work.

    Raises:
        ModelError: no pipeline, one that optimum does not draw with, or one with damaged parts.
    """
    where = shown_path(checkpoint.home / INDEX)
    if not checkpoint.index:
        raise ModelError(f"--layout diffusers: {where}: no such file; pass the whole pipeline's folder, or {INSTEAD}")
    if checkpoint.pipeline not in PIPELINES:
        raise ModelError(
            f"--layout diffusers: {where}: {shown(checkpoint.index.get('_class_name'))}, and optimum draws with "
            f"{', '.join(PIPELINES)}; {INSTEAD}"
        )
    if present_parts(family, checkpoint):
        require_prompts(family, checkpoint, ())


def write_pipeline(
    family: Family, checkpoint: Checkpoint, config: Mapping[str, Any], graph: Path, folder: Path
) -> tuple[str, ...]:
    """Write model_index.json, the network with its configuration, and all that the checkpoint has of the rest.

    Args:
        config: of the network.
        graph: of the network.
        folder: to be made.

    Returns:
        What the folder goes without.

    Raises:
        ModelError: a part of the checkpoint is damaged.
    """
    folder.mkdir()
    _write_network(graph, OUTPUTS[family.part], _made(folder, family.part, config))
    scheduler = load_scheduler(checkpoint.scheduler, family.scheduler_of(config), family.prediction)
    scheduler.save_pretrained(folder / SCHEDULER)
    index = {name: value for name, value in checkpoint.index.items() if not isinstance(value, list)}
    index |= {name: [None, None] for name, value in checkpoint.index.items() if isinstance(value, list)}
    index |= {family.part: ["diffusers", config["_class_name"]], SCHEDULER: ["diffusers", type(scheduler).__name__]}
    parts = present_parts(family, checkpoint)
    for name, part in parts.items():
        index[name] = ["transformers", part.kind]
        _write_text_part(part, checkpoint, folder / name)
    missing = [name for name in family.encoders if name not in parts and name not in family.optional]
    vae = _write_vae(checkpoint, folder)
    if vae:
        index["vae"] = ["diffusers", vae]
    else:
        missing.append("vae")
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return tuple(missing)


def present_parts(family: Family, checkpoint: Checkpoint) -> dict[str, Part]:
    """By folder, what encodes prompts; empty where the checkpoint lacks some of it, as it may with --conditions."""
    entries = [name for name in family.encoders if checkpoint.index.get(name) not in (None, [None, None])]
    if not entries or not all((checkpoint.home / name).is_dir() for name in entries):
        return {}
    return parts_of(family, checkpoint)


def _made(folder: Path, name: str, config: Mapping[str, Any]) -> Path:
    """The path of a graph in a folder that is made for it, its configuration beside it."""
    (folder / name).mkdir()
    (folder / name / CONFIG).write_text(json.dumps(dict(config), indent=2, sort_keys=True) + "\n")
    return folder / name / GRAPH


def _write_network(graph: Path, output: str, target: Path) -> None:
    """The graph with another name of its output; weights are not read."""
    model = ir.load(graph)
    model.graph.outputs[0].name = output
    weights = {
        initializer.const_value.location
        for initializer in model.graph.initializers.values()
        if isinstance(initializer.const_value, ir.ExternalTensor)
    }
    ir.save(model, target)
    for name in weights:
        shutil.copyfile(graph.parent / name, target.parent / name)  # no link: onnx would refuse both


def _write_text_part(part: Part, checkpoint: Checkpoint, folder: Path) -> None:
    """A tokenizer's files, or an encoder's graph and configuration."""
    folder.mkdir()
    for path in sorted(part.folder.iterdir()):
        if path.is_file() and path.suffix in TEXTS and not path.name.endswith(".index.json"):
            shutil.copyfile(path, folder / path.name)
    if part.encodes:
        export_encoder(part, checkpoint, folder / GRAPH)


def _write_vae(checkpoint: Checkpoint, folder: Path) -> str:
    """The class of the VAE that was written, twice, as optimum has it; empty where there is none, or another one."""
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
