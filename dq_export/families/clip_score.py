"""The CLIP score: how well pictures fit their prompts, by a trained CLIP. Its files are the user's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from dq_export.core.documents import shown_path

from .reference import Float32, MissingPackageError, ModelError
from .tensors import read_tensors, stored

FOLDER = "clip"
"""Name of CLIP's folder in that of the metrics' weights; it holds what the hub has, for example openai/clip-vit-base-patch16."""
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
NEEDED = ("config.json", "preprocessor_config.json")
TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"))
"""Files of a tokenizer, either of which is enough."""


@dataclass(frozen=True)
class ClipScore:
    """100 times the cosine between the features of a picture and of its prompt, and 0 where that is negative.

    Source: Hessel, Holtzman, Forbes, Le Bras, Choi, "CLIPScore: a reference-free evaluation metric for image captioning", 2021,
    with torchmetrics' factor of 100; its `clip_score` gives the same numbers.
    """

    model: Any
    tokenizer: Any
    processor: Any

    @staticmethod
    def load(folder: Path) -> ClipScore:
        """Read a folder of the hub's layout.

        Raises:
            ModelError: its files do not fit each other, or a weight is not finite.
        """
        import torch
        import transformers

        # PIL's, where transformers has one for torchvision, too.
        processor = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
        tensors = read_tensors(weight_file(folder))
        try:
            model = transformers.CLIPModel(transformers.CLIPConfig.from_pretrained(folder, local_files_only=True))
            missing, _ = model.load_state_dict(tensors, strict=False)
            parts = (
                transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True),
                processor.from_pretrained(folder, local_files_only=True),
            )
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ModelError(f"{shown_path(folder)}: not a CLIP that transformers loads ({reason})") from error
        if missing:
            raise ModelError(f"{shown_path(folder)}: '{min(missing)}' is missing; copy the files again")
        broken = next((name for name, value in model.named_parameters() if not bool(torch.isfinite(value).all())), None)
        if broken is not None:
            raise ModelError(f"{shown_path(folder)}: '{broken}' has NaN or infinity; copy the files again")
        return ClipScore(model.eval(), *parts)

    def __call__(self, pictures: Float32, prompts: Sequence[str]) -> float:
        """Mean over the pictures.

        Args:
            pictures: float32[N, 1 or 3, H, W] in [-1, 1]. Grey ones count as three equal channels.
            prompts: one of each picture. CLIP reads the first 77 tokens of a longer one.
        """
        return float(np.mean([self._score(picture, prompt) for picture, prompt in zip(pictures, prompts, strict=True)]))

    def _score(self, picture: Float32, prompt: str) -> float:
        import torch

        levels = np.broadcast_to(np.rint((picture + 1) * 127.5), (3, *picture.shape[1:])).astype(np.uint8)
        pixels = self.processor(levels.transpose(1, 2, 0), input_data_format="channels_last", return_tensors="pt")
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(prompt, truncation=True, max_length=length, return_tensors="pt")
        with torch.inference_mode():
            output = self.model(**pixels, input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        cosine = torch.nn.functional.cosine_similarity(output.image_embeds, output.text_embeds)
        return max(100 * float(cosine), 0.0)


def weight_file(folder: Path) -> Path:
    """The file of the weights, safetensors where there are both."""
    return next((folder / name for name in WEIGHTS if (folder / name).exists()), folder / WEIGHTS[0])


def clip_files(folder: Path) -> list[Path]:
    """The files of CLIP below a folder of metrics' weights; none if there is no CLIP."""
    names = [*NEEDED, *WEIGHTS, *(name for files in TOKENIZERS for name in files)]
    return [path for name in names if (path := folder / FOLDER / name).is_file()]


def require_clip(folder: Path) -> None:
    """Look whether a folder has a CLIP, without reading its weights.

    Raises:
        MissingPackageError: transformers is not installed.
        ModelError: a file is missing or damaged, or is another model's.
    """
    names = {path.name for path in folder.iterdir()}
    missing = [name for name in NEEDED if name not in names]
    missing += [] if names.intersection(WEIGHTS) else [WEIGHTS[0]]
    missing += [] if any(names.issuperset(files) for files in TOKENIZERS) else [TOKENIZERS[0][0]]
    if missing:
        raise ModelError(f"{shown_path(folder)}: no {', '.join(missing)}; copy the hub's folder of a CLIP, such as ViT-B/16's")
    try:
        kind = json.loads((folder / NEEDED[0]).read_bytes())["model_type"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"{shown_path(folder / NEEDED[0])}: not the configuration of a model") from error
    if kind != "clip":
        raise ModelError(f"{shown_path(folder / NEEDED[0])}: of a model of type '{kind}', expected clip")
    stored(weight_file(folder))
    if find_spec("transformers") is None:
        raise MissingPackageError("the CLIP score needs transformers; pip install 'dq-export[text]'")
