"""Checkpoints of half precision: float32 to all that reads them, and not in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dq_export.families.reference import ModelError
from dq_export.families.widened import widened

KINDS = (torch.bfloat16, torch.float16, torch.float64)


def anonymous() -> int:
    """Bytes of this process that no file holds."""
    rows = Path("/proc/self/status").read_text().splitlines()
    return next(int(row.split()[1]) * 1024 for row in rows if row.startswith("RssAnon:"))


def test_copies_are_exact_and_independent(tmp_path: Path) -> None:
    tensors = {str(kind): torch.randn(5, 7).to(kind) for kind in KINDS}
    tensors |= {"turned": torch.randn(6, 4).bfloat16().t(), "none": torch.empty(0, 3).half(), "one": torch.tensor(2.5).half()}
    actual = widened(tensors, tmp_path)
    assert actual.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(actual[name], tensor.float())
        assert actual[name].is_contiguous()
        assert actual[name].data_ptr() % 64 == 0 or not tensor.numel()
    actual["turned"][:] = 1
    assert torch.equal(actual["one"], torch.tensor(2.5))


def test_copies_lie_in_a_file_that_has_no_name(tmp_path: Path) -> None:
    tensors = {str(index): torch.ones(1 << 22, dtype=torch.bfloat16) for index in range(16)}  # 256 MiB as float32
    before = anonymous()
    actual = widened(tensors, tmp_path)
    assert sum(value.sum().item() for value in actual.values()) == 16 << 22, "every page was read"
    assert anonymous() - before < 48 << 20
    assert not list(tmp_path.iterdir())


def test_weights_that_do_not_fit_the_disk_are_refused_before_they_are_written(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"GB are free, and the checkpoint's weights take 1125899\.9 GB as float32; free some"):
        widened({"huge": torch.empty(1 << 48, dtype=torch.bfloat16, device="meta")}, tmp_path)
    with pytest.raises(ModelError, match=r"gone: cannot hold the weights as float32 \(No such file or directory\)"):
        widened({"a": torch.ones(1).half()}, tmp_path / "gone")
