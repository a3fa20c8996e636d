"""The page about prompts tells the truth: what its lines write is what an export takes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from pixart import save_pixart

from dq_export.core.condition_file import load_conditions, misfit
from dq_export.core.prompts import BYTES, MAX_PROMPTS
from dq_export.families.source import load_reference

PAGE = (Path(__file__).parents[2] / "docs" / "prompts.md").read_text()


def test_the_lines_of_the_page_write_conditions_that_the_network_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_pixart(tmp_path / "model")
    index = model / "model_index.json"  # as diffusers itself writes it
    parts = {"scheduler": ["diffusers", "DPMSolverMultistepScheduler"], "vae": [None, None], "_diffusers_version": "0.36.0"}
    index.write_text(
        json.dumps({**json.loads(index.read_text()), **parts, "transformer": ["diffusers", "PixArtTransformer2DModel"]})
    )
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace("PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", str(model)), "prompts.md", "exec"), {})
    actual, reference = load_conditions(tmp_path / "encoded.safetensors"), load_reference(str(model))
    assert misfit(actual, reference.inputs, guided=True) == ""
    exported = reference.encode(actual.names, "cpu")
    for expected, exact in ((actual.arrays, exported.arrays), (actual.null, exported.null)):
        for name, rows in exact.items():
            np.testing.assert_allclose(expected[name], rows, rtol=0, atol=1e-5 * np.abs(rows).max())


def test_the_pages_numbers_are_those_of_the_program() -> None:
    assert f"up to {MAX_PROMPTS} lines and {BYTES:,} bytes" in PAGE
