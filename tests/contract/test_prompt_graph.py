"""Text encoders as one ONNX graph: what it gives is what diffusers' pipelines give their networks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import server
from conftest import sqnr
from pixart import ALPHA, save_pixart
from sd3 import save_sd3
from serving_requests import ask
from toy import PROMPTS
from unet import XL, save_lcm, save_unet

import dq_export
from dq_export.core.progress import unwatched
from dq_export.core.recipe import Recipe
from dq_export.deploy.onnxruntime.cpu import open_graph
from dq_export.deploy.triton.serving.conditions import Texts
from dq_export.families.reference import ModelError
from dq_export.families.source import load_reference
from dq_export.stages.text_encoder import compare_encoder
from dq_export.stages.triton import call_of, require_served


def save_alpha(folder: Path) -> Path:
    return save_pixart(folder, pipeline="PixArtAlphaPipeline", **ALPHA)


def save_xl(folder: Path) -> Path:
    return save_unet(folder, **XL)


@pytest.mark.parametrize("save", [save_pixart, save_alpha, save_sd3, save_unet, save_xl])
def test_a_graph_gives_the_conditions_of_the_pipeline(save: Callable[[Path], Path], tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    reference: Any = load_reference(str(save(tmp_path / "model")))
    require_served(Recipe.parse({"model": "it"}, "test"), reference)
    graph = reference.export_encoders(tmp_path / "encoder")
    session = onnxruntime.InferenceSession(str(graph.path), providers=["CPUExecutionProvider"])
    call = call_of(reference, graph.tokenizers)

    def encode(feed: Any) -> Any:
        names = {item.name for item in session.get_inputs()}
        assert names == feed.keys()
        return dict(zip(call.conditions, session.run(list(call.conditions), feed), strict=True))

    tokenizers = [Tokenizer.from_file(str(tmp_path / "encoder" / name)) for name in graph.tokenizers]
    exact = reference.encode(PROMPTS, "cpu")
    shapes = {name: exact.arrays[key].shape[1:] for key, name in call.conditions.items()}
    served = Texts(call, shapes, tokenizers, encode, max_images=8)
    column = np.array([[prompt.encode()] for prompt in PROMPTS], dtype=np.object_)
    actual = served.read({"prompt": column}).rows(True)
    for name, rows in exact.only(call.conditions).arrays.items():
        expected = np.concatenate([rows, np.repeat(exact.null[name], len(PROMPTS), axis=0)])
        np.testing.assert_allclose(actual[name], expected, atol=2e-5 * np.abs(expected).max())


# In the tiny model of SD3 blocks of 32 do not divide the rows of the tables of words.
@pytest.mark.parametrize(("save", "weights"), [(save_sd3, 38), pytest.param(save_unet, 12 + 1, marks=pytest.mark.slow)])
def test_linears_and_words_of_all_encoders_have_8_bits(save: Callable[[Path], Path], weights: int, tmp_path: Path) -> None:
    reference: Any = load_reference(str(save(tmp_path / "model")))
    graph = reference.export_encoders(tmp_path / "encoder", 8)
    written = ir.load(graph.path).graph
    codes = [
        value for value in written.initializers.values() if value.dtype == ir.DataType.INT8 and str(value.name).endswith("codes")
    ]
    assert len(codes) == weights
    assert graph.stored_bytes < graph.float_bytes
    actual = compare_encoder(graph, call_of(reference, graph.tokenizers), reference.encode(PROMPTS, "cpu"), unwatched)
    assert 30 < actual.sqnr < 80  # in float32 it is above 110
    assert actual.prompt in (*PROMPTS, "")


@pytest.mark.slow
@pytest.mark.parametrize("save", [save_sd3, save_unet, save_xl, save_alpha])
def test_a_server_draws_what_the_pipeline_draws_with_the_engine(save: Callable[[Path], Path], tmp_path: Path) -> None:
    import tritonclient.grpc as grpc

    if server.missing():
        pytest.skip(server.missing())
    folder, out = save(tmp_path / "model"), tmp_path / "out"
    more: dict[str, Any] = {"steps": 4, "calib_size": 2, "parity_size": 2, "min_sqnr": 5.0, "guidance_scale": 2.0}
    dq_export.export(model=str(folder), output_dir=out, triton=True, prompts=tuple(PROMPTS), **more)
    reference: Any = load_reference(str(folder))
    reference.conditions = reference.encode(PROMPTS, "cpu")
    engine, noise = open_graph(out / "model.onnx"), reference.noise(2, 7)

    def network(feed: Any) -> Any:
        rows = len(feed[reference.inputs[0].name])
        return engine({**feed, "timestep": np.repeat(feed["timestep"], rows)})

    exact = reference.draw(network, noise, np.array([0, 1]), steps=4, guidance=2.0)
    with server.serving(out / "triton", tmp_path, wait="ready") as running:
        client = grpc.InferenceServerClient(running.grpc)
        actual = ask(client, prompt=list(PROMPTS[:2]), latents=noise)["latents"]
        client.close()
    assert sqnr(exact, actual) > 30


def test_a_network_with_inputs_that_no_request_holds_is_refused_by_their_names(tmp_path: Path) -> None:
    reference = load_reference(str(save_lcm(tmp_path / "model")))
    message = r"^--triton: the server's requests do not hold what this network takes: timestep_cond\."
    with pytest.raises(ModelError, match=message):
        require_served(Recipe.parse({"model": "it"}, "test"), reference)
