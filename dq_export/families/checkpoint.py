"""Reading a diffusers folder: what every family does alike."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dq_export.calibration.collect import Progress, unwatched

from .reference import ModelError


def refuse_pickles(folder: Path) -> None:
    """Let a folder with safetensors pass.

    Raises:
        ModelError: only pickles, with the conversion command, or no weights at all.
    """
    if any(folder.glob("*.safetensors")) or any(folder.glob("*.safetensors.index.json")):
        return
    pickles = sorted(path for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern))
    if pickles:
        new = folder / "diffusion_pytorch_model.safetensors"
        raise ModelError(
            f"{pickles[0]}: a pickle can run code when it is loaded, so only safetensors are read. Where you trust it, "
            f'convert it: python -c "import torch, safetensors.torch as s; '
            f"s.save_file(torch.load('{pickles[0]}', weights_only=True), '{new}')\""
        )
    raise ModelError(f"{folder}: no .safetensors file; expected diffusion_pytorch_model.safetensors")


def load_scheduler(folder: Path, default: Mapping[str, Any]) -> Any:
    """The diffusers scheduler of a pipeline folder; DDIM with `default` where it has none.

    Raises:
        ModelError: the folder names something that is no scheduler.
    """
    import diffusers

    path = folder / "scheduler" / "scheduler_config.json"
    if not path.exists():
        return diffusers.DDIMScheduler(**default)
    try:
        name = json.loads(path.read_text(encoding="utf-8"))["_class_name"]
    except (ValueError, KeyError, OSError) as error:
        raise ModelError(f"{path}: not a scheduler configuration ({error!r})") from error
    scheduler: Any = getattr(diffusers, name, None)
    if not (inspect.isclass(scheduler) and issubclass(scheduler, diffusers.SchedulerMixin)):
        raise ModelError(f"{path}: '{name}' is not a scheduler of diffusers {diffusers.__version__}")
    return scheduler.from_pretrained(path.parent)  # type: ignore[attr-defined]


def digest(model: Any, scheduler: Any, progress: Progress = unwatched) -> str:
    """sha256 of a diffusers model's configuration and weights and of its scheduler's configuration, hexadecimal.

    Where the folder lies does not matter. Tensors are hashed side by side, which releases the interpreter's lock.

    Args:
        progress: called with (tensors hashed, tensors in all).
    """
    settings = [_public(model.config), type(scheduler).__name__, _public(scheduler.config)]
    found = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    state = model.state_dict()
    with ThreadPoolExecutor() as pool:
        for done, (name, content) in enumerate(zip(state, pool.map(_content_hash, state.values()), strict=True), start=1):
            found.update(name.encode())
            found.update(content)
            progress(done, len(state))
    return found.hexdigest()


def broken_weights(model: Any) -> list[str]:
    """Names of the weights with NaN or Inf."""
    import torch

    # A sum is one quick pass; only where it is not finite (it may also have overflowed) is every element looked at.
    suspect = {name: value for name, value in model.state_dict().items() if not torch.isfinite(value.sum())}
    return [name for name, value in suspect.items() if not torch.isfinite(value).all()]


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _content_hash(value: Any) -> bytes:
    return hashlib.sha256(memoryview(value.contiguous().numpy()).cast("B")).digest()
