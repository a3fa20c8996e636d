"""LPIPS: how different two pictures look, by the features of a trained AlexNet. Its weights are the user's files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dq_export.core.documents import shown_path

from .reference import Float32, ModelError
from .tensors import read_tensors, stored

SUFFIXES = (".safetensors", ".pth")
LINEAR = "alex"
"""Name of lpips' own file, which is also in torchmetrics' package."""
BACKBONE = "alexnet"
"""How the name of torchvision's file starts."""
LAYERS = ((0, 3, 64, 11), (3, 64, 192, 5), (6, 192, 384, 3), (8, 384, 256, 3), (10, 256, 256, 3))
"""Index in torchvision's `features`, channels in, channels out and kernel of AlexNet's convolutions."""
POOLED = (3, 6)
"""Convolutions with a max-pool before them."""
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Mean and deviation of ImageNet's pixels, for pictures in [-1, 1]."""
LEAST_SIDE = 64
"""Pixels. A smaller picture is enlarged by a whole factor, since AlexNet has no features of it."""
EPSILON = 1e-8


@dataclass(frozen=True)
class Lpips:
    """The distance; 0 of equal pictures.

    Args:
        weights: torch float32 tensors by name.
    """

    weights: Mapping[str, Any]

    @staticmethod
    def load(folder: Path) -> Lpips:
        """Read the weights.

        Raises:
            ModelError: see `require_weights`, and weights that are not finite.
        """
        import torch

        expected = _expected()
        backbone, linear = weight_files(folder)
        tensors = {**read_tensors(backbone), **read_tensors(linear)}
        weights = {name: tensors[name].to(torch.float32) for name in expected}
        broken = next((name for name, value in weights.items() if not bool(torch.isfinite(value).all())), None)
        if broken is not None:
            raise ModelError(f"{shown_path(folder)}: '{broken}' has NaN or infinity; copy the files again")
        return Lpips(weights)

    def __call__(self, references: Float32, pictures: Float32) -> float:
        """Mean over the pictures.

        Args:
            references, pictures: float32[N, 1 or 3, H, W] in [-1, 1]. Grey ones count as three equal channels.

        Source: Zhang, Isola, Efros, Shechtman, Wang, "The unreasonable effectiveness of deep features as a perceptual
        metric", 2018; torchmetrics' `learned_perceptual_image_patch_similarity` gives the same numbers.
        """
        import torch

        with torch.inference_mode():
            return float(np.mean([self._distance(_tensor(x), _tensor(y)) for x, y in zip(references, pictures, strict=True)]))

    def _distance(self, reference: Any, picture: Any) -> float:
        total = 0.0
        for index, (exact, other) in enumerate(zip(self._features(reference), self._features(picture), strict=True)):
            difference = (_normalized(exact) - _normalized(other)) ** 2
            total += float((difference * self.weights[f"lin{index}.model.1.weight"]).sum(dim=1).mean())
        return total

    def _features(self, picture: Any) -> Iterator[Any]:
        """Return the outputs of AlexNet's convolutions for float32[1, 3, H, W]."""
        import torch
        from torch.nn import functional

        shift, scale = (torch.tensor(values)[None, :, None, None] for values in (SHIFT, SCALE))
        values = (picture - shift) / scale
        for index, _, _, kernel in LAYERS:
            if index in POOLED:
                values = functional.max_pool2d(values, 3, 2)
            weight, bias = (self.weights[f"features.{index}.{part}"] for part in ("weight", "bias"))
            stride, padding = (4, 2) if index == 0 else (1, kernel // 2)
            values = functional.relu(functional.conv2d(values, weight, bias, stride, padding))
            yield values


def weight_files(folder: Path) -> tuple[Path, Path]:
    """The files of AlexNet and of the linear weights.

    Raises:
        ModelError: the folder has none of a kind, or several.
    """
    return _file(folder, BACKBONE), _file(folder, LINEAR)


def require_weights(folder: Path) -> None:
    """Look whether a folder has the weights, without reading them.

    Raises:
        ModelError: a file is missing or damaged, or its tensors are other ones; the message says what is expected.
    """
    for file, start in zip(weight_files(folder), ("features", "lin"), strict=True):
        places = stored(file)
        for tensor, shape in _expected().items():
            if not tensor.startswith(start):
                continue
            if tensor not in places or places[tensor].shape != shape:
                state = f"has shape {list(places[tensor].shape)}" if tensor in places else "is missing"
                raise ModelError(f"{shown_path(file)}: '{tensor}' {state}, expected {list(shape)}")


def _expected() -> dict[str, tuple[int, ...]]:
    """Shape of each tensor by name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for number, (index, entering, leaving, kernel) in enumerate(LAYERS):
        shapes[f"features.{index}.weight"] = (leaving, entering, kernel, kernel)
        shapes[f"features.{index}.bias"] = (leaving,)
        shapes[f"lin{number}.model.1.weight"] = (1, leaving, 1, 1)
    return shapes


def _file(folder: Path, name: str) -> Path:
    """The only file of a name in a folder; torchvision's file has a digest behind it."""
    if not os.path.isdir(folder):  # which, unlike Path.is_dir, takes any name
        raise ModelError(f"metric_weights {shown_path(folder)}: no such folder")
    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    fitting = [path for path in files if path.stem == name or (name == BACKBONE and path.stem.startswith(f"{name}-"))]
    if len(fitting) != 1:
        text = "torchvision's AlexNet, alexnet-owt-7be5be79.pth" if name == BACKBONE else "the linear weights of lpips, alex.pth"
        problem = f"{len(fitting)} files of" if fitting else "no file of"
        raise ModelError(f"metric_weights {shown_path(folder)}: {problem} {text}; expected one, as .pth or .safetensors")
    return fitting[0]


def _normalized(features: Any) -> Any:
    return features / (EPSILON + (features**2).sum(dim=1, keepdim=True)).sqrt()


def _tensor(picture: Float32) -> Any:
    """float32[1 or 3, H, W] -> torch float32[1, 3, H, W], large enough for AlexNet."""
    import torch

    factor = -(-LEAST_SIDE // min(picture.shape[1:]))
    large = picture.repeat(factor, axis=1).repeat(factor, axis=2)
    return torch.from_numpy(np.array(np.broadcast_to(large, (3, *large.shape[1:])))[None])
