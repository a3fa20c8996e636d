"""What calibration, passes and parity rely on in every model family, on tiny models, against diffusers itself.

A family of the product, and one that is not a DiT and that the product does not know, pass the same tests.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, SEED, Case, loaded
from conftest import feed_of, recipe_of, run_onnx, sqnr
from folds import fold_at_random

from dq_export.calibration.calibrate import site_schemes
from dq_export.calibration.collect.calls import Calls
from dq_export.calibration.collect.sampling import Sampling
from dq_export.calibration.collect.statistics import collect_ranges
from dq_export.core.network import BATCH, Axis, arguments
from dq_export.core.patches import Patches
from dq_export.core.recipe import Recipe
from dq_export.deploy.openvino.engine import load_engine
from dq_export.families import FAMILIES
from dq_export.families.checkpoint import configuration, digest
from dq_export.families.float_graph import load
from dq_export.families.loading import make_empty
from dq_export.families.source import load_reference
from dq_export.passes.base import run_passes
from dq_export.passes.canonical.fold_transpose import FoldTranspose
from dq_export.passes.canonical.merge_duplicates import MergeDuplicates
from dq_export.preparation import resolve

pytestmark = pytest.mark.usefixtures("toy_known")
SAME = 100
"""dB of float32 rounding: 120 to 130 are seen."""


SLOW = ("pixart-alpha", "unet-xl", "unet-inpaint", "unet-refiner", "unet-lcm", "ddpm")
"""Cases that differ from another one in few inputs."""


@pytest.fixture(scope="module", params=[pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES])
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def folder(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return case.save(tmp_path_factory.mktemp(case.family.name))


@pytest.fixture(scope="module")
def reference(folder: Path, case: Case) -> Any:
    return loaded(folder, case)


@pytest.fixture(scope="module", params=[True, False], ids=["shared", "per-sample"])
def graph(request: pytest.FixtureRequest, reference: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bool]:
    """The float graph, and whether all samples share one timestep."""
    path = tmp_path_factory.mktemp("graph") / "model.onnx"
    reference.export_onnx(path, shared=request.param)
    return path, request.param


def timesteps_of(reference: Any) -> list[float]:
    """The first, the last and some between; a fractional one if the network takes it."""
    fractional = np.issubdtype(np.dtype(reference.inputs[1].dtype), np.floating)
    if max(reference.timesteps(3)) <= 1:
        return [0, 0.001, 0.74925, 1]
    return [0, 1, 749.25 if fractional else 749, 999]


def test_every_family_has_a_case() -> None:
    assert {family.name for family in FAMILIES} < set(CASES)


def test_the_inputs_are_those_that_the_network_takes(case: Case, reference: Any) -> None:
    import inspect

    parameters = inspect.signature(type(reference.model).forward).parameters
    state, timestep, *conditions = reference.inputs
    assert {item.within or item.name for item in reference.inputs} <= set(parameters)
    assert (state.role, timestep.role, timestep.name) == ("state", "timestep", "timestep")
    assert {item.role for item in conditions} <= {"condition", "setting"}
    assert all(item.shape[0] is BATCH for item in reference.inputs if item.role != "setting")
    assert reference.noise(2, 0).shape == (2, *reference.feed_shape)
    channels, *sizes = reference.feed_shape
    assert sizes == list(state.zeros().shape[2:])
    assert channels <= state.zeros().shape[1], "a state may also hold a mask and a picture"
    rows, null = reference.conditions.rows(np.asarray([0])), reference.conditions.null_rows(1)
    assert bool(null) == (reference.guided_by == "null")
    for item in (item for item in conditions if item.role == "condition"):
        for actual in (rows[item.name], *([null[item.name]] if null else [])):
            assert (actual.shape, actual.dtype) == (item.zeros(1).shape, item.dtype)


def test_the_configuration_that_an_export_writes_gives_the_inputs_again(case: Case, reference: Any) -> None:
    """All but the sizes of this reference's own conditions."""

    def tensors_of(inputs: Any) -> list[Any]:
        shapes = [[replace(axis, size=1) if isinstance(axis, Axis) else axis for axis in item.shape] for item in inputs]
        return [replace(item, shape=tuple(shape)) for item, shape in zip(inputs, shapes, strict=True)]

    config = json.loads(json.dumps(reference.config))
    model = make_empty(case.family.network_class(config["_class_name"]), case.family.values, Path("config.json"), config)
    assert tensors_of(case.family.inputs(model)) == tensors_of(reference.inputs)
    assert configuration(model) == reference.config


