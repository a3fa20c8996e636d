"""FLUX on a real tritonserver: tokens with positions, guidance as an input, and timesteps that follow the picture's size."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import sqnr
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, FluxPipeline
from flux import SIDE, flux_pipeline, save_flux
from flux2 import flux2_pipeline, save_flux2
from json_file import edit
from served import serving_client
from serving_requests import ask, ask_together, healthy
from tiny_vae import save_flux2_vae, save_vae
from toy import PROMPTS
from tritonclient.utils import InferenceServerException

import dq_export
from dq_export.core.recipe import RecipeError
from dq_export.deploy.backend import NotHereError
from dq_export.deploy.triton.check import check_repository
from dq_export.deploy.triton.serving.positions import picture_positions, text_positions
from dq_export.deploy.triton.serving.request import noise
from dq_export.families.family import Family
from dq_export.families.flux import FLUX
from dq_export.families.flux2 import FLUX2
from dq_export.families.source import load_reference

STEPS = 4
CHANNELS = 8
"""Of a token: 2 x 2 latents of 2 channels."""
QUICK: dict[str, Any] = {"triton": True, "steps": STEPS, "calib_size": 2, "parity_size": 2, "bits": "w8a8"}


def save_model(folder: Path, **changes: Any) -> Path:
    """A tiny pipeline with a VAE that makes 8 pixels of a latent."""
    save_flux(folder, **changes)
    wide: dict[str, Any] = {"block_out_channels": (8,) * 4, "sample_size": 64}
    save_vae(folder / "vae", latent_channels=2, scaling_factor=0.36, shift_factor=0.5, **wide)
    return folder


def exported(model: Path, out: Path, sizes: str) -> Path:
    dq_export.export(model=str(model), output_dir=out, prompts=PROMPTS, sizes=sizes, **QUICK)
    return out


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def out(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(model, tmp_path_factory.mktemp("flux-out") / "out", f"{SIDE[0]}x{SIDE[1]}")


@pytest.fixture(scope="module")
def client(out: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with serving_client(out, tmp_path_factory.mktemp("flux-server")) as connected:
        yield connected


def static(model: Path) -> Path:
    """The same model with timesteps that are the same at all sizes, as schnell's."""
    path = model / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_dynamic_shifting": False, "shift": 1.0}))
    return model


@pytest.fixture(scope="module", params=[pytest.param(name, marks=pytest.mark.slow) for name in ("flux2", "schnell")])
def sized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Sized:
    """Networks without guidance that draw several sizes: FLUX.2's klein, whose positions have a row for each picture, and one of
    schnell's kind, whose pictures share them."""
    place = tmp_path_factory.mktemp(request.param)
    if request.param == "flux2":
        save_flux2(place / "model")
        save_flux2_vae(place / "model" / "vae", CHANNELS)
    else:
        save_model(place / "model", guidance_embeds=False)
    return Sized(request.param, static(place / "model"), exported(place / "model", place / "out", "64x64,96x128"))


