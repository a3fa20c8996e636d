"""What a package adds by entry points works as if it were dq-export's own, and a broken one ends in one line."""

from __future__ import annotations

import importlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from dq_export.calibration.ranges import method_of
from dq_export.core.artifacts import CalibrationResult
from dq_export.core.idle_options import require_used
from dq_export.core.plugins import PluginError, described_plugins, fault_of_plugin, plugin_names
from dq_export.core.qtypes import INT8
from dq_export.core.recipe import Recipe, RecipeError
from dq_export.core.scales import ScaleTable
from dq_export.core.scheme import scheme_of
from dq_export.deploy.backends import all_backends, backend_of
from dq_export.deploy.onnxruntime.cpu import ATTENTION_SINCE, version
from dq_export.families import FAMILIES, all_families
from dq_export.families.reference import ModelError
from dq_export.families.source import load_reference
from dq_export.passes.base import GraphError, check_order, run_passes
from dq_export.passes.pipeline import canonical_passes, with_plugins
from dq_export.pipeline import run

FOLDER = Path(__file__).parent
QUICK: dict[str, Any] = {"calib_size": 2, "steps": 4, "parity_size": 1, "scaling": "none", "min_sqnr": -200}


def recipe(**values: Any) -> Recipe:
    return Recipe.parse({**QUICK, **values}, "test")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package of tests/plugin is installed: its metadata and its modules are found."""
    for folder in ("contract", "plugin"):
        monkeypatch.syspath_prepend(FOLDER / folder)


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Installs a package with one entry point whose module has the given text."""

    def install(kind: str, text: str, name: str = "wild", target: str = "wild_plugin:thing") -> None:
        folder = tmp_path / "wild_plugin-2.1.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: wild-plugin\nVersion: 2.1\n")
        (folder / "entry_points.txt").write_text(f"[dq_export.{kind}]\n{name} = {target}\n")
        (tmp_path / "wild_plugin.py").write_text(text)
        monkeypatch.delitem(sys.modules, "wild_plugin", raising=False)
        monkeypatch.syspath_prepend(tmp_path)
        importlib.invalidate_caches()

    return install


def test_without_packages_there_is_nothing_but_our_own() -> None:
    kinds = ("families", "methods", "passes", "backends")
    assert [plugin_names(kind) for kind in kinds] == [()] * 4  # type: ignore[arg-type]


@pytest.mark.usefixtures("installed")
def test_a_method(tiny_folder: Path, tmp_path: Path) -> None:
    for method in ("headroom", "minmax"):
        run(recipe(model=str(tiny_folder), method=method), tmp_path / method, until="calibrate")
    minmax, headroom = (
        CalibrationResult.load(tmp_path / name / "calibration.safetensors").sites for name in ("minmax", "headroom")
    )
    for name, plan in minmax.items():
        table, wider = plan.activation, headroom[name].activation
        assert isinstance(table, ScaleTable)
        assert isinstance(wider, ScaleTable)
        np.testing.assert_allclose(wider.scale.max(), 1.25 * table.scale.max(), rtol=1e-6)


@pytest.mark.usefixtures("installed")
def test_plug_ins_may_use_options_of_built_in_ones() -> None:
    fields = {"percentile": 99.0, "target": "sm89", "min_shapes": "timestep:1"}
    require_used(recipe(model="m", method="headroom", format="plain", **fields), fields)
    with pytest.raises(RecipeError, match=r"^--percentile has no effect"):
        require_used(recipe(model="m", format="plain", **fields), fields)


@pytest.mark.usefixtures("installed")
def test_a_pass_and_a_backend(tiny_folder: Path, tmp_path: Path) -> None:
    report = run(recipe(model=str(tiny_folder), format="plain"), tmp_path / "out", until="verify")
    assert report is not None
    names = [item.name for item in report.passes]
    assert names.index("name_softmax") == names.index("insert_qdq") + 1, "where it says"
    graph = ir.load(tmp_path / "out" / "model.onnx").graph
    fused = version() >= ATTENTION_SINCE
    assert fused != any(node.op_type == "Softmax" for node in graph), "it came before fuse_attention"
    assert next(item for item in report.passes if item.name == "name_softmax").changed == ("'attention.0'", "'attention.1'")
    assert report.engine == "ONNX Runtime, node by node"
    calls = {stage: report.mean_sqnr(stage) for stage in report.stages()}
    assert calls["engine"] == calls["qdq-onnx"] > 25, "both run node by node"
    assert (tmp_path / "out" / "recipe.yaml").read_text().count("format: plain") == 1


