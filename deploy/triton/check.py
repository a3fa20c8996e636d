"""What is wrong with a Triton model repository, as far as its files tell: also what the server accepts and ignores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .config_rules import batching, ensemble, identity, instances, parameters, warm_up
from .file_rules import onnx_graph, stray, versions
from .model_folder import Fault, Model
from .sampling_rule import sampling

Rule = Callable[[Model], Iterator[Fault]]
RULES: tuple[Rule, ...] = (
    identity, versions, instances, batching, parameters, warm_up, onnx_graph, ensemble, sampling,
)  # fmt: skip


def check_repository(folder: Path) -> list[Fault]:
    """Every fault of every model of a repository; nothing is loaded or run.

    Not known without the server: whether it has the backend, a GPU, the versions that a plan or an ONNX operator needs.
    """
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    faults = list(stray(folder))
    configs: dict[str, Any] = {}
    folders = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if not folders:
        return [Fault(model="", severity="error", what=f"{folder}: no model folders", fix="pass a model repository")]
    for path in folders:
        configs[path.name] = None
        file = path / "config.pbtxt"
        if not file.is_file():
            what = "no config.pbtxt: what the server makes up may have other inputs, two instances and a batch of 4"
            faults.append(Fault(model=path.name, severity="error", what=what, fix="write one"))
            continue
        try:
            configs[path.name] = text_format.Parse(file.read_text(encoding="utf-8"), model_config_pb2.ModelConfig())
        except (text_format.ParseError, UnicodeDecodeError) as error:
            faults.append(Fault(model=path.name, severity="error", what=f"config.pbtxt: {error!s}", fix="mend that line"))
    for name, config in configs.items():
        if config is None:
            continue
        model = Model(folder=folder / name, config=config, names=configs)
        faults += [fault for rule in RULES for fault in rule(model)]
    return faults
