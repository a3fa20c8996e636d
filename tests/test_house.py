"""The house: floors, packages, style. Reads the code, not its promises."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {"calibration": 1, "passes": 2, "deploy": 3, "dq_export": 4}
THIRD_PARTY = {
    "calibration": {"numpy", "pydantic", "yaml"},
    "passes": {"numpy", "onnx_ir"},
    "deploy": {"numpy", "onnx_ir"},
    "dq_export": {"numpy", "onnx_ir", "pydantic"},
}
DATA_OBJECTS = {"artifacts", "denoiser", "qtypes", "recipe", "scales"}
CLI_ONLY = {"typer", "rich"}


def sources() -> list[tuple[str, Path]]:
    """(folder, file) of every module of the product."""
    found = []
    for folder in FLOORS:
        found += [
            (folder, path) for path in sorted((ROOT / folder).rglob("*.py")) if not any(p.is_symlink() for p in path.parents)
        ]
    return found


def imports(path: Path, *, top_level: bool) -> list[str]:
    """Absolute names of all imports; with `top_level` only of those that run when the module is imported."""
    relative = path.relative_to(ROOT)
    package = ["dq_export"] if relative.parts[0] == "dq_export" else ["dq_export", relative.parts[0]]
    package += list(relative.parts[1:-1])
    tree = ast.parse(path.read_text())
    lazy: set[ast.AST] = set()
    for node in ast.walk(tree):
        guarded = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or guarded:
            lazy.update(ast.walk(node))
    names = []
    for node in ast.walk(tree):
        if top_level and node in lazy:
            continue
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            names.append(".".join([*base, *([node.module] if node.module else [])]))
    return names


def floor_of(name: str) -> str:
    """The folder that a `dq_export...` module lies in."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in FLOORS else "dq_export"


def test_no_import_runs_up() -> None:
    up = []
    for folder, path in sources():
        for name in imports(path, top_level=False):
            if name.startswith("dq_export") and FLOORS[floor_of(name)] > FLOORS[folder]:
                up.append(f"{path.relative_to(ROOT)} imports {name}")
    assert up == []


def test_passes_use_only_the_data_objects_of_calibration() -> None:
    used = {
        name.split(".")[2]
        for folder, path in sources()
        if folder == "passes"
        for name in imports(path, top_level=False)
        if name.startswith("dq_export.calibration.")
    }
    assert used <= DATA_OBJECTS
    assert used


def test_no_circle() -> None:
    graph: dict[str, set[str]] = {}
    for _, path in sources():
        relative = path.relative_to(ROOT).with_suffix("")
        parts = relative.parts if relative.parts[0] == "dq_export" else ("dq_export", *relative.parts)
        name = ".".join(parts).removesuffix(".__init__")
        graph[name] = {target for target in imports(path, top_level=True) if target.startswith("dq_export") and target != name}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"circle: {' -> '.join((*trail, name))}"
        if name not in done:
            for target in graph.get(name, ()):
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())
    assert len(graph) > 30


def test_heavy_libraries_are_imported_inside_functions() -> None:
    wrong = []
    for folder, path in sources():
        for name in imports(path, top_level=True):
            library = name.split(".")[0]
            if library in sys.stdlib_module_names or library in ("dq_export", "__future__"):
                continue
            if library not in THIRD_PARTY[folder] and not (path.name == "cli.py" and library in CLI_ONLY):
                wrong.append(f"{path.relative_to(ROOT)} imports {library}")
        if folder == "passes":
            wrong += [f"{path} uses {n}" for n in imports(path, top_level=False) if n.split(".")[0] in ("torch", "onnxruntime")]
    assert wrong == []


def test_only_the_command_line_prints_or_reads_the_environment() -> None:
    wrong = []
    for _, path in sources():
        text = ast.unparse(ast.parse(path.read_text()))
        if path.name != "cli.py" and ("print(" in text or "os.environ" in text or "getenv" in text):
            wrong.append(str(path.relative_to(ROOT)))
    assert wrong == []


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)


def test_importing_the_package_loads_neither_torch_nor_a_runtime() -> None:
    heavy = "{'torch', 'diffusers', 'onnxruntime', 'onnx', 'polygraphy'}"
    done = run("-c", f"import sys, dq_export, dq_export.cli; print(sorted({heavy} & set(sys.modules)))")
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("name", ["calibration", "passes", "deploy"])
def test_a_bare_import_says_the_right_name(name: str) -> None:
    done = run("-c", f"import sys; sys.path.insert(0, '.'); import {name}")
    assert f"import it as 'dq_export.{name}'" in done.stderr


def test_the_links_are_relative() -> None:
    for name in ("calibration", "passes", "deploy"):
        assert (ROOT / "dq_export" / name).readlink() == Path("..") / name


def test_the_wheel_holds_what_the_folders_hold(tmp_path: Path) -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    copy = tmp_path / "source"
    for name in listed:
        source, target = ROOT / name, copy / name
        if name and (source.is_symlink() or source.is_file()):
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_symlink():
                target.symlink_to(source.readlink())
            else:
                target.write_bytes(source.read_bytes())
    code = "import setuptools.build_meta as b; print(b.build_wheel('dist'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    wheel = next((copy / "dist").glob("*.whl"))
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = set()
    for name in listed:
        top = name.split("/")[0]
        if top in FLOORS and not (ROOT / name).is_symlink():
            expected.add(name if top == "dq_export" else f"dq_export/{name}")
    assert inside == expected


@pytest.mark.parametrize("words", [("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy", "-p", "dq_export")])
def test_style(words: tuple[str, ...]) -> None:
    done = run("-m", *words)
    assert done.returncode == 0, done.stdout + done.stderr


def test_everything_public_has_a_docstring() -> None:
    missing = []
    for _, path in sources():
        tree = ast.parse(path.read_text())
        if not ast.get_docstring(tree):
            missing.append(str(path))
        for node in tree.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_") and not ast.get_docstring(node):
                missing.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert missing == []
