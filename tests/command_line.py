"""The command line in a process of its own, forked from one that has imported the libraries already.

Importing torch and diffusers takes seconds, which is most of many a command. A call has its own process, environment,
working directory and status, as `python -m dq_export` has; only what PyTorch's exporter made for an equal network is not made
again.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

PRELOADED = (
    "diffusers.models.transformers.dit_transformer_2d", "diffusers.schedulers", "onnx", "onnxscript", "polygraphy.backend.onnxrt",
    "torch.export", "torch.onnx", "dq_export.cli", "dq_export.deploy.backends", "dq_export.families.source", "dq_export.pipeline",
)  # fmt: skip
"""What the server imports: no module that starts threads, which a fork would lose."""

TRACES: Path | None = None
"""Where the graphs of `traced_once` lie; a call reads them there instead of tracing a network that was traced before."""

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # huggingface_hub reads it when it is imported


def call(
    *words: object, cwd: Path | None = None, env: dict[str, str] | None = None, timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """Run `dq-export` with `words`; `env` replaces the environment (but what the libraries read when they are imported)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    with tempfile.TemporaryDirectory(prefix="dq-export-call-") as folder:
        output, error = Path(folder) / "stdout", Path(folder) / "stderr"
        arguments = [str(word) for word in words]
        values = (arguments, str(cwd or Path.cwd()), dict(os.environ if env is None else env), str(output), str(error), TRACES)
        process = context.Process(target=_main, args=values)
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(arguments, timeout, output.read_text(), error.read_text())
        return subprocess.CompletedProcess(
            arguments, process.exitcode, output.read_text(encoding="utf-8"), error.read_text(encoding="utf-8")
        )


def _main(words: list[str], cwd: str, environment: dict[str, str], output: str, error: str, traces: Path | None) -> None:
    for number, path in ((1, output), (2, error)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["dq-export", *words]
    if traces is not None:
        from traced_once import TracedOnce

        from dq_export.families import torch_export

        torch_export.trace = TracedOnce(traces).trace
    from dq_export.cli import main

    main()
