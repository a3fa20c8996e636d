"""Small real models that the tests build themselves, and their calibration."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import command_line
import numpy as np
import onnx_ir as ir
import pytest
import server
import small_graphs
from hypothesis import settings
from made_once import made_once
from traced_once import TracedOnce

from dq_export import pipeline
from dq_export.calibration.calibrate import calibrate
from dq_export.calibration.collect.sampling import Sampling
from dq_export.calibration.context import Calibration
from dq_export.core.artifacts import CalibrationResult
from dq_export.core.recipe import Recipe
from dq_export.core.rule import Rule
from dq_export.families import torch_export
from dq_export.families.float_graph import load
from dq_export.families.reference import Reference
from dq_export.families.sampling import noise_of
from dq_export.families.source import load_reference
from dq_export.report.report import Report
from dq_export.stages.conditions import ENCODE
from dq_export.stages.distill import DISTILL
from dq_export.stages.layout import LAYOUT

# Several processes of tests share the cores; PyTorch reads this when it is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Hypothesis stops a test at 200 ms an example: on a busy machine that is a timed assertion.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 2,
    "out_channels": 2,
    "num_layers": 2,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 5,
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
}

QUICK: dict[str, Any] = {"steps": 4, "calib_size": 2, "min_sqnr": 10}
"""Of an export of the tiny DiT, which takes seconds then."""
SERVED_STEPS = 12
STAGES = tuple(stage.name for stage in pipeline.STAGES if stage not in (ENCODE, DISTILL, LAYOUT))
"""Of a network that draws no prompts, trains no blocks, and is written as no pipeline's folder."""
UNSERVED = [stage for stage in STAGES if stage != "triton"]
"""The stages of an export without a repository."""


def pytest_xdist_auto_num_workers() -> int:
    """One process more than there are cores, since some wait for a server or a child; four at most, for their memory."""
    return min((os.cpu_count() or 1) + 1, 4)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the contract's second graph of a large network, of a timestep for each sample, as slow: engines' tests have it."""
    for item in items:
        params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        if params.get("case") in ("pixart", "sd3", "flux", "flux2", "unet") and params.get("graph") is False:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def equal_small_graphs() -> None:
    """Random values of small graphs do not depend on the tests that ran before in the same process."""
    small_graphs.RANDOM.bit_generator.state = small_graphs.START


@pytest.fixture(scope="session", autouse=True)
def exporter_called_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Calls of PyTorch's exporter with equal networks are one call; interpreters that a test starts call it themselves."""
    root = root_of(tmp_path_factory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_export, "trace", TracedOnce(root).trace)
        patch.setattr(command_line, "TRACES", root)
        yield


PROMPTED_STEPS = 8


class Nobody:
    """A client of a sampler that listens to nothing."""

    def preview(self, step: int, latents: Any) -> None: ...

    def done(self, latents: Any) -> None: ...

    def failed(self, error: Exception) -> None: ...

    def disconnected(self) -> bool:
        return False


def save_tiny(folder: Path, **changes: Any) -> Path:
    """A DiT of 2 blocks and width 32 with seeded random weights, as a diffusers pipeline folder."""
    import torch
    from diffusers import DDIMScheduler, DiTTransformer2DModel

    torch.manual_seed(0)
    model = DiTTransformer2DModel(**{**TINY, **changes})
    with torch.no_grad():
        for name, value in model.named_parameters():
            # diffusers' own initialisation leaves modulation and biases too small to show a wrong fold.
            value.copy_(torch.randn_like(value) * (0.5 / value.shape[-1] ** 0.5 if value.ndim > 1 else 0.2))
            if ".emb." in name:
                value.copy_(model.get_parameter(re.sub(r"(transformer_blocks)\.\d+", r"\1.0", name)))  # a DiT has one for all
    model.save_pretrained(folder / "transformer", safe_serialization=True)
    DDIMScheduler(beta_schedule="linear", clip_sample=False).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline"}))
    return folder