@pytest.mark.usefixtures("installed")
def test_a_family(tmp_path: Path) -> None:
    from toy import save_toy

    assert [family.name for family in all_families()] == [*(family.name for family in FAMILIES), "toy"]
    report = run(recipe(model=str(save_toy(tmp_path / "model"))), tmp_path / "out", until="quantize")
    assert report is not None
    assert {linear.action for linear in report.linears if linear.name.endswith("fc1")} == {"w8a8"}


@pytest.mark.usefixtures("installed")
def test_the_command_line_knows_them() -> None:
    path = os.pathsep.join([*(str(FOLDER / name) for name in ("contract", "plugin")), str(FOLDER.parent)])
    result = subprocess.run(
        [sys.executable, "-m", "dq_export", "--help"], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "200"},
    )  # fmt: skip
    text = " ".join(result.stdout.split())
    assert "onnx, ort, trt, trt-rtx, plain (default ort)" in text
    assert "minmax, percentile, mse, headroom (default minmax)" in text
    with pytest.raises(RecipeError, match=r"method = 'headrom': expected .* or 'headroom'\. Did you mean 'headroom'\?"):
        recipe(model="m", method="headrom")
    assert described_plugins("passes") == ["name_softmax (dq-export-toy 1.0)"]


def test_a_method_of_a_package_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="method = 'headroom': expected 'minmax', 'percentile' or 'mse'"):
        recipe(model="m", method="headroom")


WILD_PASS = """
from dataclasses import dataclass
from dq_export.passes.base import GraphPass
@dataclass(frozen=True)
class P(GraphPass):
    name = 'wild'
    def rewrite(self, model): return [][0]
def thing(*, result, assigned): return P()
"""
WILD = r"plug-in 'wild' \(dq_export\.{}\) of wild-plugin 2\.1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import no_such_module", "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
        ("thing = (", "cannot be imported: SyntaxError: '\\(' was never closed"),
        ("other = 1", "cannot be imported: AttributeError: module 'wild_plugin' has no attribute 'thing'"),
        ("raise RuntimeError('first\\nsecond')", r"cannot be imported: RuntimeError: first\\nsecond"),
        ("thing = 3", "expected an object of Family, found wild_plugin:thing of int"),
    ],
)
def test_a_broken_plug_in_is_one_line(text: str, message: str, broken: Any) -> None:
    broken("families", text)
    with pytest.raises(PluginError, match=WILD.format("families") + ":? " + message) as error:
        all_families()
    assert "\n" not in str(error.value)


def test_a_name_that_is_taken_is_refused(broken: Any) -> None:
    broken("backends", "from dq_export.deploy.onnxruntime.cpu import ORT as thing", name="ort")
    with pytest.raises(PluginError, match=r"plug-in 'ort' \(dq_export\.backends\) of wild-plugin 2\.1: there is another of that"):
        backend_of(recipe(model="m"))


def test_a_backend_of_another_name_is_refused(broken: Any) -> None:
    broken("backends", "from dq_export.deploy.onnxruntime.cpu import ORT as thing")
    with pytest.raises(PluginError, match=r"plug-in 'wild' .* its backend is called 'ort'; give both one name"):
        all_backends()


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("def thing(*, result, assigned): return 7", PluginError, "expected a pass, found int"),
        ("def thing(): ...", PluginError, "TypeError: thing\\(\\) got an unexpected keyword argument"),
        (
            "from dq_export.passes.base import GraphPass\nfrom dataclasses import dataclass\n@dataclass(frozen=True)\n"
            "class P(GraphPass):\n    name = 'wild'\n    after = ('insert_qqd',)\n    def rewrite(self, model): ...\n"
            "def thing(*, result, assigned): return P()",
            GraphError,
            "pass wild declares its place by 'insert_qqd', but there is no pass of that name",
        ),
    ],
)
def test_a_wrong_pass_is_refused_before_anything_runs(
    text: str, error: type[Exception], message: str, broken: Any, tiny_calibrated: Any
) -> None:
    broken("passes", text)
    with pytest.raises(error, match=message):
        check_order(with_plugins(canonical_passes(*tiny_calibrated), *tiny_calibrated))


@pytest.mark.parametrize("value", ["amax[:1]", "amax * 0", "(amax / qtype.qmax).astype(float)", "amax * np.nan"])
def test_scales_that_cannot_be_are_refused(value: str, broken: Any) -> None:
    broken("methods", f"import numpy as np\ndef thing(amax, counts, recipe, qtype): return {value}")
    method = method_of("wild")
    with pytest.raises(PluginError, match=r"plug-in method 'wild': expected float32\[3\], finite and > 0, found float"):
        method(np.ones(3, dtype=np.float32), np.zeros((3, 4), dtype=np.int64), recipe(model="m"), INT8)