def test_the_rules_match_every_linear_and_say_why_one_is_skipped(reference: Any) -> None:
    assigned = recipe_of(reference).assign(reference.linears)
    quantized = {name for name, rule in assigned.items() if rule.scheme.activation is not None}
    assert quantized == {linear for site in reference.sites for linear in site.linears}
    assert all(rule.reason for name, rule in assigned.items() if name not in quantized)


def test_sites_are_the_inputs_of_the_gemms_in_execution_order(reference: Any) -> None:
    linears = [linear for site in reference.sites for linear in site.linears]
    assert sorted(linears) == sorted(name for name, linear in reference.linears.items() if linear.role in ("gemm", "static"))
    for site in reference.sites:
        assert site.name == site.linears[0]
        width = {reference.weight(linear).shape[1] for linear in site.linears}
        assert len(width) == 1, "readers of one tensor have one width"
        for part in site.fold.of_kind("linear"):
            (start, stop), (first, last) = part.rows, part.channels
            assert 0 <= start < stop <= len(reference.weight(part.name))
            assert stop - start == last - first <= max(width)
    calls = []
    with reference.observe(lambda name, value: calls.append(name)):
        reference.forward(feed_of(reference))
    assert calls == [site.name for site in reference.sites]


def test_the_graph_shows_every_linear_of_the_network(reference: Any) -> None:
    """A linear that the analysis misses would silently stay float. Convolutions count in the blocks."""
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    modules = {name: module for name, module in reference.model.named_modules() if isinstance(module, kinds)}
    assert {name: (linear.width, linear.convolution) for name, linear in reference.linears.items()} == {
        name: (module.weight[0].numel(), isinstance(module, torch.nn.Conv2d))
        for name, module in modules.items()
        if isinstance(module, torch.nn.Linear) or any(part.isdigit() for part in name.split("."))
    }


def test_folding_random_scalings_leaves_the_float_output_unchanged(graph: tuple[Path, bool], reference: Any) -> None:
    path, shared = graph
    model = load(path)
    model.ir_version = 10
    run_passes(model, [FoldTranspose(), MergeDuplicates()])
    fold_at_random(model, [site.name for site in reference.sites], convolutions=True)
    feed = feed_of(reference, 500 if shared else [500, 3, 999])
    exact, actual = reference.forward(feed), run_onnx(model, feed)
    assert 0 < np.abs(actual - exact).max() < 1e-5 * np.abs(exact).max()


def test_all_readers_of_a_site_read_what_is_observed(reference: Any) -> None:
    observed: dict[str, Any] = {}
    values: dict[str, Any] = {}

    def hook(name: str) -> Any:
        return lambda _, inputs: values.__setitem__(name, inputs[0].detach().clone())

    handles = [reference.model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in reference.linears]
    with reference.observe(lambda name, value: observed.__setitem__(name, value[:].clone())):
        reference.forward(feed_of(reference))
    for handle in handles:
        handle.remove()
    for site in reference.sites:
        assert observed[site.name].ndim == 2
        assert observed[site.name].dtype == torch.float32
        for linear in site.linears:
            module = reference.model.get_submodule(linear)
            convolves = isinstance(module, torch.nn.Conv2d)
            rows = Patches(values[linear], module)[:] if convolves else values[linear].flatten(0, -2)
            assert torch.equal(observed[site.name], rows)


def test_observing_ends_also_when_the_network_fails(reference: Any) -> None:
    def fail(name: str, value: Any) -> None:
        raise KeyError(name)

    with pytest.raises(KeyError), reference.observe(fail):
        reference.forward(feed_of(reference))
    assert not any(module._forward_pre_hooks for module in reference.model.modules())


def test_loading_reports_its_progress(folder: Path) -> None:
    calls: list[tuple[int, int]] = []
    load_reference(str(folder), lambda done, total: calls.append((done, total)))
    assert len(calls) > 10
    assert calls == [(i + 1, len(calls)) for i in range(len(calls))]


