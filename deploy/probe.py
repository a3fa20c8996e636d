"""Import libraries to check that they work: a program that `deploy/child.py` runs."""

from __future__ import annotations

import importlib
import json
import os
import sys


def main() -> None:
    """Import the modules that standard input names as a JSON list; answer `{"cuda": bool}`, whether PyTorch or ONNX Runtime
    among them computes on a GPU.

    If an import fails, the process ends, and the last line that it prints gives the reason.
    """
    modules = json.load(sys.stdin)
    for name in modules:
        importlib.import_module(name)
    if "torch" in modules:
        cuda = importlib.import_module("torch").cuda.is_available()
    else:
        cuda = "onnxruntime" in modules and not importlib.import_module("dq_export.deploy.onnxruntime.cuda").obstacle()
    with os.fdopen(int(sys.argv[1]), "w", encoding="utf-8") as answers:
        answers.write(json.dumps({"cuda": cuda}) + "\n")


if __name__ == "__main__":
    main()