FAILS = r"error: plug-in 'wild' \(dq_export\.families\) of wild-plugin 2\.1 fails: {} \(wild_plugin\.py, line \d+\)\n"


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("prepare(self, model): return model.gone", "AttributeError: 'ToyNetwork' object has no attribute 'gone'"),
        ("inputs(self, model): return open('/no/such')", r"FileNotFoundError: \[Errno 2\] No such file or directory: '/no/such'"),
        (
            "encode(self, pipeline, parts, prompts, config): import no_such_module",
            "ModuleNotFoundError: No module named 'no_such_module'",
        ),
        (
            "largest_activation(self, model): return int('1\\n2')",
            r"ValueError: invalid literal for int\(\) with base 10: '1\\n2'",
        ),
        ("draw(self, network, scheduler, pictures, *, steps, guidance): return 1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_plug_in_that_fails_at_work_is_one_line(
    method: str, message: str, broken: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dq_export.cli.app import main

    monkeypatch.syspath_prepend(FOLDER / "contract")
    from toy import save_toy

    broken("families", f"from toy import Toy\nclass Wild(Toy):\n    def {method}\nthing = Wild()\n")
    model = save_toy(tmp_path / "model")
    capsys.readouterr()  # transformers shows how far its writing is
    monkeypatch.setattr(sys, "argv", ["dq-export", "calibrate", "--model", str(model), "-o", str(tmp_path / "out"), "--quiet"])
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as ended:
        main()
    signal.signal(signal.SIGINT, before)
    assert ended.value.code == 1
    assert re.fullmatch(FAILS.format(message), capsys.readouterr().err)


def test_timesteps_that_a_plug_ins_network_does_not_take_are_the_schedulers_fault(
    broken: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(FOLDER / "contract")
    from toy import save_toy

    refuses = "def draw(self, *most, steps, guidance): raise ValueError('it sends fractions')"
    broken("families", f"from toy import Toy\nclass Wild(Toy):\n    {refuses}\nthing = Wild()\n")
    reference = load_reference(str(save_toy(tmp_path / "model")))
    with pytest.raises(ModelError, match=r"EulerDiscreteScheduler cannot sample in 4 steps \(it sends fractions\); put another"):
        reference.timesteps(4)


def test_a_pass_that_fails_is_named(broken: Any, tiny_calibrated: Any, tiny_onnx: Path) -> None:
    broken("passes", WILD_PASS)
    with pytest.raises(IndexError) as raised:
        run_passes(ir.load(tiny_onnx), with_plugins((), *tiny_calibrated))
    fault = fault_of_plugin(raised.value)
    assert str(fault) == (
        "plug-in 'wild' (dq_export.passes) of wild-plugin 2.1 fails: IndexError: list index out of range (wild_plugin.py, line 7)"
    )


@pytest.mark.usefixtures("installed")
def test_an_error_of_dq_export_is_not_blamed_on_a_plug_in() -> None:
    with pytest.raises(KeyError) as raised:
        scheme_of("bits")
    assert fault_of_plugin(raised.value) is None


@pytest.mark.parametrize("value", ["None", "['a'] * 3", "[[1], 2, 3]"])
def test_scales_that_are_no_array_are_refused(value: str, broken: Any) -> None:
    broken("methods", f"def thing(amax, counts, recipe, qtype): return {value}")
    method = method_of("wild")
    with pytest.raises(PluginError, match=r"plug-in method 'wild': expected float32\[3\], found (NoneType|list)"):
        method(np.ones(3, dtype=np.float32), np.zeros((3, 4), dtype=np.int64), recipe(model="m"), INT8)


def test_a_pass_that_reports_nothing_is_refused(broken: Any, tiny_calibrated: Any, tiny_onnx: Path) -> None:
    broken("passes", WILD_PASS.replace("return [][0]", "model.graph.name = 'mine'"))
    with pytest.raises(GraphError, match="pass wild returned NoneType; expected a PassReport"):
        run_passes(ir.load(tiny_onnx), with_plugins((), *tiny_calibrated))


def test_the_page_shows_the_package_as_it_is() -> None:
    page = (FOLDER.parent / "docs" / "extending.md").read_text()
    package = (FOLDER / "plugin" / "dq_export_toy.py").read_text()
    parts = package.split("\n\n\n# --- ")[1:]
    assert [part.split("\n", 1)[0] for part in parts] == ["method", "pass", "backend"]
    for part in parts:
        assert f"```python\n{part.split(chr(10), 1)[1].strip()}\n```" in page
    points = (FOLDER / "plugin" / "dq_export_toy-1.0.dist-info" / "entry_points.txt").read_text()
    for line in points.splitlines():
        assert line.replace(" = ", " = ") in page
    family = (FOLDER / "contract" / "toy.py").read_text()
    shown = family[family.index("class Toy(Family):") : family.index("def save_toy")].strip()
    assert f"```python\n{shown}\n```" in page
