"""The possible values of a DiT's config.json."""

from __future__ import annotations

from typing import Literal

from .patch_values import PatchValues


class DiTValues(PatchValues):
    """Of `DiTTransformer2DModel`."""

    norm_type: Literal["ada_norm_zero"] = "ada_norm_zero"