@pytest.fixture(scope="module")
def sized_client(sized: Sized, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with serving_client(sized.out, tmp_path_factory.mktemp("sized-server")) as connected:
        yield connected


@dataclass(frozen=True)
class Sized:
    """A model that draws several sizes, and its export."""

    name: str
    model: Path
    out: Path

    def pipelines_result(self, latents: Any, size: tuple[int, int], **options: Any) -> Any:
        """See `pipelines_latents`; of FLUX.2 the pictures, float32[n, 3, H, W] in [0, 1]."""
        if self.name != "flux2":
            return pipelines_latents(self.model, self.out, latents, size, **options)
        pipeline = flux2_pipeline(self.model, transformer=dq_export.load(self.out))
        pipeline.vae = AutoencoderKLFlux2.from_pretrained(self.model / "vae")
        pictures: dict[str, Any] = {"height": size[0], "width": size[1], "latents": torch.from_numpy(latents)}
        return pipeline(**pictures, output_type="pt", **options).images.numpy()


def pipelines_latents(model: Path, out: Path, latents: Any, size: tuple[int, int], **options: Any) -> Any:
    """What diffusers' own pipeline samples with the engine inside, float32[n, C, H, W]."""
    pipeline = flux_pipeline(model, transformer=dq_export.load(out))
    tokens = torch.from_numpy(latents.reshape(*latents.shape[:2], -1).transpose(0, 2, 1).copy())
    settings = {"height": size[0], "width": size[1], "latents": tokens, "output_type": "latent", **options}
    images = pipeline(**settings).images.numpy()
    return images.transpose(0, 2, 1).reshape(latents.shape)


def noise_of(pictures: int) -> Any:
    shape = (pictures, CHANNELS, SIDE[0] // 16, SIDE[1] // 16)
    return np.random.default_rng(3).standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_a_picture_is_the_one_that_diffusers_draws_with_the_engine(client: Any, model: Path, out: Path, guidance: float) -> None:
    text, pooled, _ = flux_pipeline(model).encode_prompt([*PROMPTS[:2]])
    embeddings = {"prompt_embeds": text.detach(), "pooled_prompt_embeds": pooled.detach()}
    start = noise_of(2)
    for steps in (1, STEPS):
        options = {"guidance_scale": guidance, "num_inference_steps": steps}
        rows = {name: tensor.numpy() for name, tensor in embeddings.items()}
        actual = ask(client, **rows, latents=start, **options)["latents"]
        exact = pipelines_latents(model, out, start, SIDE, **embeddings, **options)
        # From the second step on, what float32 rounds otherwise moves a few 8-bit activations to the next step.
        assert np.abs(actual - exact).max() < 1e-5 if steps == 1 else sqnr(exact, actual) > 30
        assert np.abs(exact - start).max() > 0.1


def test_guidance_is_an_input_and_its_default_is_the_exports(client: Any) -> None:
    by_scale = {scale: ask(client, prompt=["a red square"], seed=1, guidance_scale=scale)["latents"] for scale in (1.0, 3.5)}
    assert np.abs(by_scale[1.0] - by_scale[3.5]).max() > 1e-3
    default = ask(client, prompt=["a red square"], seed=1)["latents"]
    assert [scale for scale, latents in by_scale.items() if np.array_equal(latents, default)] == [3.5]


def test_prompts_become_pictures_that_the_checkpoints_vae_decodes(client: Any, model: Path, out: Path) -> None:
    from diffusers import AutoencoderKL

    answer = ask(client, prompt=[*PROMPTS[:2]], seed=[5, 6])
    start = noise(np.array([[5], [6]], dtype=np.uint64), (CHANNELS, SIDE[0] // 16, SIDE[1] // 16))
    exact = pipelines_latents(model, out, start, SIDE, prompt=[*PROMPTS[:2]], guidance_scale=3.5, num_inference_steps=STEPS)
    assert sqnr(exact, answer["latents"]) > 30
    vae = AutoencoderKL.from_pretrained(model / "vae").eval()
    tokens = torch.from_numpy(answer["latents"].reshape(2, CHANNELS, -1).transpose(0, 2, 1).copy())
    with torch.inference_mode():
        unpacked = FluxPipeline._unpack_latents(tokens, *SIDE, 8)
        picture = vae.decode(unpacked / 0.36 + 0.5).sample
    pixels = ((picture / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy()
    assert answer["images"].shape == (2, *SIDE, 3)
    assert np.abs(answer["images"].astype(np.int64) - pixels).max() <= 1  # a value between two levels may go either way
    assert pixels.std() > 3


def test_requests_share_calls_with_equal_results_whatever_their_guidance(client: Any) -> None:
    requests = [
        {"prompt": [PROMPTS[i % 4]], "seed": i, "num_inference_steps": 4 + i % 3, "guidance_scale": 1.0 + i % 4}
        for i in range(12)
    ]
    alone = [ask(client, **request)["latents"] for request in requests]
    together, _, calls = ask_together(client, requests)
    assert [np.array_equal(a, b["latents"]) for a, b in zip(alone, together, strict=True)] == [True] * len(requests)
    assert calls < sum(request["num_inference_steps"] for request in requests) / 2


def test_a_whole_batch_of_guided_pictures_fits_into_a_call(client: Any) -> None:
    answer = ask(client, prompt=["a red square"] * 16, seed=list(range(16)), guidance_scale=3.5)
    assert answer["images"].shape == (16, *SIDE, 3)


def test_the_repository_is_whole_and_healthy(client: Any, out: Path) -> None:
    (fault,) = check_repository(out / "triton")
    assert (fault.severity, fault.model) == ("warning", "denoiser")
    assert "any number of rows" in fault.problem
    assert healthy(client)


def describes_what_it_takes(readme: str) -> bool:
    """Whether a README offers nothing that only calls without a condition have."""
    return "negative_prompt" not in readme and 'those of ""' not in readme and "rows;\na picture takes one." in readme


def test_the_readme_describes_what_the_network_takes(out: Path) -> None:
    readme = (out / "triton" / "README.md").read_text()
    assert describes_what_it_takes(readme)
    assert "the network itself applies it" in readme
    assert "No config.pbtxt bounds the rows of a call of `denoiser`: the pipelines check them." in readme


def test_the_readme_of_several_sizes_names_what_is_not_bounded(sized: Sized) -> None:
    readme = (sized.out / "triton" / "README.md").read_text()
    assert describes_what_it_takes(readme)
    rows = "" if sized.name == "flux2" else " or the rows of a call of `denoiser`"
    assert f"bounds the height and the width that `denoiser` and `decoder` take{rows}: the pipelines check them." in readme


@pytest.mark.parametrize(("family", "pipeline"), [(FLUX, FluxPipeline), (FLUX2, Flux2KleinPipeline)])
def test_positions_are_those_that_the_pipeline_sends(family: Family, pipeline: Any) -> None:
    (picture,), (text,) = family.picture_positions.values(), family.text_positions.values()
    if family is FLUX:
        ids, text_ids = pipeline._prepare_latent_image_ids(1, 3, 5, "cpu", torch.float32), torch.zeros(7, 3)
    else:
        ids, text_ids = (
            pipeline._prepare_latent_ids(torch.zeros(1, 8, 3, 5))[0],
            pipeline._prepare_text_ids(torch.zeros(1, 7, 2))[0],
        )
    np.testing.assert_array_equal(picture_positions(picture, 3, 5), ids.numpy())
    np.testing.assert_array_equal(text_positions(text, 7), text_ids.numpy())


@pytest.mark.slow
def test_an_engine_for_one_row_draws_pictures_without_guidance(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", guidance_embeds=False)
    shapes = "hidden_states:1x24x8,timestep:1,encoder_hidden_states:1x512x8,pooled_projections:1x4"
    plan: dict[str, Any] = {**QUICK, "format": "trt", "max_shapes": shapes, "sizes": "64x96"}
    with suppress(NotHereError):  # the plan is built on a GPU
        dq_export.export(model=str(model), output_dir=tmp_path / "out", prompts=PROMPTS, **plan)
    assert "holds up to `max_rows` = 1 rows" in (tmp_path / "out" / "triton" / "README.md").read_text()


def test_what_the_network_does_not_take_is_refused(client: Any) -> None:
    with pytest.raises(InferenceServerException, match="negative_prompt"):
        ask(client, prompt=["a"], negative_prompt=["b"])
    with pytest.raises(InferenceServerException, match=r"height 128: expected 64, the only height"):
        ask(client, prompt=["a"], height=128)


def test_a_network_without_guidance_refuses_a_scale(sized_client: Any) -> None:
    with pytest.raises(InferenceServerException, match=r"guidance_scale: this model has no guidance, found 3\.5; leave it out"):
        ask(sized_client, prompt=["a"], guidance_scale=3.5)


@pytest.mark.parametrize("size", [(64, 64), (96, 128), (80, 64)])
def test_a_server_draws_several_sizes(sized_client: Any, sized: Sized, size: tuple[int, int]) -> None:
    answer = ask(sized_client, prompt=["a red square"], seed=3, height=size[0], width=size[1])
    start = noise(np.array([[3]], dtype=np.uint64), (CHANNELS, size[0] // 16, size[1] // 16))
    exact = sized.pipelines_result(start, size, prompt=["a red square"], num_inference_steps=STEPS)
    actual = answer["images"] / 255 if sized.name == "flux2" else answer["latents"]
    exact = exact.transpose(0, 2, 3, 1) if sized.name == "flux2" else exact
    assert sqnr(exact, actual) > 30
    assert answer["images"].shape == (1, *size, 3)


def test_a_prompt_is_encoded_as_the_pipeline_does_it(sized_client: Any, sized: Sized) -> None:
    """Klein's chat template is part of the text. The text of another prompt is the measure of how much it matters."""
    pipeline = (flux2_pipeline if sized.name == "flux2" else flux_pipeline)(sized.model)

    def from_embeddings(prompt: str) -> Any:
        text, pooled, *_ = pipeline.encode_prompt([prompt])
        rows = {"prompt_embeds": text.detach().numpy(), "pooled_prompt_embeds": pooled.detach().numpy()}
        rows = {name: rows[name] for name in list(rows)[: 1 if sized.name == "flux2" else 2]}
        return ask(sized_client, **rows, seed=3, num_inference_steps=1)["latents"]

    actual = ask(sized_client, prompt=["a red square"], seed=3, num_inference_steps=1)["latents"]
    exact, other = from_embeddings("a red square"), from_embeddings("a red square.")
    assert sqnr(exact, actual) > 20 + sqnr(exact, other)


def test_requests_of_several_sizes_in_flight_get_what_they_get_alone(sized_client: Any) -> None:
    sizes: list[dict[str, Any]] = [{}, {"height": 96, "width": 128}, {"height": 80}]
    requests = [{"prompt": [PROMPTS[i % 4]], "seed": i, "num_inference_steps": 3 + i % 3, **sizes[i % 3]} for i in range(12)]
    alone = [ask(sized_client, **request)["latents"] for request in requests]
    with ThreadPoolExecutor(len(requests)) as pool:
        together = list(pool.map(lambda request: ask(sized_client, **request)["latents"], requests))
    assert [np.array_equal(a, b) for a, b in zip(alone, together, strict=True)] == [True] * len(requests)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"guided_by": "nothing"}, "the denoiser's input 'guidance' is missing in 1/network.json"),
        ({"guided_by": "null"}, "max_batch_size: 16 guided pictures are more than max_rows 16"),
        ({"tokens": False}, "1/network.json: tokens does not fit the denoiser's input 'hidden_states'"),
        ({"batched": True}, "the denoiser has max_batch_size 0; expected above 0"),
        ({"picture_positions": {}}, "the denoiser's input 'img_ids' is missing in 1/network.json"),
        ({"picture_positions": {"img_ids": ["row", "column"]}}, "1/network.json: 2 columns of 'img_ids', the denoiser has 3"),
        (
            {"text_positions": {"img_ids": ["zero"] * 3}},
            "the denoiser gets twice the input 'img_ids', which 1/network.json names",
        ),
        ({"state": "sample"}, "the denoiser has no input 'sample', which 1/network.json names"),
        ({"output": "x"}, "the denoiser has no output 'x', which 1/network.json names"),
        ({"template": "a"}, "1/network.json: expected template as a text with one {}"),
    ],
)
def test_a_description_that_does_not_fit_the_network_is_a_fault(
    changes: dict[str, Any], problem: str, out: Path, tmp_path: Path
) -> None:
    shutil.copytree(out / "triton", tmp_path / "triton")
    edit(tmp_path / "triton" / "pipeline" / "1" / "network.json", **changes)
    errors = [fault.problem for fault in check_repository(tmp_path / "triton") if fault.severity == "error"]
    assert problem in errors


def test_a_default_guidance_for_a_network_without_any_is_a_fault(sized: Sized, tmp_path: Path) -> None:
    shutil.copytree(sized.out / "triton", tmp_path / "triton")
    assert not [fault for fault in check_repository(tmp_path / "triton") if fault.severity == "error"]
    path = tmp_path / "triton" / "pipeline" / "config.pbtxt"
    text = re.sub(r'(key: "guidance_scale"\s+value {\s+string_value: )"1.0"', r'\1"3.5"', path.read_text())
    path.write_text(text)
    (fault,) = [fault for fault in check_repository(tmp_path / "triton") if fault.severity == "error"]
    assert fault.problem == "parameters: guidance_scale is above 1, and the network has no guidance"


def test_several_sizes_are_refused_where_the_timesteps_follow_them(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"--triton: the timesteps of this checkpoint's sampler follow the picture's size"):
        exported(model, tmp_path / "out", "64x64,64x96")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("save", "size"), [(save_flux, (64, 96)), (save_flux2, (64, 96)), (save_flux2, (160, 160))])
def test_a_table_has_the_timesteps_that_the_pipeline_sends_at_that_size(
    save: Callable[[Path], Path], size: tuple[int, int], tmp_path: Path
) -> None:
    reference: Any = load_reference(str(save(tmp_path / "model")))
    reference.draw_at(*size)
    samplers = reference.samplers(5)
    for count in (1, 4, 5):
        steps = samplers.schedules.steps(samplers.default, count)
        assert [step.timestep for step in steps] == reference.timesteps(count)
