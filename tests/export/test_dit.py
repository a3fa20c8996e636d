"""What is DiT's own: its sampling loop, its embeddings, and checkpoints of other networks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY, feed_of, save_tiny, sqnr
from json_file import edit

from dq_export.core.network import Feed
from dq_export.families.reference import Float32, ModelError
from dq_export.families.source import load_reference, require_device


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("dit"))


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    return load_reference(str(folder))


@pytest.mark.parametrize("out_channels", [2, 4], ids=["fixed-sigma", "learned-sigma"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_dit_draws_what_diffusers_own_pipeline_draws(out_channels: int, guidance: float, tmp_path: Path) -> None:
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    # DiTPipeline has ImageNet's null label, 1000, written into it.
    folder = save_tiny(tmp_path, out_channels=out_channels, num_embeds_ada_norm=1000)
    reference = load_reference(str(folder))
    labels, seed = np.asarray([3, 917], dtype=np.int64), 7
    noise = reference.noise(2, seed)
    latents = reference.draw(reference.forward, noise, labels, steps=4, guidance=guidance)
    torch.manual_seed(0)
    vae = AutoencoderKL(latent_channels=2, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1).eval()
    pipeline = DiTPipeline(
        transformer=DiTTransformer2DModel.from_pretrained(folder / "transformer"),
        vae=vae,
        scheduler=DDIMScheduler.from_pretrained(folder / "scheduler"),
    )
    pipeline.set_progress_bar_config(disable=True)
    # A generator whose first draw is our noise: DiTPipeline takes one for each picture.
    generators = [torch.Generator().manual_seed(seed * 100_003 + i) for i in range(2)]
    images = pipeline(labels.tolist(), guidance, generators, num_inference_steps=4, output_type="np").images
    with torch.no_grad():
        actual = (vae.decode(torch.from_numpy(latents) / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    difference = np.abs(images - actual.permute(0, 2, 3, 1).numpy()).max()
    # The same operations; DiTPipeline steps both halves of the batch, we one, and of values about 1 float32 keeps 6e-8.
    assert difference <= 1e-5
    assert images.std() > 0.05, "a picture that is one colour would prove nothing"


@pytest.mark.parametrize(
    "scheduler", ["DDPMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"]
)
def test_drawing_twice_gives_the_same_whatever_the_sampler(scheduler: str, tmp_path: Path) -> None:
    save_tiny(tmp_path)
    write_scheduler(tmp_path, scheduler)
    reference = load_reference(str(tmp_path))
    assert reference.sampler == scheduler
    labels, noise = np.asarray([1, 2], dtype=np.int64), reference.noise(2, 5)
    one, two = (reference.draw(reference.forward, noise, labels, steps=4, guidance=2.0) for _ in range(2))
    np.testing.assert_array_equal(one, two)
    assert np.isfinite(one).all()
    feeds: list[Feed] = []

    def recorded(feed: Feed) -> Float32:
        feeds.append(feed)
        return reference.forward(feed)

    reference.draw(recorded, noise, labels, steps=4, guidance=2.0)
    timesteps = [float(feed["timestep"][0]) for feed in feeds]  # type: ignore[arg-type]
    before: list[float] = []
    reference.trajectory(labels, steps=4, seed=5, guidance=2.0, before=lambda feed: before.append(float(feed["timestep"][0])))
    assert timesteps == reference.timesteps(4) == before
    for feed in feeds:
        assert feed["hidden_states"].shape == (4, *reference.feed_shape)
        assert feed["class_labels"].tolist() == [1, 2, 5, 5]


def write_scheduler(folder: Path, name: str, **options: Any) -> None:
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": name, **options}))


def test_a_sampler_of_fractional_timesteps_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    write_scheduler(tmp_path, "EulerDiscreteScheduler", timestep_spacing="linspace")  # 999, 749.25 …
    reference = load_reference(str(tmp_path))
    with pytest.raises(ModelError, match=r"sends the fractional timestep 749\.25, and the network takes integers"):
        reference.timesteps(5)


def test_half_precision_checkpoints_are_read_in_float32(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, tmp_path / "half")
    path = next((tmp_path / "half" / "transformer").glob("*.safetensors"))
    save_file({name: value.half() for name, value in load_file(path).items()}, path, metadata={"format": "pt"})
    half = load_reference(str(tmp_path / "half"))
    name = half.sites[0].name
    assert half.weight(name).dtype == np.float32
    np.testing.assert_array_equal(half.weight(name), load_reference(str(folder)).weight(name).astype(np.float16))


def cut(share: float) -> Callable[[Path], None]:
    def spoil(transformer: Path) -> None:
        path = next(transformer.glob("*.safetensors"))
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    return spoil


def edit_config(transformer: Path, **changes: Any) -> None:
    edit(transformer / "config.json", **changes)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut(0), "safetensors: empty; copy or download it again"),
        (cut(0.5), "safetensors: cut short"),
        (cut(0.999), "safetensors: cut short"),
        (lambda t: edit_config(t, norm_type="layer_norm"), "ada_norm_zero|layer_norm"),
        (
            lambda t: edit_config(t, in_channels=3, out_channels=3),
            r"pos_embed\.proj\.weight has shape \(32, 2, 2, 2\) in the weights and \(32, 3, 2, 2\) in the network",
        ),
        (
            lambda t: edit_config(t, num_layers=1),
            r"do not fit each other: the weights hold \d+ tensors that the network does not have",
        ),
        (lambda t: (t / "config.json").write_text("[]"), "expected a JSON object, found list"),
        (lambda t: edit_config(t, _class_name=None), "architecture None is not supported; supported: DiTTransformer2DModel"),
    ],
    ids=["empty", "half", "nearly whole", "norm", "channels", "blocks", "list", "no class"],
)
def test_a_damaged_or_foreign_checkpoint_is_refused_with_the_reason(
    folder: Path, tmp_path: Path, spoil: Any, message: str
) -> None:
    shutil.copytree(folder, tmp_path / "model")
    spoil(tmp_path / "model" / "transformer")
    with pytest.raises(ModelError, match=message) as error:
        load_reference(str(tmp_path / "model"))
    assert str(tmp_path / "model") in str(error.value), "the message names the place"


def test_a_pickle_beside_safetensors_is_not_read(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "both")
    (tmp_path / "both" / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"not even a pickle")
    assert load_reference(str(tmp_path / "both")).digest == load_reference(str(folder)).digest


def test_the_tiny_model_is_what_its_configuration_says(reference: Any) -> None:
    """The tests above would prove less on a model without several blocks, biases or a null label."""
    assert len(reference.sites) == 4 * TINY["num_layers"] == 8
    assert len(reference.conditions) == TINY["num_embeds_ada_norm"]
    assert all(module.bias is not None for name, module in reference.model.named_modules() if name in reference.linears)


def test_the_position_embedding_does_not_depend_on_where_it_was_computed(folder: Path) -> None:
    """diffusers' embedding differs in the last bits between processes; ours replaces one that is equal up to rounding."""
    import torch

    from dq_export.families import embeddings

    reference = load_reference(str(folder))
    settled = reference.model.pos_embed.pos_embed.clone()  # type: ignore[attr-defined]
    for other in (settled * (1 + 2e-7), settled + 1e-7):
        reference.model.pos_embed.pos_embed = other  # type: ignore[attr-defined]
        embeddings.settle_positions(reference.model)  # type: ignore[attr-defined]
        assert torch.equal(reference.model.pos_embed.pos_embed, settled)  # type: ignore[attr-defined]
    trained = settled + 0.1
    reference.model.pos_embed.pos_embed = trained  # type: ignore[attr-defined]
    embeddings.settle_positions(reference.model)  # type: ignore[attr-defined]
    assert torch.equal(reference.model.pos_embed.pos_embed, trained), "another embedding is the model's own"  # type: ignore[attr-defined]


