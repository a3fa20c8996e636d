"""Text encoders as one ONNX graph: what it gives is what diffusers' pipelines give their networks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from flux import save_flux
from pixart import ALPHA, save_pixart
from sd3 import save_sd3
from toy import PROMPTS
from unet import XL, save_unet

from dq_export.core.recipe import Recipe
from dq_export.deploy.triton.serving.conditions import Texts
from dq_export.families.reference import ModelError
from dq_export.families.source import load_reference
from dq_export.stages.triton import call_of, require_served


def save_alpha(folder: Path) -> Path:
    return save_pixart(folder, pipeline="PixArtAlphaPipeline", **ALPHA)


@pytest.mark.parametrize("save", [save_pixart, save_sd3, save_unet])
def test_a_graph_gives_the_conditions_of_the_pipeline(save: Callable[[Path], Path], tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    reference: Any = load_reference(str(save(tmp_path / "model")))
    require_served(Recipe.parse({"model": "it"}, "test"), reference)
    names = reference.export_encoders(tmp_path / "encoder")
    session = onnxruntime.InferenceSession(str(tmp_path / "encoder" / "model.onnx"), providers=["CPUExecutionProvider"])
    call = call_of(reference, names)

    def encode(feed: Any) -> Any:
        taken = {item.name for item in session.get_inputs()}
        assert taken == feed.keys()
        return dict(zip(call.conditions, session.run(list(call.conditions), feed), strict=True))

    tokenizers = [Tokenizer.from_file(str(tmp_path / "encoder" / name)) for name in names]
    served = Texts(call, dict.fromkeys(call.conditions.values(), ()), tokenizers, encode, max_images=8)
    exact = reference.encode(PROMPTS, "cpu")
    column = np.array([[prompt.encode()] for prompt in PROMPTS], dtype=np.object_)
    found = served.read({"prompt": column}).rows(True)
    for name, rows in exact.arrays.items():
        expected = np.concatenate([rows, np.repeat(exact.null[name], len(PROMPTS), axis=0)])
        np.testing.assert_allclose(found[name], expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("save", "why"),
    [
        (save_flux, "encoder_hidden_states, pooled_projections"),
        (lambda folder: save_unet(folder, **XL), "text_embeds, time_ids"),
        (save_alpha, "resolution, aspect_ratio"),
    ],
    ids=["flux", "xl", "alpha"],
)
def test_a_network_with_inputs_that_no_request_holds_is_refused_by_their_names(
    save: Callable[[Path], Path], why: str, tmp_path: Path
) -> None:
    reference = load_reference(str(save(tmp_path / "model")))
    with pytest.raises(ModelError, match=rf"^--triton: the server's requests do not hold what this network takes: {why}"):
        require_served(Recipe.parse({"model": "it"}, "test"), reference)