def test_the_digest_is_of_configuration_and_weights(case: Case, reference: Any, folder: Path, tmp_path: Path) -> None:
    assert load_reference(str(folder)).digest == reference.digest
    shutil.copytree(folder, tmp_path / "other")
    path = tmp_path / "other" / case.family.part / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **case.changes}))
    assert load_reference(str(tmp_path / "other")).digest != reference.digest
    other: Any = load_reference(str(folder))
    other.model.get_submodule(next(iter(other.linears))).weight.data[0, 0] += 1e-3
    assert digest([other.model], other.scheduler) != reference.digest


def test_the_graph_has_the_networks_inputs(graph: tuple[Path, bool], reference: Any) -> None:
    import onnx_ir as ir

    path, shared = graph
    actual, arguments = ir.load(path).graph, [item.name for item in reference.inputs]
    assert [value.name for value in actual.inputs] == arguments
    assert [value.dtype.numpy() for value in actual.inputs if value.dtype] == [item.dtype for item in reference.inputs]
    assert [value.name for value in actual.outputs] == ["out_sample" if "sample" in arguments else "sample"]
    for value, item in zip(actual.inputs, reference.inputs, strict=True):
        sizes = [axis.name if isinstance(axis, Axis) else axis for axis in item.shape]
        if shared and item.role == "timestep":
            sizes = [1]
        assert value.shape is not None
        assert [size if isinstance(size, int) else str(size.value) for size in value.shape] == sizes
    assert actual.opset_imports == {"": 21}


@pytest.mark.parametrize("batch", [1, 3])
def test_the_graph_is_the_network_at_every_timestep(batch: int, graph: tuple[Path, bool], reference: Any) -> None:
    path, shared = graph
    for timestep in timesteps_of(reference):
        feed = feed_of(reference, timestep if shared else [timestep] * batch, samples=batch)
        assert sqnr(reference.forward(feed), run_onnx(path, feed)) > SAME


def test_samples_of_one_call_may_have_their_own_timesteps(graph: tuple[Path, bool], reference: Any) -> None:
    path, shared = graph
    timesteps = timesteps_of(reference)
    feed = feed_of(reference, timesteps, samples=4)
    mixed = reference.forward(feed)
    if not shared:
        assert sqnr(mixed, run_onnx(path, feed)) > SAME
    for i, timestep in enumerate(timesteps):
        one = {item.name: feed[item.name][i : i + 1] if item.batched else feed[item.name] for item in reference.inputs}
        assert sqnr(reference.forward(one), mixed[i : i + 1]) > SAME, timestep  # sums run in an order that depends on the batch


def test_the_graph_takes_other_sizes(graph: tuple[Path, bool], reference: Any) -> None:
    """Also on OpenVINO, where it is installed, with a fixed batch, which leaves the other sizes open."""
    path, shared = graph
    feed = feed_of(reference, 500 if shared else [500] * 3)
    changed, rng = dict(feed), np.random.default_rng(0)
    for item in reference.inputs:
        sizes = [axis.size + 3 * axis.multiple if isinstance(axis, Axis) else axis for axis in item.shape]
        if item.batched:
            sizes[0] = 3
        if sizes != list(item.zeros(3).shape):  # of values that the network knows: a mask has 0 and 1
            changed[item.name] = rng.choice(feed[item.name].reshape(-1), size=sizes)
    exact = reference.forward(changed)
    assert sqnr(exact, run_onnx(path, changed)) > SAME
    if importlib.util.find_spec("openvino") is not None:
        assert sqnr(exact, load_engine(path, {"INFERENCE_PRECISION_HINT": "f32"}, 3)(changed)) > SAME


def test_the_network_is_diffusers_own(case: Case, folder: Path, reference: Any) -> None:
    network = case.family.network_class(case.family.architectures[0]).from_pretrained(folder / case.family.part).eval()
    for timestep in timesteps_of(reference):
        feed = feed_of(reference, [timestep] * 3)
        with torch.no_grad():
            tensors = {name: torch.from_numpy(rows) for name, rows in feed.items()}
            exact = network(**arguments(reference.inputs, tensors), return_dict=False)[0].numpy()
        assert sqnr(exact, reference.forward(feed)) > 90  # a settled embedding's last bit is multiplied by the timestep


