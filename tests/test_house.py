"""The house: floors, packages, style. Reads the code, not its promises."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
FLOORS = {"dq_export/core": 0, "calibration": 1, "passes": 2, "deploy": 3, "dq_export": 4}
THIRD_PARTY = {
    "dq_export/core": {"numpy", "pydantic", "re2", "yaml"},
    "calibration": {"numpy", "threadpoolctl"},
    "passes": {"numpy", "onnx_ir"},
    "deploy": {"numpy", "onnx_ir"},
    "deploy/triton/endpoint": {"numpy", "starlette", "tritonclient"},
    "deploy/triton/serving": {"numpy"},
    "dq_export": {"numpy", "onnx_ir", "pydantic"},
}
LAZY = {
    "dq_export/core": {"safetensors", "torch"},
    "calibration": {"torch"},
    "passes": set(),
    "deploy": {
        "google",
        "onnx",
        "onnxruntime",
        "onnxruntime_ep_nv_tensorrt_rtx",
        "onnxruntime_ep_openvino",
        "openvino",
        "polygraphy",
        "tritonclient",
    },
    "deploy/triton/endpoint": {"uvicorn"},
    "deploy/triton/serving": {"PIL", "tokenizers", "triton_python_backend_utils", "tritonclient"},
    "dq_export": {"PIL", "google", "huggingface_hub", "jinja2", "safetensors"},
    "dq_export/search": {"google", "onnxruntime"},
    "dq_export/bisection": {"onnx", "onnx_graphsurgeon"},
    "dq_export/families": {
        "accelerate",
        "google",
        "torch",
        "diffusers",
        "safetensors",
        "sentencepiece",
        "tokenizers",
        "huggingface_hub",
        "transformers",
    },
}
"""What functions may import beyond `THIRD_PARTY`."""
PYTEST = {"dq_export/pytest_plugin.py"}
"""Loaded by pytest alone."""
COMMAND_LINE = "dq_export/cli"
CLI_ONLY = {"typer", "rich"}


def sources() -> list[tuple[str, Path]]:
    """(folder, file) of every module of the product."""
    files = []
    for top in ("calibration", "passes", "deploy", "dq_export"):
        for path in sorted((ROOT / top).rglob("*.py")):
            if not any(parent.is_symlink() for parent in path.parents):
                files.append(("dq_export/core" if path.parent == ROOT / "dq_export/core" else top, path))
    return files


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
            source = ".".join([*base, *([node.module] if node.module else [])])
            # `from package import module` is an import of the module.
            names += [full if (full := f"{source}.{alias.name}") in modules() else source for alias in node.names]
    return names


@cache
def modules() -> dict[str, Path]:
    """Every module of the product by its import name."""
    paths = {}
    for folder, path in sources():
        parts = path.relative_to(ROOT).with_suffix("").parts
        paths[".".join(parts if folder.startswith("dq_export") else ("dq_export", *parts)).removesuffix(".__init__")] = path
    return paths


def floor_of(name: str) -> str:
    """The folder that a `dq_export...` module lies in."""
    parts = name.split(".")
    second = parts[1] if len(parts) > 1 else ""
    return second if second in FLOORS else "dq_export/core" if second == "core" else "dq_export"


def test_no_import_runs_up() -> None:
    up = []
    for folder, path in sources():
        for name in imports(path, top_level=False):
            if name.startswith("dq_export") and FLOORS[floor_of(name)] > FLOORS[folder]:
                up.append(f"{path.relative_to(ROOT)} imports {name}")
    assert up == []


def test_passes_know_the_core_and_nothing_of_calibration() -> None:
    used = {
        floor_of(name)
        for folder, path in sources()
        if folder == "passes"
        for name in imports(path, top_level=False)
        if name.startswith("dq_export")
    }
    assert used == {"dq_export/core", "passes"}


def test_no_circle() -> None:
    graph = {
        name: {target for target in imports(path, top_level=False) if target in modules() and target != name}
        for name, path in modules().items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"circle: {' -> '.join((*trail, name))}"
        if name not in done:
            for target in graph[name]:
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())
    assert len(graph) > 30


def library_of(name: str) -> str:
    """The third-party library that an import comes from; empty for the standard library's and our own."""
    library = name.split(".")[0]
    return "" if library in sys.stdlib_module_names or library == "dq_export" else library


def test_every_floor_imports_only_its_libraries() -> None:
    wrong = []
    for folder, path in sources():
        relative = str(path.relative_to(ROOT))
        at_once = THIRD_PARTY.get(str(path.parent.relative_to(ROOT)), THIRD_PARTY[folder])
        at_once = at_once | (CLI_ONLY if str(path.parent.relative_to(ROOT)) == COMMAND_LINE else set())
        at_once = at_once | ({"pytest"} if relative in PYTEST else set())
        in_functions = at_once | LAZY.get(str(path.parent.relative_to(ROOT)), LAZY[folder])
        for allowed, top_level in ((at_once, True), (in_functions, False)):
            wrong += [
                f"{relative} imports {n}" for n in imports(path, top_level=top_level) if library_of(n) not in {"", *allowed}
            ]
    assert wrong == []


