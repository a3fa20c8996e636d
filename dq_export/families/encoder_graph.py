"""A pipeline's text encoder as an ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint
from .float_graph import exporting, save, trace
from .text_encoders import encoder_weights, stored_encoder
from .text_parts import Part
from .widened import widened

LONGEST = 512
"""The greatest number of tokens that the graph of an encoder without a table of positions takes."""
NAME = "encoder"
"""The prefix of the encoder's weights in the graph's names."""


def export_encoder(part: Part, checkpoint: Checkpoint, path: Path) -> None:
    """Write the graph `input_ids` int64[B, L] -> the outputs of the encoder that pipelines read, in float32.

    The first output is the class's own: `text_embeds`, or `last_hidden_state`. A CLIP also returns `hidden_states.0` to that
    before its last block, and has its own L; T5 takes any. Weights that are float32 are read from a link to their file.

    Args:
        part: the encoder.
        path: the graph's file, in an existing folder whose disk holds the weights as float32 while the graph is made.

    Raises:
        ModelError: the encoder's files are damaged, there is no room, or PyTorch's exporter fails.
    """
    import torch

    model = float_encoder(part, checkpoint, path.parent)
    length = part.config().positions
    names = _outputs(part, model.config)
    batch = torch.export.Dim("batch", min=1, max=1024)
    sizes = {0: batch} if length else {0: batch, 1: torch.export.Dim("length", min=1, max=LONGEST)}
    example = torch.zeros(2, length or LONGEST // 4, dtype=torch.int64)
    with exporting(part.kind):
        graph = trace(_wrapped(model, names), (example,), ["input_ids"], names, [sizes])
    save(graph, path, encoder_weights(part, checkpoint).files, f"{NAME}.")


def float_encoder(part: Part, checkpoint: Checkpoint, place: Path) -> Any:
    """The encoder in float32, in the form that the exporter takes.

    Args:
        place: a folder, whose disk holds weights of half precision as float32 while the encoder is used.

    Raises:
        ModelError: see `stored_encoder`, or there is no room.
    """
    import torch

    model = stored_encoder(part, checkpoint)
    state = model.state_dict()
    if any(tensor.dtype != torch.float32 for tensor in state.values()):
        model.load_state_dict(widened(state, place), assign=True)
    model.set_attn_implementation("eager")  # the exporter does not convert T5's other implementation
    return model


def _outputs(part: Part, config: Any) -> list[str]:
    """Names of the graph's outputs, made from those of transformers."""
    if part.kind.startswith("T5"):
        return ["last_hidden_state"]
    states = "last_hidden_state"
    first = ["text_embeds", states] if part.kind.endswith("WithProjection") else [states, "pooler_output"]
    return [*first, *(f"hidden_states.{index}" for index in range(config.num_hidden_layers))]


def _wrapped(model: Any, names: list[str]) -> Any:
    """The encoder with the outputs of these names, in order."""
    import torch

    class Encoder(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.add_module(NAME, model)

        def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
            (tokens,) = values
            output = getattr(self, NAME)(input_ids=tokens, output_hidden_states=len(names) > 1)
            rows: list[torch.Tensor] = []
            for name in names:
                word, _, index = name.partition(".")
                rows.append(output[word][int(index)] if index else output[word])
            return tuple(rows)

    return Encoder().eval()
