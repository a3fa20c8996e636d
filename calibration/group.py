"""The processes that share a calibration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from dq_export.core.artifacts import CalibrationError

Array = npt.NDArray[np.generic]


class ProcessGroup(Protocol):
    """Reductions over all processes; each must call the same ones in the same order."""

    @property
    def rank(self) -> int:
        """This process, from 0."""

    @property
    def size(self) -> int:
        """The number of processes."""

    def largest(self, values: Array) -> Array:
        """Element-wise maximum over the processes. Exactness: exact for any number of processes."""

    def total(self, values: Array) -> Array:
        """Element-wise sum over the processes. Exactness: exact for integers, and if only one process has values other than 0."""


@dataclass(frozen=True)
class Alone:
    """One process."""

    rank: int = 0
    size: int = 1

    def largest(self, values: Array) -> Array:
        """The values."""
        return values

    def total(self, values: Array) -> Array:
        """The values."""
        return values


ALONE = Alone()


@dataclass(frozen=True)
class TorchGroup:
    """The processes that torchrun started, over gloo. Reduced arrays lie in main memory, also when the network runs on GPUs."""

    rank: int
    size: int

    def largest(self, values: Array) -> Array:
        """See `ProcessGroup`.

        Raises:
            CalibrationError: another process has ended.
        """
        return self._reduce(values, "MAX")

    def total(self, values: Array) -> Array:
        """See `ProcessGroup`.

        Raises:
            CalibrationError: another process has ended.
        """
        return self._reduce(values, "SUM")

    def leave(self) -> None:
        """End the connection; every process calls this at the end."""
        import torch

        torch.distributed.destroy_process_group()

    def _reduce(self, values: Array, operation: str) -> Array:
        import torch

        tensor = torch.from_numpy(np.array(values))
        try:
            torch.distributed.all_reduce(tensor, op=getattr(torch.distributed.ReduceOp, operation))
        except RuntimeError as error:
            raise CalibrationError(
                f"process {self.rank} of {self.size}: another process of the run has ended ({str(error).splitlines()[0]}). "
                "Run the same command again: finished pictures are kept"
            ) from error
        reduced: Array = tensor.numpy()
        return reduced


def join_group() -> TorchGroup:
    """Join the processes that torchrun started, using the environment variables that it set."""
    import torch

    torch.distributed.init_process_group("gloo")
    return TorchGroup(torch.distributed.get_rank(), torch.distributed.get_world_size())
