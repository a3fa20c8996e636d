"""From what the user typed after --model to a loaded reference."""

from __future__ import annotations

import json
import re
from pathlib import Path

from dq_export.calibration.collect import Progress, unwatched
from dq_export.calibration.recipe import nearest

from . import FAMILIES
from .reference import ModelError, Reference, transformer_folder

PACKAGED = Path(__file__).parent.parent / "models"
NAMED: dict[str, tuple[str, float]] = {
    "dit": ("facebook/DiT-XL-2-256", 4.0),
    "dit-digits": (str(PACKAGED / "dit-digits"), 2.0),
}
"""Short names: a folder or hub id, and the guidance scale that suits it."""


def load_reference(model: str, progress: Progress = unwatched) -> Reference:
    """Load a short name, a local folder or a hub id.

    Args:
        progress: called with (tensors read, tensors in all).

    Raises:
        ModelError: nothing by that name, no network, or a checkpoint that cannot be used.
    """
    folder, guidance = locate(model), NAMED.get(model, ("", 0.0))[1]
    config = _transformer_config(folder)
    for family in FAMILIES:
        if config.get("_class_name") == family.architecture:
            return family.load(folder, guidance or family.default_guidance, progress)
    known = ", ".join(f"{family.architecture} (family {family.name})" for family in FAMILIES)
    raise ModelError(f"{folder}: architecture {config.get('_class_name')!r} is not supported; supported: {known}")


def require_device(device: str) -> None:
    """Ask for a device before anything is loaded.

    Raises:
        ModelError: PyTorch has it not.
    """
    import torch

    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ModelError(f"--device '{device}': expected cpu, cuda or cuda:N")
    index = int(device.partition(":")[2] or 0)
    if device != "cpu" and torch.cuda.device_count() <= index:
        raise ModelError(
            f"--device {device}: PyTorch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices; pass --device cpu, "
            "or install a CUDA build of PyTorch"
        )


def locate(model: str) -> Path:
    """The local folder of a short name, a folder or a hub id, downloaded if need be.

    Raises:
        ModelError: nothing by that name, or no network.
    """
    source = NAMED.get(model, (model, 0.0))[0]
    folder = Path(source)
    if not folder.is_dir():
        if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) and not folder.exists():
            folder = _download(source)
        else:
            expected = f"expected {', '.join(NAMED)}, a hub id (owner/name) or a local folder"
            raise ModelError(f"model '{model}': no such model or folder; {expected}.{nearest(model, list(NAMED))}")
    return folder


def _transformer_config(folder: Path) -> dict[str, object]:
    path = transformer_folder(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{folder}: no transformer/config.json and no config.json; is it a diffusers folder?") from error
    except (ValueError, OSError) as error:
        raise ModelError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return config


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = ["model_index.json", "transformer/*", "scheduler/*", "vae/config.json", "config.json", "*.safetensors"]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except HFValidationError as error:
        raise ModelError(f"model '{hub_id}': no such folder, and no hub id ({error})") from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"model '{hub_id}': the hub has no such model, or it is private; log in with `hf auth login`") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ModelError(
            f"model '{hub_id}': neither in the local cache nor reachable on the hub. Either run this once where there is "
            f"a network, `hf download {hub_id}`, and copy the cache; or pass a local folder: --model path/to/folder"
        ) from error
