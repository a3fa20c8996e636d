"""A plug-in of pytest for the tests of others: `pytest --dq-engine OUT` and the fixture `dq_engine`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .families.stand_in import StandIn

OPTION = "--dq-engine"


@dataclass(frozen=True)
class DqEngine:
    """A finished export under test.

    Args:
        path: its folder.
    """

    path: Path

    def load(self) -> StandIn:
        """The engine, to be called or to be set in a diffusers pipeline; see `dq_export.load`."""
        from .engine import load

        return load(self.path)

    def assert_parity(self, min_sqnr: float | None = None) -> None:
        """Replay the recorded calls on the graph with ONNX Runtime's CPU provider, and compare with PyTorch's outputs.

        Args:
            min_sqnr: dB that every call must keep; None: as `dq-export verify OUT`.

        Raises:
            AssertionError: a call keeps less.
            OutputError, RecipeError, BackendError: the folder is damaged, or ONNX Runtime is missing.
        """
        from .verification import verify_again

        __tracebackhide__ = True  # the line of the test is what its reader looks for
        verification = verify_again(self.path, min_sqnr, verbose=False)
        sqnr, timestep = verification.worst
        if not verification.passed:
            required = f"{verification.limit:.1f} dB ({verification.origin if min_sqnr is None else 'min_sqnr of the test'})"
            raise AssertionError(
                f"{self.path}: a call keeps {sqnr:.1f} dB of PyTorch's output at timestep {timestep:g}, required {required}"
            )


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--dq-engine OUT`."""
    group = parser.getgroup("dq-export")
    group.addoption(OPTION, metavar="OUT", default=None, help="the output folder of a finished export, for the fixture dq_engine")


def pytest_configure(config: pytest.Config) -> None:
    """Refuse a folder that holds no finished export, before any test runs.

    Raises:
        pytest.UsageError: it holds none.
    """
    if config.getoption(OPTION) is None:
        return
    from .finished_folder import MODEL, REPORT, FinishedFolder
    from .ledger import RECIPE
    from .output_folder import OutputError

    try:
        FinishedFolder.open(_path(config), RECIPE, REPORT, MODEL)
    except OutputError as error:
        raise pytest.UsageError(f"{OPTION} {error}") from error


@pytest.fixture(scope="session")
def dq_engine(pytestconfig: pytest.Config) -> DqEngine:
    """The export of `--dq-engine OUT`; without the option a test that asks for it is skipped."""
    if pytestconfig.getoption(OPTION) is None:
        pytest.skip(f"needs {OPTION} OUT, the output folder of a finished export")
    return DqEngine(_path(pytestconfig))


def _path(config: pytest.Config) -> Path:
    return Path(os.path.expanduser(str(config.getoption(OPTION))))
