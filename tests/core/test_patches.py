"""Patches of images are the rows of the GEMM that a convolution is."""

from __future__ import annotations

import pytest
import torch

from dq_export.core.patches import Patches


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (3, 2, 0), (1, 1, 0), ((1, 3), (2, 1), (0, 1))])
def test_a_convolution_is_a_product_with_the_patches(kernel: object, stride: object, padding: object) -> None:
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(5, 7, kernel, stride, padding, bias=False)  # type: ignore[arg-type]
    images = torch.randn(2, 5, 8, 6)
    with torch.no_grad():
        exact = convolution(images).permute(0, 2, 3, 1).flatten(0, 2)
        patches, weight = Patches(images, convolution), convolution.weight.flatten(1)
        torch.testing.assert_close(patches[:] @ weight.T, exact)
    assert len(patches) == len(exact)
    chosen = torch.tensor([0, len(exact) - 1, 3])
    torch.testing.assert_close(patches[chosen], patches[:][chosen])
    torch.testing.assert_close(patches[::4], patches[:][::4])


def test_the_extremes_are_those_of_each_channel_for_all_its_taps() -> None:
    images = torch.tensor([[[[-3.0, 2.0], [0.0, 1.0]], [[5.0, 4.0], [6.0, 7.0]]]])
    low, high = Patches(images, torch.nn.Conv2d(2, 1, (1, 2))).extremes()
    assert low.tolist() == [-3, -3, 4, 4]
    assert high.tolist() == [2, 2, 7, 7]
