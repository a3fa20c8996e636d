"""The text encoders of a pipeline as one ONNX graph, from token ids to the network's conditions, with their tokenizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from dq_export.core.documents import shown_path
from dq_export.deploy.triton.serving.call import suffix

from .checkpoint import Checkpoint
from .encoder_codes import quantize_encoder
from .encoder_graph import float_encoder
from .family import Family
from .float_graph import exporting, trace
from .loading import silent as quiet_diffusers
from .reference import PromptGraph
from .text_parts import Part, other, parts_of, silent

GRAPH = "model.onnx"


def export_encoders(
    family: Family, checkpoint: Checkpoint, config: Any, conditions: Sequence[str], folder: Path, bits: int | None
) -> PromptGraph:
    """Write `input_ids` and `attention_mask` int64[1, L] of each tokenizer -> the conditions of one prompt, float32.

    The inputs of the second tokenizer end with `_2`, those of the third with `_3`. Beside the graph lies a file of the package
    `tokenizers` for each: transformers' form of the checkpoint's own, with the length to which the pipeline fills texts up.

    Args:
        config: the network's configuration, as diffusers has it.
        conditions: names of the network's inputs, in the graph's order of outputs.
        bits: of the linears' weights: 8, see `quantize_encoder`; None: float32.

    Raises:
        ModelError: a part is missing or damaged, there is no room for float32, or PyTorch's exporter fails.
    """
    parts = parts_of(family, checkpoint)
    folder.mkdir(parents=True)
    loaded = {name: float_encoder(part, checkpoint, folder) for name, part in parts.items() if part.encodes}
    tokenizers = [name for name in parts if name not in loaded]
    limit, lengths = family.prompt_tokens[checkpoint.pipeline], []
    for name in tokenizers:
        lengths.append(_save_tokenizer(parts[name], parts[other(name)], limit, folder / f"{name}.json"))
    network = _wrapped(family, checkpoint.pipeline, loaded, tokenizers, config, conditions)
    with exporting(f"the text encoders of {shown_path(checkpoint.home)}"):
        graph = _traced(network, lengths, conditions)
    float_bytes = _bytes(graph)
    if bits is not None:
        quantize_encoder(graph)
    ir.save(graph, folder / GRAPH, external_data=f"{GRAPH}.data", size_threshold_bytes=1024)
    return PromptGraph(
        path=folder / GRAPH,
        tokenizers=tuple(f"{name}.json" for name in tokenizers),
        float_bytes=float_bytes,
        stored_bytes=_bytes(graph),
    )


def _bytes(model: ir.Model) -> int:
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)


def _save_tokenizer(part: Part, encoder: Part, limit: int, path: Path) -> int:
    """Write a tokenizer that fills texts up to its encoder's length, and cuts them there. Return that length."""
    from tokenizers import Tokenizer

    fast = part.tokenizer()
    length = min(int(fast.model_max_length), limit) if encoder.config().positions else limit
    with part.damage():
        tokenizer = Tokenizer.from_str(fast.backend_tokenizer.to_str())
        tokenizer.enable_truncation(length)
        tokenizer.enable_padding(direction=fast.padding_side, pad_id=fast.pad_token_id, pad_token=fast.pad_token, length=length)
        path.write_text(tokenizer.to_str(), encoding="utf-8")
    return length


def _traced(network: Any, lengths: Sequence[int], conditions: Sequence[str]) -> ir.Model:
    import torch

    names, example = [], []
    for number, length in enumerate(lengths):
        names += [name + suffix(number) for name in ("input_ids", "attention_mask")]
        example += [torch.ones(1, length, dtype=torch.int64)] * 2
    with torch.inference_mode(False), torch.no_grad(), silent(), quiet_diffusers():
        return trace(network, tuple(tensor.clone() for tensor in example), names, list(conditions), [{} for _ in names])


def _wrapped(
    family: Family, pipeline: str, encoders: Mapping[str, Any], tokenizers: Sequence[str], config: Any, conditions: Sequence[str]
) -> Any:
    import torch

    class Encoders(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            # Names of modules in a graph begin after the first part, and two encoders have modules of the same name.
            self.encoders = torch.nn.ModuleDict(encoders)

        def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
            pairs = zip(values[::2], values[1::2], strict=True)
            tokens = {name: _Tokens(*pair) for name, pair in zip(tokenizers, pairs, strict=True)}
            rows = family.embed(pipeline, {**encoders, **tokens}, [""], config)
            return tuple(rows[name] for name in conditions)

    return Encoders().eval()


class _Tokens:
    """Replaces a tokenizer in a traced pipeline, and returns the graph's inputs for every prompt."""

    def __init__(self, ids: Any, mask: Any) -> None:
        self.ids, self.mask = ids, mask
        self.model_max_length = ids.shape[-1]

    def __call__(self, texts: Any, padding: str = "", **options: Any) -> Any:
        from transformers import BatchEncoding

        if padding == "longest":  # called to warn of texts that were cut
            return BatchEncoding({"input_ids": self.ids[:, :0]})
        return BatchEncoding({"input_ids": self.ids, "attention_mask": self.mask})

    def tokenize(self, text: str) -> list[str]:
        """Return the text; pipelines call it to find tokens of textual inversion."""
        return []
