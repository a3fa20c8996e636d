"""Import libraries to check that they work: a program that `deploy/child.py` runs."""

from __future__ import annotations

import importlib
import json
import os
import sys


def main() -> None:
    """Import the modules that standard input names as a JSON list; answer `{"cuda": bool}`, whether PyTorch uses a GPU.

    If an import fails, the process ends, and the last line that it prints gives the reason.
    """
    modules = json.load(sys.stdin)
    for name in modules:
        importlib.import_module(name)
    cuda = "torch" in modules and importlib.import_module("torch").cuda.is_available()
    with os.fdopen(int(sys.argv[1]), "w", encoding="utf-8") as answers:
        answers.write(json.dumps({"cuda": cuda}) + "\n")


if __name__ == "__main__":
    main()
