"""PSNR and SSIM, against torchmetrics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from dq_export.core.likeness import psnr, ssim


@pytest.mark.parametrize("shape", [(3, 1, 16, 16), (2, 3, 24, 40), (1, 3, 6, 11)])
@pytest.mark.parametrize("noise", [0.01, 0.5])
def test_numbers_are_those_of_torchmetrics(shape: tuple[int, ...], noise: float) -> None:
    random = np.random.default_rng(0)
    smooth = np.sin(np.linspace(0, 6, shape[-1])) * np.cos(np.linspace(0, 4, shape[-2]))[:, None]
    exact = np.broadcast_to(smooth, shape).astype(np.float32)
    actual = np.clip(exact + noise * random.standard_normal(shape), -1, 1).astype(np.float32)
    pair = torch.from_numpy(actual.astype(np.float64)), torch.from_numpy(exact.astype(np.float64))
    expected = [peak_signal_noise_ratio(x[None], y[None], data_range=(-1.0, 1.0)) for x, y in zip(*pair, strict=True)]
    assert psnr(exact, actual) == pytest.approx(float(np.mean(expected)), abs=1e-4)
    similar = structural_similarity_index_measure(*pair, data_range=2.0)
    assert isinstance(similar, torch.Tensor)
    assert ssim(exact, actual) == pytest.approx(float(similar), abs=1e-6)


def test_equal_pictures_are_alike_and_small_ones_have_no_windows() -> None:
    picture = np.random.default_rng(0).uniform(-1, 1, (2, 3, 12, 12)).astype(np.float32)
    assert (psnr(picture, picture), ssim(picture, picture)) == (200.0, pytest.approx(1.0, abs=1e-12))
    assert ssim(picture[..., :5], picture[..., :5]) is None
    broken = np.full_like(picture, np.nan)
    assert psnr(picture, broken) == -200.0
