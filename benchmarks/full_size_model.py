"""The full-size model of `benchmarks/full_size.py`: its folder, the flags of its export, its float network and a call of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

CONDITIONS = "conditions.safetensors"
MADE_BY = {
    "dit": ("dit_xl.py",),
    "pixart": ("pixart_xl.py",),
    "sd35-medium": ("mmdit_xl.py", "--network", "sd35-medium"),
    "flux-dev": ("mmdit_xl.py", "--network", "flux-dev"),
    "sd1.5": ("unet_xl.py", "--network", "sd1.5"),
    "sdxl": ("unet_xl.py", "--network", "sdxl"),
}
SIDE = 512
"""Pixels along an axis of FLUX's pictures."""


def model_folder(path: Path, network: str, layers: str, *, pickle: bool) -> Path:
    """Return the folder of the full-size checkpoint. It is made if it does not exist."""
    if not path.exists():
        script, *words = MADE_BY[network]
        words += [*(["--layers", layers] if layers else []), *(["--pickle"] if pickle else [])]
        subprocess.run([sys.executable, Path(__file__).with_name(script), path, *words], check=True)
    return path


def flags_of(model: Path) -> list[str]:
    """Return the flags of a model: its file of conditions, and the size of FLUX's pictures."""
    flags = ["--conditions", str(model / CONDITIONS)] if (model / CONDITIONS).exists() else []
    return [*flags, *(["--sizes", f"{SIDE}x{SIDE}"] if _is_flux(model) else [])]


def _is_flux(model: Path) -> bool:
    classes = (json.loads(path.read_text()).get("_class_name") for path in model.glob("*/config.json"))
    return "FluxTransformer2DModel" in classes


def reference_of(model: Path) -> Any:
    """Load the float network with its conditions and picture size."""
    from dq_export.core.condition_file import load_conditions
    from dq_export.families.source import load_reference

    reference: Any = load_reference(str(model))
    if _is_flux(model):
        reference.draw_at(SIDE, SIDE)
    if (model / CONDITIONS).exists():
        reference.conditions = load_conditions(model / CONDITIONS)
    return reference


def feed_of(reference: Any) -> dict[str, Any]:
    """Return the first network call of a picture: with its condition, and also without it if guidance needs that."""
    import numpy as np

    class FirstCall(Exception):
        pass

    def first(feed: dict[str, Any]) -> Any:
        raise FirstCall(feed)

    try:
        reference.draw(first, reference.noise(1, 0), np.asarray([1]), steps=4, guidance=reference.guidance)
    except FirstCall as call:
        feed: dict[str, Any] = call.args[0]
    return feed