@pytest.mark.parametrize("timesteps", [500, [100, 500, 900]], ids=["shared", "per-sample"])
def test_a_large_call_is_computed_row_by_row(timesteps: int | list[int], reference: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    feed = feed_of(reference, timesteps)
    whole = reference.forward(feed)
    sizes: list[int] = []
    watch = reference.model.register_forward_pre_hook(
        lambda module, inputs, named: sizes.append(len(named[reference.inputs[0].name])), with_kwargs=True
    )
    monkeypatch.setattr(reference, "rows", 2)
    parts = reference.forward(feed)
    watch.remove()
    assert sizes == [2, 1]
    assert sqnr(whole, parts) > SAME


def test_blocks_one_by_one_are_the_network(reference: Any) -> None:
    feed = feed_of(reference, [100, 500, 900])
    chain, outputs = reference.chain(feed), list[Any]()
    assert reference.blocks
    for index, sources in enumerate(chain.sources):
        outputs.append(chain.run(index, feed, [leaf for source in sources for leaf in outputs[source]]))
    np.testing.assert_array_equal(outputs[-1][0].numpy(), reference.forward(feed))
    assert reference.tower == (() if reference.family.chain_lists else reference.blocks)


@pytest.mark.parametrize("guidance", [1.5, 4.0])
def test_pictures_are_those_of_diffusers_own_pipeline(guidance: float, case: Case, folder: Path, reference: Any) -> None:
    chosen = np.asarray([1, 3])
    exact = case.draw(folder, reference, chosen, guidance)
    actual = reference.draw(reference.forward, reference.noise(2, SEED), chosen, steps=4, guidance=guidance)
    assert np.abs(actual - exact).max() <= 1e-5 * np.abs(exact).max()
    assert exact.std() > 0.05, "a picture that is one colour would prove nothing"


def test_drawing_again_gives_the_same_bits(case: Case, folder: Path, reference: Any) -> None:
    chosen = np.asarray([1, 2])
    latents = []
    timesteps: list[float] = []
    for one in (reference, loaded(folder, case)):
        one.timesteps(5)  # a rehearsal changes nothing
        latents.append(one.draw(one.forward, one.noise(2, SEED), chosen, steps=4, guidance=2.0))
    np.testing.assert_array_equal(*latents)
    reference.trajectory(
        chosen, steps=4, seed=SEED, guidance=2.0, before=lambda feed: timesteps.append(float(feed["timestep"][0]))
    )
    assert timesteps == reference.timesteps(4)


def test_a_calibration_that_was_killed_goes_on_behind_its_last_pictures(reference: Any, tmp_path: Path) -> None:
    sampling = Sampling(calib_size=3, steps=2, seed=0, guidance=2.0, conditions=len(reference.conditions), batch=1)
    names = tuple(site.name for site in reference.sites)
    whole = collect_ranges(Calls(denoiser=reference, sampling=sampling), names, tmp_path / "whole")

    def die(done: int, total: int, unit: str = "") -> None:
        if done == 3:  # in the second picture
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect_ranges(Calls(denoiser=reference, sampling=sampling, progress=die), names, tmp_path / "part")
    calls: list[int] = []
    watched = Calls(denoiser=reference, sampling=sampling, progress=lambda done, total, unit="": calls.append(done))
    rest = collect_ranges(watched, names, tmp_path / "part")
    assert calls[0] == 2, "the first picture is not sampled again"
    for name in names:
        np.testing.assert_array_equal(rest[name].low, whole[name].low)
        np.testing.assert_array_equal(rest[name].high, whole[name].high)
        np.testing.assert_array_equal(rest[name].rows, whole[name].rows)


def test_w4a8_with_its_defaults_gives_the_readers_of_one_input_one_scheme(reference: Any) -> None:
    recipe = Recipe.parse({"model": "m", "bits": "w4a8", "group_size": 0}, "test")
    assigned = resolve(recipe, (), reference, None).assign(reference.linears)
    assert site_schemes(reference.sites, assigned)
    wide = {name for name, rule in assigned.items() if rule.action == "w8a8"}
    assert bool(wide) == bool(reference.tower)
