"""Every model family, on tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import save_tiny
from json_file import edit

from dq_export.families.reference import ModelError, Reference
from dq_export.families.source import MODELS, load_reference


def test_the_scaling_of_a_dit_goes_into_its_modulation_and_its_value_projection_and_stays_behind_gelu(tiny: Reference) -> None:
    """The rows are those of adaLN-zero: shift, scale, gate of attention, then of the MLP. 1 is what adaLN adds to a scale."""
    block, width = "transformer_blocks.1", 32
    actual = {
        site.name.removeprefix(f"{block}."): [
            (part.kind, part.name.removeprefix(f"{block}."), part.rows[0] // width, part.shift, part.plus)
            for part in site.fold.parts
        ]
        for site in tiny.sites
        if site.name.startswith(block)
    }
    assert actual == {
        "attn1.to_q": [("linear", "norm1.linear", 1, False, 1.0), ("linear", "norm1.linear", 0, True, 0.0)],
        "attn1.to_out.0": [("linear", "attn1.to_v", 0, True, 0.0)],
        "ff.net.0.proj": [("linear", "norm1.linear", 4, False, 1.0), ("linear", "norm1.linear", 3, True, 0.0)],
        "ff.net.2": [("token", "gelu_1", 0, True, 0.0)],
    }
    assert tiny.sites[4].linears == tuple(f"{block}.attn1.to_{letter}" for letter in "qkv") == tiny.attention[1]


def test_weights_are_the_modules(tiny: Any) -> None:
    name = "transformer_blocks.1.ff.net.0.proj"
    np.testing.assert_array_equal(tiny.weight(name), tiny.model.transformer_blocks[1].ff.net[0].proj.weight.detach().numpy())


def test_noise_of_a_picture_does_not_depend_on_the_batch(tiny: Reference) -> None:
    np.testing.assert_array_equal(tiny.noise(5, 3)[:2], tiny.noise(2, 3))
    assert not np.array_equal(tiny.noise(1, 3), tiny.noise(1, 4))


def test_every_seed_of_64_bits_draws(tiny: Reference) -> None:
    """PyTorch's generator takes no number above 2**64; smaller products keep the noise that they always had."""
    import torch

    exact = torch.randn(tiny.feed_shape, generator=torch.Generator().manual_seed(7 * 100_003 + 1)).numpy()
    np.testing.assert_array_equal(tiny.noise(2, 7)[1], exact)
    largest = tiny.noise(2, 2**64 - 1)
    assert np.isfinite(largest).all()
    np.testing.assert_array_equal(largest, tiny.noise(2, 2**64 - 1))
    assert not np.array_equal(largest, tiny.noise(2, 2**64 - 2))
    timesteps: list[float] = []
    tiny.trajectory(
        np.zeros(1, dtype=np.int64),
        steps=2,
        seed=2**64 - 1,
        guidance=1.0,
        before=lambda feed: timesteps.append(float(feed["timestep"][0])),
    )
    assert len(timesteps) == 2


def test_a_folder_of_only_the_transformer_has_dits_scheduler(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    reference = load_reference(str(tmp_path / "transformer"))
    assert reference.sampler == "DDIMScheduler"
    assert reference.guidance == 4.0


def test_the_shipped_model_draws_digits_with_guidance_2() -> None:
    reference = load_reference("dit-digits")
    assert (reference.guidance, len(reference.conditions), reference.feed_shape) == (2.0, 10, (1, 16, 16))
    folder = Path(MODELS["dit-digits"][0])
    assert sum(path.stat().st_size for path in folder.rglob("*.safetensors")) < 10e6


def test_without_a_network_the_error_names_both_ways_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"hf download facebook/DiT-XL-2-256.*or pass a local folder"):
        load_reference("dit")


def edit_config(folder: Path, **changes: Any) -> None:
    edit(folder / "transformer" / "config.json", **changes)


def truncate(folder: Path) -> None:
    path = next((folder / "transformer").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:5000])


def to_pickle(folder: Path) -> None:
    path = next((folder / "transformer").glob("*.safetensors"))
    path.rename(path.with_suffix(".bin"))


def with_nan(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = next((folder / "transformer").glob("*.safetensors"))
    tensors = load_file(path)
    tensors["proj_out_2.bias"][0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})


def without_a_key(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = next((folder / "transformer").glob("*.safetensors"))
    tensors = load_file(path)
    del tensors["proj_out_2.bias"]
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (truncate, r"safetensors: cut short: it has 5000 of \d+ bytes; copy or download it again"),
        (to_pickle, r"model\.bin: damaged, or not a file of torch\.save"),
        (with_nan, r"NaN or Inf in 1 weights \(proj_out_2.bias\)"),
        (without_a_key, r"do not fit each other: the weights lack 1 of the network's tensors \(proj_out_2\.bias\)"),
        (
            lambda f: edit_config(f, _class_name="WanTransformer3DModel"),
            r"'WanTransformer3DModel' is not supported; supported: DiT\S+ \(family dit\), PixArt\S+ \(family pixart\)",
        ),
        (lambda f: edit_config(f, num_layers=3), r"the weights lack \d+ of the network's tensors \(transformer_blocks\.2\."),
        (lambda f: (f / "transformer" / "config.json").write_text("{"), "not readable as JSON"),
        (lambda f: (f / "transformer" / "config.json").unlink(), "no transformer/config.json and no config.json"),
        (
            lambda f: next((f / "transformer").glob("*.safetensors")).unlink(),
            r"no weights; expected diffusion_pytorch_model\.safetensors or diffusion_pytorch_model\.bin",
        ),
        (lambda f: (f / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "os"}'), "'os' is not a scheduler"),
    ],
)
def test_a_checkpoint_that_cannot_be_used_is_refused_with_the_reason(tmp_path: Path, spoil: Any, message: str) -> None:
    spoil(save_tiny(tmp_path))
    with pytest.raises(ModelError, match=message):
        load_reference(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "message"), [("dit-digit", "Did you mean 'dit-digits'"), ("./missing", "no such model or folder")]
)
def test_an_unknown_model_is_an_error(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_reference(name)


def test_another_scheduler_is_another_model(tmp_path: Path) -> None:
    """Calibration and parity sample with the scheduler, so results of another one must not be reused."""
    before = load_reference(str(save_tiny(tmp_path))).digest
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "beta_end": 0.05}))
    assert load_reference(str(tmp_path)).digest != before


def test_more_steps_than_the_scheduler_knows_is_an_error(tmp_path: Path) -> None:
    reference = load_reference(str(save_tiny(tmp_path)))
    with pytest.raises(ModelError, match=r"DDIMScheduler cannot sample in 1001 steps .*change --steps"):
        reference.draw(reference.forward, reference.noise(1, 0), np.zeros(1, dtype=np.int64), steps=1001, guidance=1.0)
