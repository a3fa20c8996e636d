"""`dq-export push` and `dq_export.load("owner/name")`, with the hub's own library and a hub on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from local_hub import GUEST, TOKEN, serving

import dq_export
from dq_export.hub_folder import HubError, push
from dq_export.output_folder import OutputError

REVISION = "eab87f77abd5aef071a632f08807fbaab0b704d0"
UNET = {
    "_class_name": "UNet2DConditionModel", "sample_size": 64, "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D"], "block_out_channels": [320],
}  # fmt: skip
ADDED = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
XL = {"cross_attention_dim": 2048, "projection_class_embeddings_input_dim": 2816, **ADDED}
REFINER = {"cross_attention_dim": 1280, "projection_class_embeddings_input_dim": 2560, **ADDED}
INPAINT = {"in_channels": 9}
DRAW = """
import sys, numpy as np, dq_export
engine = dq_export.load(sys.argv[1])
feed = {"hidden_states": np.random.default_rng(0).standard_normal((2, 2, 8, 8), dtype=np.float32),
        "timestep": np.array([300]), "class_labels": np.array([1, 3])}
np.save(sys.argv[2], engine.run(feed))
dq_export.load(sys.argv[1])  # its folder is there already
"""


def run(home: Path, address: str, *words: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    """A process of its own: the hub's library reads its address, and the token's place, when it is imported."""
    variables = {
        **os.environ, "HF_HOME": str(home), "HF_ENDPOINT": address, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip
    return subprocess.run([sys.executable, *words], env=variables, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def out(tiny_exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export whose recipe says that its checkpoint is the hub's."""
    out = tmp_path_factory.mktemp("published") / "out"
    shutil.copytree(tiny_exported, out)
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    (out / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "model": "dit", "revision": REVISION}))
    (out / "notes.txt").write_text("of the user alone")
    shutil.copyfile(Path(__file__).parents[2] / "docs" / "pictures.png", out / "parity" / "pictures.png")
    return out


def test_a_pushed_export_loads_from_the_hub_with_the_same_bits(out: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "served", exists=False) as hub:
        result = run(tmp_path / "home", hub.address, "-m", "dq_export", "push", str(out), "owner/name")
        assert result.returncode == 0, result.stderr
        assert f"published: {hub.address}/owner/name/commit/{hub.commit}\n" in result.stdout
        assert hub.requests[0] == "POST /api/repos/create"
        for name in ("model.onnx", "model.onnx.data", "report.json", "recipe.yaml", "float/config.json", "parity/inputs.json"):
            assert (hub.folder / name).read_bytes() == (out / name).read_bytes(), name
        assert {hashlib.sha256((out / name).read_bytes()).hexdigest() for name in ("model.onnx", "model.onnx.data")} <= {
            *hub.large
        }
        left = {"notes.txt", ".lock", "stages.json", "float/model.onnx", "float/model.onnx.data"}
        assert not left & {*hub.files()}, "what is the user's, or the base model's"
        process = run(tmp_path / "home", hub.address, "-c", DRAW, "owner/name", str(tmp_path / "hub.npy"), token="")
        assert process.returncode == 0, process.stderr
        assert {"model.onnx", "model.onnx.data"} <= {*hub.read}
        assert not [name for name in hub.read if name.startswith("parity")], "only what a load reads"
    feed = {
        "hidden_states": np.random.default_rng(0).standard_normal((2, 2, 8, 8), dtype=np.float32),
        "timestep": np.array([300]),
        "class_labels": np.array([1, 3]),
    }
    expected = dq_export.load(out).run(feed)
    np.testing.assert_array_equal(np.load(tmp_path / "hub.npy"), expected)