def test_weights_are_the_checkpoints_while_the_network_is_on_another_device(tiny_folder: Path) -> None:
    """`cpu:0` is treated as a GPU: tensors are moved away, and restored as they were."""
    reference: Any = load_reference(str(tiny_folder))
    feed = feed_of(reference)
    names = list(reference.linears)
    before = {name: (reference.weight(name).copy(), reference.bias(name).copy()) for name in names}
    exact = reference.forward(feed)
    places = {name: value.data_ptr() for name, value in reference.model.state_dict().items()}
    with reference.on("cpu:0"):
        for parameter in reference.model.parameters():
            parameter.data = parameter.data * 2  # stands for other memory: what is asked for is the checkpoint's
        for name in names:
            np.testing.assert_array_equal(reference.weight(name), before[name][0])
            np.testing.assert_array_equal(reference.bias(name), before[name][1])
    assert {name: value.data_ptr() for name, value in reference.model.state_dict().items()} == places
    np.testing.assert_array_equal(reference.forward(feed), exact)


@pytest.mark.parametrize(
    ("device", "message"),
    [("gpu", "--device 'gpu': expected cpu, cuda or cuda:N"), ("cuda:99", "sees . CUDA devices; pass --device cpu")],
)
def test_a_device_that_is_not_there_is_an_error(device: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        require_device(device)


@pytest.mark.gpu
def test_a_gpu_computes_what_the_processor_does(tiny_folder: Path) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU that PyTorch sees")
    reference: Any = load_reference(str(tiny_folder))
    exact = reference.forward(feed_of(reference))
    with reference.on("cuda"):
        actual = reference.forward(feed_of(reference))
    assert sqnr(exact, actual) > 90  # float32 on both, sums in other orders


def test_the_timestep_embedding_is_diffusers_own_to_rounding_in_every_dtype(reference: Any) -> None:
    import torch
    from diffusers.models.embeddings import get_timestep_embedding

    timesteps = torch.arange(1000)
    exact = get_timestep_embedding(timesteps, 256, flip_sin_to_cos=True, downscale_freq_shift=1)
    module = reference.model.transformer_blocks[0].norm1.emb.time_proj
    # Half a unit in the last place of a frequency of at most 1, times 1000, and as much again of the product's rounding.
    assert (module(timesteps) - exact).abs().max() < 1000 * 2 * 2**-23
    halves = torch.nn.Module.to(reference.model, torch.float32).transformer_blocks[0].norm1.emb.time_proj
    assert torch.equal(torch.nn.Module.to(halves, torch.bfloat16)(timesteps), module(timesteps))
