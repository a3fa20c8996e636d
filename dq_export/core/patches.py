"""What a convolution reads of images, as the rows of a GEMM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class Patches:
    """float32[B * H * W, C * height * width]: the patch behind each pixel of a convolution's result, made when it is asked for.

    All of them together would take as many times the images' memory as a patch has pixels.

    Args:
        images: float32[B, C, rows, columns], what a convolution reads.
        convolution: the torch.nn.Conv2d, of one group, padded with zeros.
    """

    def __init__(self, images: torch.Tensor, convolution: Any) -> None:
        self.images = images
        self.taps = convolution.kernel_size[0] * convolution.kernel_size[1]
        (top, left), (height, width) = convolution.padding, images.shape[2:]
        padded = images.new_zeros((*images.shape[:2], height + 2 * top, width + 2 * left))
        padded[:, :, top : top + height, left : left + width] = images
        for axis, size, stride in zip((2, 3), convolution.kernel_size, convolution.stride, strict=True):
            padded = padded.unfold(axis, size, stride)
        self.windows = padded

    def __len__(self) -> int:
        batch, _, rows, columns, *_ = self.windows.shape
        return int(batch * rows * columns)

    def __getitem__(self, chosen: torch.Tensor | slice) -> torch.Tensor:
        """float32[n, K]: some rows."""
        rows, columns = self.windows.shape[2:4]
        import torch

        place = torch.arange(len(self), device=self.images.device)[chosen]
        patches: torch.Tensor = self.windows[place // (rows * columns), :, place // columns % rows, place % columns]
        return patches.flatten(1)

    @property
    def device(self) -> torch.device:
        """Where the images lie."""
        return self.images.device

    def extremes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """float32[K] each: the least and the greatest value of every input."""
        low, high = self.images.amin((0, 2, 3)), self.images.amax((0, 2, 3))
        return low.repeat_interleave(self.taps), high.repeat_interleave(self.taps)
