"""The wheel: what it holds, that its modules import from it, and that it installs and runs outside the repository."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import threading
import venv
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import dq_export

ROOT = Path(__file__).parent.parent
FOLDERS = ("calibration", "passes", "deploy", "dq_export")


def tracked() -> list[str]:
    """Every file of the repository that exists."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in listed if (ROOT / name).is_symlink() or (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the tracked files without a network."""
    copy = tmp_path_factory.mktemp("wheel") / "source"
    for name in tracked():
        source, target = ROOT / name, copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            target.symlink_to(source.readlink())
        else:
            target.write_bytes(source.read_bytes())
    code = "import setuptools.build_meta as b; print(b.build_wheel('dist'))"
    result = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return next((copy / "dist").glob("*.whl"))


def files_of(wheel: Path) -> list[str]:
    """The files of the package."""
    return [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]


def test_the_wheel_holds_what_the_folders_hold(wheel: Path) -> None:
    expected = set()
    for name in tracked():
        top = name.split("/")[0]
        if top in FOLDERS and not (ROOT / name).is_symlink():
            expected.add(name if top == "dq_export" else f"dq_export/{name}")
    assert set(files_of(wheel)) == expected
    assert any(name.startswith("dq_export/models/") for name in expected)


def test_the_wheel_holds_the_licence_and_the_version(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        (licence,) = [name for name in file.namelist() if name.endswith(".dist-info/licenses/LICENSE")]
        assert file.read(licence) == (ROOT / "LICENSE").read_bytes()
        words = file.read(licence.replace("licenses/LICENSE", "METADATA")).decode().splitlines()
        entries = file.read(licence.replace("licenses/LICENSE", "entry_points.txt")).decode()
    assert "[pytest11]\ndq_export.pytest_plugin = dq_export.pytest_plugin\n" in entries
    assert f"Version: {dq_export.__version__}" in words
    assert {"License-Expression: Apache-2.0", "License-File: LICENSE"} <= set(words)


def test_every_module_of_the_wheel_can_be_imported_from_it(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path)
    # -I: neither this checkout nor an installed copy is visible, only the folder that is put in front.
    code = (
        "import importlib, sys; sys.path.insert(0, sys.argv[1])\n"
        "files = [importlib.import_module(name).__file__ for name in sys.argv[2:]]\n"
        "from dq_export.families.source import MODELS; print(MODELS['dit-digits'][0], *files, sep='\\n')"
    )
    paths = [name for name in files_of(wheel) if name.endswith(".py") and not name.endswith("__main__.py")]
    names = [name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in paths]
    assert len(names) > 200
    result = subprocess.run(
        [sys.executable, "-I", "-c", code, str(tmp_path), *names], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert all(Path(line).is_relative_to(tmp_path) and Path(line).exists() for line in result.stdout.splitlines())


@pytest.fixture
def index(wheel: Path, tmp_path: Path) -> Iterator[str]:
    """The address of a package index that holds the wheel alone."""
    folder = tmp_path / "index" / "dq-export"
    folder.mkdir(parents=True)
    (folder / wheel.name).write_bytes(wheel.read_bytes())
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def dependencies(folder: Path) -> Path:
    """A folder with links to everything that is installed here, except dq-export itself."""
    folder.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "dq_export" not in entry.name and "dq-export" not in entry.name and entry.suffix != ".pth":
            (folder / entry.name).symlink_to(entry)
    return folder


@pytest.mark.slow
def test_it_installs_from_an_index_and_exports_outside_the_repository(index: str, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    scripts = tmp_path / "venv" / "bin"
    # Without the variables of this process: no PYTHONPATH leads back to the checkout, and no setting of pip to another index.
    environment = {"PATH": f"{scripts}:/usr/bin:/bin", "HOME": str(tmp_path)}

    def run(program: str, *words: str) -> str:
        result = subprocess.run(
            [scripts / program, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    if sys.version_info < (3, 12):
        run("pip", "uninstall", "-y", "setuptools")  # venv brings an old one, which would hide that of the dependencies
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "venv")}))
    (packages / "dependencies.pth").write_text(f"{dependencies(tmp_path / 'dependencies')}\n")
    run("pip", "install", "--index-url", index, "dq-export[cpu]")
    assert (packages / "dq_export" / "__init__.py").is_file()
    assert run("dq-export", "--version").strip() == f"dq-export {dq_export.__version__}"
    run("dq-export", "--model", "dit-digits", "--steps", "4", "--calib-size", "2", "--min-sqnr", "5", "-o", "out")
    assert (tmp_path / "out" / "report.html").is_file()
