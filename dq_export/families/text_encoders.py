"""Encode prompts with a pipeline's text encoders, which are loaded for that and then freed."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np

from dq_export.core.documents import shown, shown_path
from dq_export.core.network import Conditions
from dq_export.core.progress import Advance

from ..heap import return_freed_memory
from .checkpoint import CONFIG, Checkpoint
from .config_values import refused
from .encoder_values import EncoderValues
from .family import Family
from .loading import require_same
from .loading import silent as quiet_diffusers
from .reference import ModelError
from .tensors import read_tensors, stored
from .text_parts import INSTEAD, Part, other, parts_of, silent
from .weights import TRANSFORMERS, Weights, find_weights

TOGETHER = 8
"""The number of prompts in a call."""
BLOCK = re.compile(r"\.(?:block|layers)\.(\d+)\.")
"""A part of the names of the tensors in an encoder's blocks, which are computed one after the other."""
PREFIX, POSITIONS = "text_model.", "embeddings.position_ids"
"""A prefix of the names of a CLIP's tensors, and a tensor of the numbers 0, 1, …, which old files hold."""


def require_prompts(family: Family, checkpoint: Checkpoint, prompts: Sequence[str]) -> None:
    """Check everything that encoding needs, without the encoders' weights.

    If there are several encoders, one must read the complete prompt; diffusers gives the others its beginning.

    Raises:
        ModelError: a part is missing or damaged, or a prompt is longer than its pipeline allows.
    """
    parts = parts_of(family, checkpoint)
    configs = {name: part.config() for name, part in parts.items() if part.encodes}
    for name in configs:
        encoder_weights(parts[name], checkpoint)
    limit_of_pipeline = family.prompt_tokens[checkpoint.pipeline]
    texts = ["", *map(family.written, prompts)]
    shortest: dict[int, tuple[int, int]] = {}  # by prompt: tokens beyond the limit, and the limit
    for name in sorted(parts.keys() - configs.keys()):
        reader = configs.get(other(name))
        limit = min(limit_of_pipeline, reader.positions or limit_of_pipeline) if reader else limit_of_pipeline
        for number, tokens in enumerate(_tokens(parts[name], texts, reader)):
            prompt = f"prompt {number} ({shown(prompts[number - 1])})" if number else "the empty prompt"
            if reader and max(tokens) >= reader.vocab_size:
                raise ModelError(
                    f"{shown_path(parts[name].folder)}: makes the token {max(tokens)} of {prompt}, and {other(name)} knows "
                    f"{reader.vocab_size} tokens; download both again, {INSTEAD}"
                )
            length = (len(tokens) - 1 - limit, limit)
            shortest[number] = min(length, shortest.get(number, length))
    for number, (excess, limit) in sorted(shortest.items()):
        if number and excess > 0:
            prompt = f"prompt {number} ({shown(prompts[number - 1])})"
            raise ModelError(f"{prompt}: {excess + limit} tokens, and {checkpoint.pipeline} takes {limit}; shorten it")


def _tokens(part: Part, prompts: Sequence[str], reader: EncoderValues | None) -> Iterator[list[int]]:
    """The tokens of each prompt, followed by the padding token.

    Raises:
        ModelError: the tokenizer is damaged, or pads texts to more tokens than its encoder takes.
    """
    tokenizer = part.tokenizer()
    if reader and reader.positions is not None and tokenizer.model_max_length > reader.positions:
        raise ModelError(
            f"{shown_path(part.folder)}: fills texts up to model_max_length {shown(tokenizer.model_max_length)}, and its encoder "
            f"takes {reader.positions} tokens; correct its tokenizer_config.json, {INSTEAD}"
        )
    for prompt in prompts:
        with part.damage(), silent():
            tokens = [int(token) for token in (*tokenizer(prompt).input_ids, tokenizer.pad_token_id)]
        yield tokens


