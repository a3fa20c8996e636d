"""Writes the model card of an export, the text of its page on the hub, from the report."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass

from dq_export.core.documents import printable

from .report import Report

SIGNS = re.compile(r"([\\`*_\[\]<>|#~])")
"""Characters with a meaning in Markdown or HTML."""


@dataclass(frozen=True)
class Origin:
    """The checkpoint's origin, and its pipeline's name of the network.

    Args:
        name: the model's name in the text.
        hub_id: the checkpoint's id on the hub; empty: it is from a folder.
        revision: the commit; empty: it is from a folder.
        part: what pipelines call the network: `transformer` or `unet`.
        task: what the hub calls the task of its pipelines; empty: the hub has no name for it.
        adapters: files of adapters that are fused into it.
    """

    name: str
    hub_id: str
    revision: str
    part: str
    task: str
    adapters: tuple[str, ...] = ()


def model_card(report: Report, origin: Origin, name: str, *, pictures: bool) -> str:
    """Return the card as Markdown with the metadata that the hub reads.

    Args:
        report: the report of an export that passed.
        name: owner/name on the hub.
        pictures: whether the folder has `parity/pictures.png`.
    """
    bits, engine = report.recipe.get("bits", ""), report.engine or "ONNX Runtime"
    parts = [
        _metadata(report, origin),
        f"# {_text(name.partition('/')[2])}",
        f"{_base(origin)}, quantized to {_text(bits.upper())} for {_text(engine)} by dq-export. "
        "`model.onnx` holds standard ONNX operators only.",
        _figure(report) if pictures else "",
        "## Measured\n\n| | |\n|---|---|\n" + "\n".join(f"| {label} | {_text(text)} |" for label, text in _rows(report, origin)),
        _loading(origin, name),
        _making(report),
        f"The licence is that of the base model. `report.html` has every number{' of ' + report.date if report.date else ''}.",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _metadata(report: Report, origin: Origin) -> str:
    """Return the YAML block at the top, as JSON, which is YAML and quotes every text."""
    values: dict[str, object] = {"library_name": "dq-export"}
    if origin.hub_id:
        values |= {"base_model": origin.hub_id, "base_model_relation": "quantized"}
    if origin.task:
        values["pipeline_tag"] = origin.task
    values["tags"] = ["dq-export", "onnx", "diffusers", "quantized", report.recipe.get("bits", "")]
    return "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in values.items()), "---"])


def _base(origin: Origin) -> str:
    if not origin.hub_id:
        return _text(origin.name)
    return f"`{origin.hub_id}` at revision `{_text(origin.revision[:12])}`"


def _figure(report: Report) -> str:
    names = "; ".join(_text(name) for name in report.captions())
    return (
        "![Rows of pictures: PyTorch, the engine, their difference](parity/pictures.png)\n\n"
        f"The same noise, drawn by PyTorch in float32, by {_text(report.drawn_by())}, and four times their difference"
        f"{': ' + names if names else ''}."
        f"{' ' + _text(report.pictures.origin) if report.pictures else ''}"
    )


def _rows(report: Report, origin: Origin) -> list[tuple[str, str]]:
    """Return labels and texts of the measurements."""
    actions = Counter(linear.action for linear in report.linears)
    schemes = ", ".join(f"{count} {action}" for action, count in actions.most_common())
    rows = [("adapters", ", ".join(origin.adapters))] if origin.adapters else []
    rows += [("bits", f"{report.recipe.get('bits', '')}; linears: {schemes}")]
    if audit := report.audit:
        required = f", required {report.verdict.min_coverage:.1%}" if report.verdict else ""
        share = f"{audit.coverage:.1%} of those that the recipe quantizes{required}"
        rows.append(("low precision", f"{audit.integer_share:.1%} of all GEMM FLOPs, {share}"))
    if stages := report.stages():
        low = report.worst_call(stages[-1])
        assert low is not None  # stages are those that have calls
        mean = f"{report.mean_sqnr(stages[-1]):.1f} dB mean"
        rows.append(("SQNR of a network call", f"{mean}, {low.sqnr:.1f} dB worst, at timestep {low.timestep:g}"))
    if report.parity and report.parity.trajectories:
        last = report.parity.trajectories[-1]
        rows.append(("SQNR of pictures", f"{last.sqnr:.1f} dB over {last.samples}, {last.worst_sqnr:.1f} dB worst"))
        rows += [("looks", last.appearance())] if last.appearance() else []
    if size := report.size:
        rows.append(("size", f"{size.float_bytes / 1e6:.1f} to {size.engine_bytes / 1e6:.1f} MB"))
    if speed := report.latency:
        times = f"{speed.float_ms:.2f} ms by {speed.baseline}, {speed.engine_ms:.2f} ms on the engine: {speed.ratio:.2f} times"
        rows.append((f"a call of batch {speed.batch}", times))
    return [*rows, ("machine", report.machine)]


def _loading(origin: Origin, name: str) -> str:
    base = origin.hub_id or "the base model's folder"
    return f"""## Load

```python
import dq_export
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{base}", {origin.part}=None)
pipe.{origin.part} = dq_export.load("{name}")
```

Without dq-export, `model.onnx` runs on ONNX Runtime; its inputs have diffusers' names."""


def _making(report: Report) -> str:
    """Return the recipe's keys, and the command that repeats the comparison."""
    keys = "\n".join(f"{key}: {printable(value, 200)}" for key, value in report.recipe.items())
    proof = ""
    if report.parity and report.parity.replay:
        command = printable(report.parity.replay, 400)
        proof = f"\n\nThis replays the recorded calls in a copy of the folder:\n\n```sh\n{command}\n```"
    return (
        f"## Recipe\n\n`dq-export --recipe recipe.yaml -o out` repeats the export.\n\n```yaml\n{keys}\n```{proof}\n\n"
        f"Made with {_text(', '.join(f'{key} {value}' for key, value in report.versions.items()))}."
    )


def _text(text: str) -> str:
    """Escape a text for Markdown."""
    return SIGNS.sub(r"\\\1", printable(text))
