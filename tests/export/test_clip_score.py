"""The CLIP score of pictures against torchmetrics, in an export, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import QUICK
from torchmetrics.functional.multimodal import clip_score

sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))
from pixart import save_pixart
from sd3 import save_clip
from toy import PROMPTS

from dq_export.core.recipe import Recipe
from dq_export.families.clip_score import ClipScore
from dq_export.families.metric_weights import metric_files, require_metrics
from dq_export.families.reference import ModelError
from dq_export.pipeline import run
from dq_export.preparation import Options

SIDE = 32


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random CLIP in the hub's layout, in a folder of metrics' weights."""
    import transformers

    folder, parts = tmp_path_factory.mktemp("weights"), tmp_path_factory.mktemp("parts")
    save_clip(parts, "", "CLIPTextModelWithProjection")
    text = transformers.CLIPTextConfig.from_pretrained(parts / "text_encoder")
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, patch_size=8
    )
    torch.manual_seed(7)
    model = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=text.projection_dim)
    )
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.3 * torch.randn_like(value))
        for projection in (model.visual_projection, model.text_projection):
            projection.weight.abs_()  # most features are positive then, and so are the cosines
        for norm in (model.vision_model.post_layernorm, model.text_model.final_layer_norm):
            norm.bias.fill_(1)
    model.save_pretrained(folder / "clip")
    transformers.CLIPTokenizer.from_pretrained(parts / "tokenizer").save_pretrained(folder / "clip")
    transformers.CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SIDE).save_pretrained(folder / "clip")
    return folder


class Features:
    """A CLIP whose features are tensors, as torchmetrics expects them and older versions of transformers gave them."""

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config

    def to(self, device: Any) -> Features:
        return self

    def get_image_features(self, *values: Any, **named: Any) -> torch.Tensor:
        return self.model.get_image_features(*values, **named).pooler_output

    def get_text_features(self, *values: Any, **named: Any) -> torch.Tensor:
        return self.model.get_text_features(*values, **named).pooler_output


def test_the_score_is_that_of_torchmetrics(weights: Path) -> None:
    import transformers

    score = ClipScore.load(weights / "clip")
    processor = transformers.CLIPProcessor(image_processor=score.processor, tokenizer=score.tokenizer)
    random = np.random.default_rng(3)
    scores = []
    for prompt in PROMPTS:
        picture = random.uniform(-1, 1, (1, 3, 40, 56)).astype(np.float32)
        levels = torch.from_numpy(np.rint((picture + 1) * 127.5).astype(np.uint8))
        scores.append(score(picture, [prompt]))
        with torch.inference_mode():
            expected = clip_score([levels[0]], [prompt], lambda: (Features(score.model), processor))
        assert scores[-1] == pytest.approx(float(expected), abs=1e-3)
    assert len({round(value, 2) for value in scores}) > 1
    grey = random.uniform(-1, 1, (2, 1, 16, 16)).astype(np.float32)
    assert score(grey, PROMPTS[:2]) == pytest.approx(score(grey.repeat(3, 1), PROMPTS[:2]))


def test_an_export_of_prompts_scores_both_sides(weights: Path, tmp_path: Path) -> None:
    model = save_pixart(tmp_path / "model", in_channels=1, out_channels=2)
    values = {**QUICK, "parity_size": 2, "metric_weights": str(weights), "prompts": list(PROMPTS)}
    report = run(Recipe.parse({"model": str(model), **values}, "test"), tmp_path / "out", Options(), until="verify")
    assert report is not None
    assert report.parity is not None
    (trajectory,) = report.parity.trajectories
    assert trajectory.lpips is None
    assert trajectory.clip is not None
    assert 0 < trajectory.clip < 100
    assert trajectory.clip_of_pytorch == pytest.approx(trajectory.clip, rel=0.2)
    assert f"CLIP score {trajectory.clip:.2f} (PyTorch's {trajectory.clip_of_pytorch:.2f})" in trajectory.appearance()
    assert trajectory.appearance().replace("'", "&#39;") in (tmp_path / "out" / "report.html").read_text()


def remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def other_kind(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "model_type": "siglip"}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove("config.json"), "no config.json; copy the hub's folder of a CLIP"),
        (remove("preprocessor_config.json"), "no preprocessor_config.json; copy"),
        (remove("model.safetensors"), "no model.safetensors; copy"),
        (lambda folder: [path.unlink() for path in folder.glob("*o*en*er.json")], "no tokenizer.json; copy"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json: not the configuration of a model"),
        (other_kind, "config.json: of a model of type 'siglip', expected clip"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x"), "model.safetensors: "),
    ],
    ids=["configuration", "preprocessor", "weights", "tokenizer", "damaged", "another model", "cut short"],
)
def test_a_clip_that_is_not_whole_is_refused_in_one_line(
    spoil: Callable[[Path], Any], message: str, weights: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "weights"
    shutil.copytree(weights, folder)
    require_metrics(folder)
    assert {path.name for path in metric_files(folder)} >= {"config.json", "model.safetensors", "preprocessor_config.json"}
    spoil(folder / "clip")
    with pytest.raises(ModelError) as error:
        require_metrics(folder)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_lpips_is_still_expected_where_its_weights_lie_beside_a_clip(weights: Path, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    shutil.copytree(weights, folder)
    (folder / "alex.safetensors").write_bytes(b"x")
    with pytest.raises(ModelError, match="no file of torchvision's AlexNet"):
        require_metrics(folder)


def test_weights_that_do_not_fit_their_configuration_end_in_one_line(weights: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(weights / "clip", folder)
    values = json.loads((folder / "config.json").read_text())
    values["vision_config"]["num_hidden_layers"] = 3
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match=r"clip: 'vision_model\..*' is missing; copy the files again$"):
        ClipScore.load(folder)
