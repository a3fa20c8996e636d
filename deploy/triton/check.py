"""Checks the files of a Triton model repository, also for settings that the server accepts and ignores."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from dq_export.core.documents import DocumentError, printable

from .config_rules import batching, bounds, ensemble, identity, instances, parameters, warm_up
from .file_rules import onnx_graph, stray, versions
from .model_folder import Fault, Model, content
from .sampling_rule import probing, sampling

RepositoryRule = Callable[[Model], Iterator[Fault]]
REPOSITORY_RULES: tuple[RepositoryRule, ...] = (
    identity, versions, instances, batching, bounds, parameters, warm_up, onnx_graph, ensemble, sampling, probing,
)  # fmt: skip
CONFIG_LIMIT = 256 << 10
"""Bytes of a config.pbtxt; the export writes 4,000."""
MAX_FAULTS = 200
"""The greatest number of faults in one report."""


def check_repository(folder: Path) -> list[Fault]:
    """Return the faults of every model of a repository. Nothing is loaded or run.

    The check cannot tell whether the server has the backend, a GPU, or the versions that a plan or an ONNX operator needs.
    """
    try:
        faults = list(islice(_faults(folder), MAX_FAULTS + 1))
    except OSError as error:
        return [_repository_fault(f"{folder}: cannot be read ({error.strerror or error})", "pass a model repository")]
    if len(faults) > MAX_FAULTS:
        faults[MAX_FAULTS:] = [_repository_fault(f"more than {MAX_FAULTS} faults", "correct these first")]
    return faults


def _faults(folder: Path) -> Iterator[Fault]:
    folders = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if not folders:
        yield _repository_fault(f"{folder}: no model folders", "pass a model repository")
        return
    yield from stray(folder)
    configs: dict[str, Any] = {}
    for path in folders:
        config = _config(path)
        configs[path.name] = None if isinstance(config, Fault) else config
        if isinstance(config, Fault):
            yield config
    for path in folders:
        if configs[path.name] is not None:
            model = Model(folder=path, config=configs[path.name], names=configs)
            for rule in REPOSITORY_RULES:
                yield from rule(model)


def _config(folder: Path) -> Any:
    """Read a model's ModelConfig; return a fault if it cannot be read."""
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    file = folder / "config.pbtxt"
    if not file.exists() and not file.is_symlink():
        problem = "no config.pbtxt: the server's own guess may have other inputs, two instances and a batch of 4"
        return Fault(model=folder.name, severity="error", problem=problem, fix="write one")
    try:
        text = content(file, folder.parent, CONFIG_LIMIT).decode("utf-8")
        with warnings.catch_warnings():  # Python warns about odd escapes in texts
            warnings.simplefilter("ignore")
            return text_format.Parse(text, model_config_pb2.ModelConfig())
    # The parser raises ParseError, and also errors of its inner calls: ValueError, OverflowError, RecursionError ...
    except (DocumentError, text_format.Error, ValueError, ArithmeticError, RecursionError, TypeError) as error:
        problem = f"config.pbtxt: {printable(str(error))}"
        return Fault(model=folder.name, severity="error", problem=problem, fix="correct that line")


def _repository_fault(problem: str, fix: str) -> Fault:
    return Fault(model="", severity="error", problem=problem, fix=fix)
