"""The heights and widths of pictures that a request may ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .conditions import BadRequestError

PARAMETERS = ("height", "width", "min_height", "max_height", "min_width", "max_width", "size_step", "latent_pixels")
"""The keys of `parameters` in config.pbtxt that hold sizes: whole numbers above 0, in pixels."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One side of a picture in pixels.

    Args:
        name: the input of requests, `height` or `width`.
        default, minimum, maximum: multiples of `step`.
    """

    name: str
    default: int
    minimum: int
    maximum: int
    step: int

    @property
    def varies(self) -> bool:
        """Whether a request can choose it."""
        return self.minimum < self.maximum

    def check(self, value: int) -> int:
        """Return a request's value.

        Raises:
            BadRequestError: the model does not draw it. The message names the nearest values that it draws.
        """
        if self.minimum <= value <= self.maximum and value % self.step == 0:
            return value
        if not self.varies:
            raise BadRequestError(
                f"{self.name} {value}: expected {self.minimum}, the only {self.name} that this model was exported for"
            )
        below = value // self.step * self.step
        nearest = sorted({min(max(size, self.minimum), self.maximum) for size in (below, below + self.step)})
        names = f"{'is' if len(nearest) == 1 else 'are'} {' and '.join(map(str, nearest))}"
        raise BadRequestError(f"{self.name} {value}: expected {self}; the nearest {names}")

    def __str__(self) -> str:
        return f"{self.minimum} to {self.maximum} in steps of {self.step}" if self.varies else f"{self.minimum}"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes of a model's pictures. A request chooses height and width independently.

    Args:
        pixels: pixels of a latent along a side.
    """

    height: Side
    width: Side
    pixels: int

    @staticmethod
    def of(values: Mapping[str, str]) -> Sizes:
        """Read the sizes from a config's parameters.

        Raises:
            KeyError, ValueError: a parameter is missing, is not a whole number, or does not fit the others.
        """
        number = {key: int(values[key]) for key in PARAMETERS}
        height, width = (
            Side(
                name=name, default=number[name], minimum=number[f"min_{name}"], maximum=number[f"max_{name}"],
                step=number["size_step"],
            )
            for name in ("height", "width")
        )  # fmt: skip
        for key in PARAMETERS[:-2]:
            if number[key] % height.step:
                raise ValueError(f"{key} {number[key]} is not a multiple of size_step {height.step}")
        if height.step % number["latent_pixels"]:
            raise ValueError(f"size_step {height.step} is not a multiple of latent_pixels {number['latent_pixels']}")
        for side in (height, width):
            side.check(side.default)
        return Sizes(height=height, width=width, pixels=number["latent_pixels"])

    @property
    def parameters(self) -> dict[str, int]:
        """The values of PARAMETERS."""
        height, width = self.height, self.width
        values = (height.default, width.default, height.minimum, height.maximum, width.minimum, width.maximum, height.step)
        return dict(zip(PARAMETERS, (*values, self.pixels), strict=True))

    @property
    def vary(self) -> bool:
        """Whether a request can choose its size."""
        return self.height.varies or self.width.varies

    def latents(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width of the latents of a picture.

        Raises:
            BadRequestError: see `Side.check`.
        """
        return self.height.check(height) // self.pixels, self.width.check(width) // self.pixels
