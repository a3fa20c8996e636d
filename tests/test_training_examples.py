"""The programs that train small models, for a few steps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dq_export.core.condition_file import CONDITIONS, load_conditions
from dq_export.families.source import load_reference

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.slow
@pytest.mark.parametrize("program", ["train_dit_digits", "train_pixart_digits", "train_sd3_digits"])
def test_a_few_steps_leave_a_checkpoint_that_draws(program: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    options = ["--output-dir", str(folder), "--steps", "2", "--batch", "4"]
    command = [sys.executable, str(EXAMPLES / f"{program}.py"), *options]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    reference = load_reference(str(folder))
    if (folder / CONDITIONS).is_file():
        reference.conditions = load_conditions(folder / CONDITIONS)
    elif reference.inputs[-1].name.startswith("encoder"):
        reference.conditions = reference.encode(("a one",), "cpu")
    latents = reference.draw(reference.forward, reference.noise(1, 0), np.zeros(1, dtype=np.int64), steps=2, guidance=2.0)
    assert latents.shape == (1, 1, 16, 16)
    assert np.isfinite(latents).all()
