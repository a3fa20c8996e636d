"""The command line: `main`."""

from .app import main

__all__ = ["main"]