def shared(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that the first process of the tests that asks for it makes for all of them. Tests leave it as it is, or copy it.

    Args:
        make: writes the folder, which does not exist yet.
    """
    return made_once(root_of(factory), name, make)


def root_of(factory: pytest.TempPathFactory) -> Path:
    """The temporary folder that all processes of the tests share; each has a folder of its own in it."""
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared(tmp_path_factory, "tiny", save_tiny)


@pytest.fixture(scope="session")
def tiny_exported(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of an export of the tiny DiT with the flags of `QUICK`."""
    import dq_export

    def make(folder: Path) -> None:
        dq_export.export(model=str(tiny_folder), output_dir=folder, **QUICK)

    return shared(tmp_path_factory, "tiny-exported", make)


def export_untimed(model: Path, out: Path, *, until: str = "verify", **options: Any) -> Report:
    """As `dq_export.export`, without the timing at its end, which takes two seconds.

    Args:
        until: the last stage.
    """
    import dq_export

    return dq_export._run(until, str(model), out, options)


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> Reference:
    return load_reference(str(tiny_folder))


@pytest.fixture(scope="session")
def tiny_onnx(tiny: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The float ONNX graph with one timestep a batch. Load it anew for each test."""
    path = tmp_path_factory.mktemp("tiny-onnx") / "float.onnx"
    tiny.export_onnx(path, shared=True)
    return path


@pytest.fixture(scope="session")
def tiny_onnx_per_sample(tiny: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The float ONNX graph with a timestep for each sample."""
    path = tmp_path_factory.mktemp("tiny-onnx") / "float.onnx"
    tiny.export_onnx(path, shared=False)
    return path


def recipe_of(reference: Reference, **options: Any) -> Recipe:
    """A resolved recipe for a reference."""
    rules = options.pop("rules", reference.rules)
    return Recipe.parse({"model": "tiny", "steps": 5, "calib_size": 4, **options}, "test").model_copy(update={"rules": rules})


def calibration_of(reference: Reference, recipe: Recipe, folder: Path, **more: Any) -> Calibration:
    """What a calibration of a tiny model works on; `more` are other fields of it."""
    sampling = Sampling(
        calib_size=recipe.calib_size, steps=recipe.steps, seed=recipe.seed, guidance=2.0, conditions=len(reference.conditions)
    )
    assigned = recipe.assign(reference.linears)
    return Calibration(denoiser=reference, recipe=recipe, assigned=assigned, sampling=sampling, folder=folder, **more)


def calibrate_tiny(reference: Reference, recipe: Recipe) -> tuple[CalibrationResult, Mapping[str, Rule]]:
    """The calibration of a tiny model, and its assigned rules."""
    with tempfile.TemporaryDirectory() as folder:
        calibration = calibration_of(reference, recipe, Path(folder))
        result = calibrate(calibration)
    assert result is not None
    return result, calibration.assigned


@pytest.fixture(scope="session")
def tiny_calibrated(tiny: Reference) -> tuple[CalibrationResult, Mapping[str, Rule]]:
    """Smooth with shift, so that every fold of the graph has work to do."""
    return calibrate_tiny(tiny, recipe_of(tiny, scaling="smooth", shift=True, bins="per-step", method="minmax"))


def feed_of(reference: Reference, timestep: int | list[int] = 500, samples: int = 3, seed: int = 1) -> dict[str, Any]:
    """A network call's inputs."""
    state, time = reference.inputs[:2]
    conditions = np.arange(samples) % len(reference.conditions)
    timesteps = np.atleast_1d(np.asarray(timestep, dtype=time.dtype))
    settings = {item.name: np.full_like(item.zeros(samples), 3.5) for item in reference.inputs if item.role == "setting"}
    for item in reference.inputs:
        if item.name in settings and not item.batched:  # positions, in the order of the tokens
            settings[item.name][:] = np.arange(settings[item.name].size).reshape(-1, 3) % (5, 6, 7)
    values = {
        state.name: noise_of(state.zeros().shape[1:], samples, seed),
        time.name: timesteps,
        **reference.conditions.rows(conditions),
        **settings,
    }
    return {item.name: values[item.name] for item in reference.inputs}


def run_onnx(model: ir.Model | Path, feed: dict[str, Any], *, optimize: bool = False) -> np.ndarray[Any, Any]:
    """A model's only output on ONNX Runtime CPU, graph optimisation off unless asked for."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    source = str(model) if isinstance(model, Path) else ir.serde.serialize_model(model).SerializeToString()
    session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    result: np.ndarray[Any, Any] = session.run(None, feed)[0]
    return result


def load_graph(path: Path) -> ir.Model:
    """A fresh copy of an exported graph, in an IR version that ONNX Runtime loads."""
    model = load(path)
    model.ir_version = 10
    for initializer in model.graph.initializers.values():  # the file may be gone when the test reads it
        assert initializer.const_value is not None
        initializer.const_value = ir.tensor(np.array(initializer.const_value.numpy()), name=initializer.name)
    return model


def sqnr(reference: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    """Signal to noise in dB."""
    noise = np.square(reference.astype(np.float64) - other).sum()
    return float(10 * np.log10(np.square(reference.astype(np.float64)).sum() / max(noise, 1e-300)))


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder with its repository in `triton/`."""
    import dq_export

    def make(folder: Path) -> None:
        dq_export.export(model="dit-digits", output_dir=folder, triton=True, calib_size=4, steps=SERVED_STEPS, parity_size=2)

    return shared(tmp_path_factory, "exported", make)


@pytest.fixture(scope="session")
def prompted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder of the small model that draws prompts, with its repository in `triton/`."""
    import dq_export

    def make(folder: Path) -> None:
        more: dict[str, Any] = {"calib_size": 4, "parity_size": 2, "steps": PROMPTED_STEPS, "scaling": "none"}
        dq_export.export(model="pixart-digits", output_dir=folder, bits="w8a8", triton=True, **more)

    return shared(tmp_path_factory, "prompted", make)


@pytest.fixture(scope="module")
def toy_known() -> Iterator[None]:
    """The toy family of tests/contract stands beside the product's."""
    from toy import TOY

    from dq_export import families

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(families, "FAMILIES", (*families.FAMILIES, TOY))
        yield


@pytest.fixture
def repository(exported: Path, tmp_path: Path) -> Path:
    """A copy of the repository, to be changed."""
    shutil.copytree(exported / "triton", tmp_path / "repository")
    return tmp_path / "repository"


@pytest.fixture(scope="session")
def running(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[server.Server]:
    """One server for all tests that leave it as it was; models are loaded and unloaded by clients."""
    reason = server.missing()
    if reason:
        pytest.skip(reason)
    options = ("--model-control-mode=explicit", "--load-model=*")
    with server.serving(exported / "triton", tmp_path_factory.mktemp("server"), *options, wait="ready") as running:
        yield running


@pytest.fixture(scope="session")
def texts(prompted: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[server.Server]:
    """A server that draws prompts, for all tests that leave it as it was."""
    if server.missing():
        pytest.skip(server.missing())
    options = ("--model-control-mode=explicit", "--load-model=*")
    with server.serving(prompted / "triton", tmp_path_factory.mktemp("texts"), *options, wait="ready") as running:
        yield running


@pytest.fixture
def text_client(texts: server.Server) -> Iterator[Any]:
    """As `client`, of the server that draws prompts."""
    with whole_after(texts) as connected:
        yield connected


@pytest.fixture
def client(running: server.Server) -> Iterator[Any]:
    """A grpc client; the server must still be whole when the test ends."""
    with whole_after(running) as connected:
        yield connected


@contextmanager
def whole_after(running: server.Server) -> Iterator[Any]:
    """A grpc client of a server that must still be whole at the end."""
    import tritonclient.grpc as grpc

    connected = grpc.InferenceServerClient(running.grpc)
    yield connected
    assert running.process.poll() is None
    assert connected.is_server_ready()
    connected.close()