def test_a_second_push_takes_the_place_of_the_first(out: Path, tmp_path: Path) -> None:
    """Files of the other export go, and files that no export has stay."""
    served = tmp_path / "served"
    for name in ("engine/model.plan", "triton/denoiser/config.pbtxt", "LICENSE", ".gitattributes", "README.md"):
        (served / name).parent.mkdir(parents=True, exist_ok=True)
        (served / name).write_text("old")
    with serving(served) as hub:
        result = run(tmp_path / "home", hub.address, "-m", "dq_export", "push", str(out), "owner/name")
    assert result.returncode == 0, result.stderr
    assert not {"engine/model.plan", "triton/denoiser/config.pbtxt"} & {*hub.files()}
    assert {"LICENSE", ".gitattributes", "engine/session.json"} <= {*hub.files()}
    _, metadata, card = (served / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(metadata) == {
        "base_model": "facebook/DiT-XL-2-256", "base_model_relation": "quantized", "library_name": "dq-export",
        "tags": ["dq-export", "onnx", "diffusers", "quantized", "w8a8"],
    }  # fmt: skip
    report = json.loads((out / "report.json").read_text())
    assert f"at revision `{REVISION[:12]}`, quantized to W8A8 for ONNX Runtime's CPU provider" in card
    assert f"| low precision | {report['audit']['integer_share']:.1%}".replace("%", "") in card.replace("%", "")
    assert f"{report['latency']['engine_ms']:.2f} ms on the engine" in card
    assert "![Rows of pictures: PyTorch, the engine, their difference](parity/pictures.png)" in card
    assert 'pipe.transformer = dq_export.load("owner/name")' in card
    assert report["parity"]["replay"] in card


@pytest.mark.parametrize(
    ("changes", "task"),
    [({}, "text-to-image"), (INPAINT, "image-to-image"), ({**INPAINT, **XL}, "image-to-image"), (REFINER, "image-to-image")],
    ids=["prompts", "inpainting", "XL's inpainting", "refiner"],
)
def test_the_cards_tag_names_the_task_of_the_pipeline(changes: dict[str, Any], task: str, out: Path, tmp_path: Path) -> None:
    """As the hub tags the pipelines' own repositories."""
    copy = tmp_path / "out"
    shutil.copytree(out, copy)
    (copy / "float" / "config.json").write_text(json.dumps({**UNET, **changes}))
    with serving(tmp_path / "served") as hub:
        result = run(tmp_path / "home", hub.address, "-m", "dq_export", "push", str(copy), "owner/name")
    assert result.returncode == 0, result.stderr
    _, metadata, card = (tmp_path / "served" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(metadata)["pipeline_tag"] == task
    assert 'pipe.unet = dq_export.load("owner/name")' in card


@pytest.mark.parametrize(
    ("word", "token", "message"),
    [
        ("owner/name", "", "error: there is no token for the hub: log in with `hf auth login`"),
        ("owner/name", "hf_wrong", "error: the hub refuses 'owner/name': it does not know the token; log in with"),
        pytest.param(
            "owner/name",
            GUEST,
            "error: the hub refuses 'owner/name': the token may not write for 'owner'",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["no token", "unknown token", "another's repository"],
)
def test_a_push_that_the_hub_does_not_take_ends_in_one_line(
    word: str, token: str, message: str, out: Path, tmp_path: Path
) -> None:
    with serving(tmp_path / "served", exists=False) as hub:
        result = run(tmp_path / "home", hub.address, "-m", "dq_export", "push", str(out), word, token=token)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1, result.stderr
    assert hub.files() == []


def test_without_a_network_nothing_is_pushed_or_loaded(out: Path, tmp_path: Path) -> None:
    nowhere = "http://127.0.0.1:9"
    result = run(tmp_path / "home", nowhere, "-m", "dq_export", "push", str(out), "owner/name")
    assert result.returncode == 1
    assert result.stderr.startswith("error: the hub cannot be reached, nothing was published (")
    assert result.stderr.count("\n") == 1, result.stderr
    process = run(tmp_path / "home", nowhere, "-c", DRAW, "owner/name", str(tmp_path / "x.npy"))
    assert "owner/name': not a local folder, not in the hub's cache, and the hub cannot be reached (" in process.stderr


def edited(out: Path, edit: Callable[[dict[str, dict[str, object]]], object]) -> None:
    report = json.loads((out / "report.json").read_text())
    edit(report)
    (out / "report.json").write_text(json.dumps(report))


UNFINISHED = {"outcome": "unfinished", "status": 5}
FAILED = {"outcome": "failed", "status": 4, "reasons": ["engine: 3.0 dB at timestep 1, required 20.0 dB"]}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "no such folder; is it the output folder of a finished export?"),
        (lambda out: (out / "report.json").unlink(), "no report.json; is it the output folder of a finished export?"),
        (lambda out: edited(out, lambda report: report.update(verdict=None)),
         "the export is not finished; run `dq-export --recipe {out}/recipe.yaml -o {out}`"),
        (lambda out: edited(out, lambda report: report["verdict"].update(UNFINISHED)),
         "its engine is not built yet; run `dq-export finish {out}` where its GPU is"),
        (lambda out: edited(out, lambda report: report["verdict"].update(FAILED)),
         "the export did not pass (engine: 3.0 dB at timestep 1, required 20.0 dB); `dq-export explain {out}` shows"),
        (lambda out: (out / "engine" / "link").symlink_to("/etc/passwd"), "links inside an output folder are not followed"),
    ],
    ids=["no folder", "no report", "no verdict", "no engine", "failed", "link"],
)  # fmt: skip
def test_only_an_export_that_passed_is_pushed(spoil: Callable[[Path], object], message: str, out: Path, tmp_path: Path) -> None:
    copy = tmp_path / "out"
    shutil.copytree(out, copy)
    spoil(copy)
    with pytest.raises(OutputError) as error:
        push(copy, "owner/name")
    assert message.format(out=copy) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["name", "a/b/c", "owner/", "owner/na me", "https://x/owner/name", "owner/..", "o--o/name"])
def test_a_name_that_is_not_owner_and_name_is_refused(name: str, out: Path) -> None:
    with pytest.raises(HubError, match="owner/name") as error:
        push(out, name)
    assert "\n" not in str(error.value)


def test_a_repository_without_an_export_is_refused(tmp_path: Path) -> None:
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "README.md").write_text("a model")
    (tmp_path / "served" / "model.onnx").write_text("of another tool")
    with serving(tmp_path / "served") as hub:
        result = run(tmp_path / "home", hub.address, "-c", DRAW, "owner/name", str(tmp_path / "x.npy"))
        assert (
            "model 'owner/name': not a finished export, because it has no recipe.yaml, report.json, float/config.json"
            in result.stderr
        )
        absent = run(tmp_path / "home", hub.address, "-c", DRAW, "owner/other", str(tmp_path / "x.npy"))
        assert (
            "'owner/other': not a local folder. model 'owner/other': the hub has no such model, or it is private" in absent.stderr
        )
