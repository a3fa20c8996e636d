"""Pictures of several sizes on a real tritonserver, of families whose networks read prompts and sizes in other ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import sqnr
from sd3 import save_sd3, sd3_pipeline
from served import serving_client
from serving_requests import ask
from toy import PROMPTS
from unet import XL, save_unet, unet_pipeline

import dq_export
from dq_export.deploy.triton.serving.request import noise

STEPS = 3
PIXELS = 8
"""Of a latent along a side, with which diffusers' pipelines count without a VAE."""
pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Served:
    """An export of a family for several sizes, and diffusers' pipeline of its model."""

    model: Path
    out: Path
    pipeline: Callable[..., Any]

    def latents(self, start: Any, size: tuple[int, int], **options: Any) -> Any:
        """What diffusers' pipeline samples with the engine inside."""
        pipeline = self.pipeline(self.model)
        setattr(pipeline, "unet" if hasattr(pipeline, "unet") else "transformer", dq_export.load(self.out))
        settings = {"height": size[0], "width": size[1], "latents": torch.from_numpy(start), "output_type": "latent"}
        return pipeline(**settings, **options).images.numpy()


CASES: dict[str, tuple[Callable[[Path], Path], Callable[..., Any]]] = {
    "unet": (save_unet, unet_pipeline),
    "unet-xl": (lambda folder: save_unet(folder, **XL), unet_pipeline),
    "sd3": (save_sd3, sd3_pipeline),
}


@pytest.fixture(scope="module", params=list(CASES))
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    save, pipeline = CASES[request.param]
    place = tmp_path_factory.mktemp(request.param)
    save(place / "model")
    more: dict[str, Any] = {"triton": True, "steps": STEPS, "calib_size": 2, "parity_size": 2, "min_sqnr": 5.0}
    dq_export.export(
        model=str(place / "model"), output_dir=place / "out", prompts=PROMPTS, sizes="64x64,96x128", scaling="none", **more
    )
    return Served(place / "model", place / "out", pipeline)


@pytest.fixture(scope="module")
def client(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with serving_client(served.out, tmp_path_factory.mktemp("server")) as connected:
        yield connected


@pytest.mark.parametrize("size", [(64, 64), (96, 128), (80, 64)])
def test_a_picture_of_any_size_is_the_one_that_diffusers_draws(client: Any, served: Served, size: tuple[int, int]) -> None:
    request: dict[str, Any] = {"guidance_scale": 3.0, "num_inference_steps": STEPS}
    answer = ask(client, prompt=[PROMPTS[0]], seed=5, height=size[0], width=size[1], **request)["latents"]
    start = noise(np.array([[5]], dtype=np.uint64), (answer.shape[1], size[0] // PIXELS, size[1] // PIXELS))
    exact = served.latents(start, size, prompt=PROMPTS[0], **request)
    assert answer.shape == exact.shape
    assert sqnr(exact, answer) > 30
