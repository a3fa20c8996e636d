"""All backends that --format, --provider and --dtype can name."""

from __future__ import annotations

from dq_export.core.plugins import PluginError, load_plugins
from dq_export.core.recipe import Recipe, RecipeError

from .backend import Backend
from .onnxruntime.cpu import ORT
from .onnxruntime.cuda import OrtCuda
from .onnxruntime.plans import OrtTensorRt, OrtTensorRtRtx
from .openvino.backend import OpenVino
from .tensorrt.backend import TensorRt, TensorRtRtx

BACKENDS: tuple[Backend, ...] = (
    ORT,
    OpenVino("fp32"),
    OpenVino("bf16"),
    OrtCuda("fp16"),
    OrtCuda("fp32"),
    *(kind(dtype) for kind in (TensorRt, TensorRtRtx, OrtTensorRt, OrtTensorRtRtx) for dtype in ("fp16", "bf16", "fp32")),
)
"""The first backend of a format is its default."""


def all_backends() -> tuple[Backend, ...]:
    """dq-export's own backends and those of plug-ins.

    Raises:
        PluginError: a plug-in cannot be used, or its name differs from that of its backend.
    """
    added = load_plugins("backends", Backend, [backend.name for backend in BACKENDS])
    wrong = next((name for name, backend in added.items() if backend.name != name), None)
    if wrong is not None:
        raise PluginError(
            f"plug-in '{wrong}' (dq_export.backends): its backend is called '{added[wrong].name}'; give both one name"
        )
    return (*BACKENDS, *added.values())


def backend_of(recipe: Recipe) -> Backend | None:
    """The backend of a recipe; None for format `onnx`, which builds nothing.

    Raises:
        RecipeError: no backend runs that format, provider and dtype together, or format `onnx` stands beside options of engines.
    """
    if recipe.format == "onnx":
        if idle := _of_engines(recipe):
            raise RecipeError(
                f"--format onnx builds no engine, and its graph is float32 where it is not quantized: leave out {idle}"
            )
        return None
    backends = all_backends()
    candidates = [backend for backend in backends if backend.name == recipe.format]
    provider = recipe.provider or candidates[0].provider
    fitting = [backend for backend in candidates if backend.provider == provider and recipe.dtype in (None, backend.dtype)]
    if not fitting:
        supported = "; ".join(_flags(b.provider, b.dtype) for b in candidates)
        flags = _flags(provider, recipe.dtype)
        raise RecipeError(f"--format {recipe.format} does not run {flags}; it runs {supported}")
    if recipe.attention not in fitting[0].attention:
        others = (b.provider or b.name for b in backends if recipe.attention in b.attention)
        raise RecipeError(
            f"--format {recipe.format} does not run --attention {recipe.attention}; {', '.join(dict.fromkeys(others))} do"
        )
    backend = fitting[0].configured(recipe)
    if recipe.rules is None:  # the family's rules then use `bits`: refuse it before weights are downloaded
        backend.require_schemes([recipe.scheme])
    return backend


def _of_engines(recipe: Recipe) -> str:
    """The options of a recipe that only an engine can have."""
    attention = f"--attention {recipe.attention}" if recipe.attention != "float" else ""
    return " ".join(filter(None, (_flags(recipe.provider, recipe.dtype if recipe.dtype != "fp32" else None), attention)))


def _flags(provider: str | None, dtype: str | None) -> str:
    return " ".join(f"--{name} {value}" for name, value in (("provider", provider), ("dtype", dtype)) if value)