def test_only_the_command_line_prints_or_reads_the_environment() -> None:
    console = {"print", "input", "environ", "environb", "getenv", "putenv", "stdout", "stderr", "__stdout__", "__stderr__"}
    wrong = []
    for _, path in sources():
        # The client is a program of its own, for another machine.
        if str(path.parent.relative_to(ROOT)) == COMMAND_LINE or path.name == "client.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
            owner = ast.unparse(node.value) if isinstance(node, ast.Attribute) else ""
            used = {node.attr} if isinstance(node, ast.Attribute) and owner in ("os", "sys") else {called}
            if isinstance(node, ast.ImportFrom) and node.module in ("os", "sys"):
                used = {alias.name for alias in node.names}
            wrong += [f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)} {name}" for name in used & console]
    assert wrong == []


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)


def test_importing_the_package_loads_neither_torch_nor_a_runtime() -> None:
    heavy = "{'torch', 'diffusers', 'onnxruntime', 'onnx', 'polygraphy'}"
    result = run("-c", f"import sys, dq_export, dq_export.cli; print(sorted({heavy} & set(sys.modules)))")
    assert result.stdout.strip() == "[]", result.stderr


@pytest.mark.parametrize("name", ["calibration", "passes", "deploy"])
def test_a_bare_import_says_the_right_name(name: str) -> None:
    result = run("-c", f"import sys; sys.path.insert(0, '.'); import {name}")
    assert f"import it as 'dq_export.{name}'" in result.stderr


def test_the_links_are_relative() -> None:
    for name in ("calibration", "passes", "deploy"):
        assert (ROOT / "dq_export" / name).readlink() == Path("..") / name


@pytest.mark.parametrize(
    "words",
    [
        ("ruff", "check", "."),
        ("ruff", "format", "--check", "."),
        ("mypy", "-p", "dq_export"),
        ("codespell_lib",),
        ("proselint", "check", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "docs"),
    ],
)
def test_style(words: tuple[str, ...]) -> None:
    result = run("-m", *words)
    assert result.returncode == 0, result.stdout + result.stderr


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


ODD_NAMES = """
again alike apart asked away drawn each every everything few fewer found given gone having held here how kept known lacking
least made many mine most ours own said seen sent since some taken theirs then there told wanted what where why
"""
"""Participles, pronouns and adverbs that do not tell what a variable holds or what a function does."""
FIELDS_OF_FILES = {"deploy/audit.py": {"wanted"}, "dq_export/report/report.py": {"drawn"}}
"""Keys of report.json, whose format a rename would change."""


def names_of(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of every variable, parameter, attribute, function and class, except parameters and fields of type bool."""
    flags = {node.target for node in ast.walk(tree) if isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation) == "bool"}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg) and (node.annotation is None or ast.unparse(node.annotation) != "bool"):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store) and node not in flags:
            yield node.lineno, node.id if isinstance(node, ast.Name) else node.attr


def test_names_tell_what_they_hold() -> None:
    odd, words = [], set(ODD_NAMES.split())
    scripts = [path for folder in ("tests", "examples", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]
    for path in [*(path for _, path in sources()), *scripts]:
        relative = str(path.relative_to(ROOT))
        allowed = FIELDS_OF_FILES.get(relative, set())
        odd += [
            f"{relative}:{line} {name}"
            for line, name in names_of(ast.parse(path.read_text()))
            if name.strip("_").lower() in words - allowed
        ]
    assert odd == []


def test_files_and_functions_of_scripts_are_small() -> None:
    large = []
    for path in [path for folder in ("examples", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]:
        text = path.read_text()
        large += [f"{path.relative_to(ROOT)}: {count} lines"] if (count := len(text.splitlines())) > 300 else []
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                parameters = [item.arg for item in arguments if item.arg != "self"]
                if len(parameters) > 6:
                    large.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {len(parameters)} parameters")
    assert large == []


def test_every_package_that_the_tests_install_is_pinned() -> None:
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate():
                pins[canonicalize_name(requirement.name)] = requirement.specifier
    queue, visited = [Requirement("dq-export[cpu,test]")], set()
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        # A CUDA build of PyTorch brings libraries that no test uses.
        if (name, *sorted(requirement.extras)) in visited or re.match(r"nvidia-|cuda-|triton$", name):
            continue
        visited.add((name, *sorted(requirement.extras)))
        assert name == "dq-export" or name in pins, f"{name} is installed and not in constraints.txt; run .ci/pin"
        for text in metadata.requires(name) or ():
            child = Requirement(text)
            if child.marker is None or any(child.marker.evaluate({"extra": extra}) for extra in ("", *requirement.extras)):
                queue.append(child)
    assert len(visited) > 60