def encode_prompts(
    family: Family, checkpoint: Checkpoint, config: Any, prompts: Sequence[str], device: str, progress: Advance
) -> Conditions:
    """Encode prompts; the encoders are loaded and freed.

    Args:
        config: the configuration of the network, as diffusers has it.
        device: the device of the encoders.
        progress: called with (prompts encoded, all prompts).

    Raises:
        ModelError: a part is missing or damaged.
    """
    import torch

    parts = parts_of(family, checkpoint)
    loaded = {name: _load_encoder(part, checkpoint, device) if part.encodes else part.tokenizer() for name, part in parts.items()}
    encoded: list[Conditions] = []
    for start in range(0, len(prompts), TOGETHER):
        batch = prompts[start : start + TOGETHER]
        with torch.inference_mode(), silent(), quiet_diffusers():
            encoded.append(family.encode(checkpoint.pipeline, loaded, batch, config))
        progress(start + len(batch), len(prompts), "prompts")
    loaded.clear()
    return_freed_memory()
    arrays = {name: np.concatenate([batch.arrays[name] for batch in encoded]) for name in encoded[0].arrays}
    return Conditions(names=tuple(prompts), arrays=arrays, null=encoded[0].null)


def encoder_bytes(family: Family, checkpoint: Checkpoint) -> int:
    """The memory of a pipeline's encoders: the mapped files, and the largest part in float32; see `_load_encoder`.

    Raises:
        ModelError: a part is missing or damaged.
    """
    total = 0
    for part in parts_of(family, checkpoint).values():
        converted: dict[str, int] = {}
        for file in encoder_weights(part, checkpoint).files if part.encodes else ():
            total += file.stat().st_size
            for name, place in stored(file).items():
                match = BLOCK.search(name)
                block = match[1] if match else ""
                converted[block] = converted.get(block, 0) + (0 if place.float32 else 4 * math.prod(place.shape))
        outside = converted.pop("", 0)
        total += outside + max(converted.values(), default=0)
    return total


def encoder_weights(part: Part, checkpoint: Checkpoint) -> Weights:
    """The files of an encoder's weights, of the network's variant where it has that."""
    return find_weights(part.folder, checkpoint.weights.variant, required=False, stem=TRANSFORMERS)


def _load_encoder(part: Part, checkpoint: Checkpoint, device: str) -> Any:
    """The encoder of `stored_encoder`; it computes in float32.

    Float16, in which T5 is often stored, is too narrow for the activations of T5, and bfloat16 would lose digits of every
    condition. So the blocks are converted one at a time, while they run, which takes the memory of one block in float32.
    """
    import torch

    model = stored_encoder(part, checkpoint)
    blocks = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    _compute_in_float32(model, blocks, device)
    return model


def stored_encoder(part: Part, checkpoint: Checkpoint) -> Any:
    """The encoder in evaluation mode, with its weights mapped in the type of the files.

    Raises:
        ModelError: its files are missing, damaged, or do not fit each other.
    """
    import transformers
    from accelerate import init_empty_weights

    config, kind = part.config(), getattr(transformers, part.kind)
    makes_none = f"{shown_path(part.folder / CONFIG)}: makes no {part.kind}"
    with refused(makes_none, f"download it again, {INSTEAD}"), silent(), init_empty_weights():
        model = kind(kind.config_class(**config.model_dump()))
    names = model.state_dict().keys()
    state: dict[str, Any] = {}
    for file in encoder_weights(part, checkpoint).files:
        state |= {_todays_name(name, names): tensor for name, tensor in read_tensors(file).items()}
    for name in [name for name in state if name.endswith(POSITIONS)]:
        del state[name]
    for name, source in (model._tied_weights_keys or {}).items():
        if name in state or source in state:  # files hold one of the two, or both
            state[name] = state[source] = state.get(source, state.get(name))
    require_same(model.state_dict(), state, shown_path(part.folder))
    model.load_state_dict(state, assign=True)
    return model.eval()


def _todays_name(name: str, names: Collection[str]) -> str:
    """The present name of a file's tensor: transformers 5 drops the prefix that a CLIPTextModel's parts have in files."""
    return next((form for form in (name, name.removeprefix(PREFIX), PREFIX + name) if form in names), name)


def _compute_in_float32(model: Any, blocks: Sequence[Any], device: str) -> None:
    import torch

    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in inside:
            parameter.data = parameter.data.to(device, torch.float32)
    for block in blocks:
        stored = [(parameter, parameter.data) for parameter in block.parameters()]

        def convert(module: Any, inputs: Any, stored: Any = stored) -> None:
            for parameter, data in stored:
                parameter.data = data.to(device, torch.float32)

        def restore(module: Any, inputs: Any, output: Any, stored: Any = stored) -> None:
            for parameter, data in stored:
                parameter.data = data

        block.register_forward_pre_hook(convert)
        block.register_forward_hook(restore)
