"""Counts where scalings fold, in a small network with random weights of each architecture.

    python benchmarks/folds.py [dit pixart sd3 flux wan sd15]

prints the number of sites that fold free, with operations on one row per sample, and with operations on all tokens or pixels;
and the largest relative change of the float output when random scalings and shifts are folded everywhere.
"""

from __future__ import annotations

import logging
import math
import sys
import warnings
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from dq_export.core.artifacts import CalibrationResult, SitePlan
from dq_export.passes.analysis.sites import GraphSite, graph_sites, structure
from dq_export.passes.base import run_passes, stored
from dq_export.passes.canonical.fold_scaling import FoldScaling
from dq_export.passes.canonical.fold_transpose import FoldTranspose
from dq_export.passes.canonical.merge_duplicates import MergeDuplicates

Arrays = dict[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Case:
    """A network: its diffusers class, its configuration, and its inputs as shapes of random floats or as arrays."""

    architecture: str
    config: Mapping[str, Any]
    inputs: Mapping[str, Any]
    conditions: tuple[str, ...] = ("encoder_hidden_states",)


B, TEXT = 2, 5
CASES = {
    "dit": Case(
        "DiTTransformer2DModel",
        {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 2, "num_layers": 3, "sample_size": 8}
        | {"patch_size": 2, "num_embeds_ada_norm": 5},
        {"hidden_states": (B, 2, 8, 8), "timestep": np.asarray([7, 500]), "class_labels": np.asarray([1, 3])},
        ("class_labels",),
    ),
    "pixart": Case(
        "PixArtTransformer2DModel",
        {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 3}
        | {"cross_attention_dim": 16, "sample_size": 8, "patch_size": 2, "caption_channels": 24}
        | {"use_additional_conditions": False},
        {"hidden_states": (B, 4, 8, 8), "encoder_hidden_states": (B, TEXT, 24), "timestep": np.asarray([7, 500])}
        | {"encoder_attention_mask": np.asarray([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]], dtype=np.float32)},
        ("encoder_hidden_states", "encoder_attention_mask"),
    ),
    "sd3": Case(
        "SD3Transformer2DModel",
        {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 3, "attention_head_dim": 8}
        | {"num_attention_heads": 2, "joint_attention_dim": 24, "caption_projection_dim": 16, "pooled_projection_dim": 12}
        | {"out_channels": 4, "pos_embed_max_size": 8, "dual_attention_layers": (0, 1), "qk_norm": "rms_norm"},
        {"hidden_states": (B, 4, 8, 8), "encoder_hidden_states": (B, TEXT, 24), "pooled_projections": (B, 12)}
        | {"timestep": np.asarray([7.5, 500], dtype=np.float32)},
        ("encoder_hidden_states", "pooled_projections"),
    ),
    "flux": Case(
        "FluxTransformer2DModel",
        {"patch_size": 1, "in_channels": 8, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16}
        | {"num_attention_heads": 2, "joint_attention_dim": 24, "pooled_projection_dim": 12, "guidance_embeds": True}
        | {"axes_dims_rope": (4, 6, 6)},
        {"hidden_states": (B, 16, 8), "encoder_hidden_states": (B, TEXT, 24), "pooled_projections": (B, 12)}
        | {"timestep": np.asarray([0.1, 0.7], dtype=np.float32), "img_ids": np.ones((16, 3), dtype=np.float32)}
        | {"txt_ids": np.zeros((TEXT, 3), dtype=np.float32), "guidance": np.asarray([3.5, 2], dtype=np.float32)},
        ("encoder_hidden_states", "pooled_projections", "img_ids", "txt_ids", "guidance"),
    ),
    "wan": Case(
        "WanTransformer3DModel",
        {"patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4}
        | {"text_dim": 16, "freq_dim": 32, "ffn_dim": 48, "num_layers": 3, "cross_attn_norm": True, "rope_max_seq_len": 32},
        {"hidden_states": (B, 4, 2, 4, 4), "timestep": np.asarray([7, 500]), "encoder_hidden_states": (B, TEXT, 16)},
    ),
    "sd15": Case(
        "UNet2DConditionModel",
        {"sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": (16, 32)}
        | {"norm_num_groups": 4, "cross_attention_dim": 24, "attention_head_dim": 2}
        | {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
        | {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")},
        {"sample": (B, 4, 8, 8), "timestep": np.asarray([7, 500]), "encoder_hidden_states": (B, TEXT, 24)},
    ),
}


def exported(case: Case) -> tuple[ir.Model, Arrays]:
    """Return a network with random weights as a float graph, and inputs for it."""
    import diffusers
    import torch

    torch.manual_seed(0)
    model = getattr(diffusers, case.architecture)(**case.config).eval()
    with torch.no_grad():
        for value in model.parameters():  # initial zeros and ones would hide a wrong fold
            value.copy_(torch.randn_like(value) * (0.7 / value.shape[-1] ** 0.5 if value.ndim > 1 else 0.3))
    rng = np.random.default_rng(1)
    feed = {
        name: rng.normal(size=item).astype(np.float32) if isinstance(item, tuple) else item for name, item in case.inputs.items()
    }

    class Wrapper(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = model

        def forward(self, *values: torch.Tensor) -> Any:
            return self.network(**dict(zip(feed, values, strict=True)), return_dict=False)[0]

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(Wrapper().eval(), tuple(map(torch.from_numpy, feed.values())), strict=False)
        export = torch.onnx.export(program, dynamo=True, opset_version=21, input_names=list(feed), verbose=False)
    assert export is not None
    graph = export.model
    graph.ir_version = 10
    _bypass_squeeze(graph)
    names = {str(value.name) for value in graph.graph.inputs}
    return graph, {name: value for name, value in feed.items() if name in names}


def _bypass_squeeze(model: ir.Model) -> None:
    """Remove each Squeeze of an axis longer than 1. It does nothing in PyTorch, and fails in ONNX."""
    for node in [node for node in model.graph if node.op_type == "Squeeze"]:
        source, axes = node.inputs
        assert source is not None
        assert axes is not None
        assert axes.const_value is not None
        if source.shape is not None and source.shape[int(axes.const_value.numpy().item())] != 1:
            for user, index in list(node.outputs[0].uses()):
                user.replace_input_with(index, source)
            model.graph.remove(node)


def output_of(model: ir.Model, feed: Arrays) -> np.ndarray[Any, Any]:
    """Return the graph's result on ONNX Runtime without optimisations."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(ir.serde.serialize_model(model).SerializeToString(), options, ["CPUExecutionProvider"])
    output: np.ndarray[Any, Any] = session.run(None, feed)[0]
    return output


def fold_at_random(model: ir.Model, names: Collection[str], *, convolutions: bool = False) -> None:
    """Fold random scalings at the named sites in place, and random shifts at folds that allow them."""
    rng, plans = np.random.default_rng(2), dict[str, SitePlan]()
    for item in graph_sites(model, convolutions=convolutions):
        site, width, node = item.site, item.readers[0].width, item.readers[0].node
        if site.name not in names:
            continue
        if site.shares:
            in_scale, in_shift = plans[site.shares].in_scale, plans[site.shares].in_shift
        else:
            weight = stored(node.inputs[1])
            taps = math.prod(weight.shape.numpy()[2:]) if weight is not None and node.op_type == "Conv" else 1
            in_scale = np.exp(0.5 * rng.normal(size=width)).astype(np.float32).repeat(taps)
            in_shift = (0.5 * rng.normal(size=width)).astype(np.float32).repeat(taps) * np.float32(site.fold.shifts)
        plans[site.name] = SitePlan(site=site, method="random", in_scale=in_scale, in_shift=in_shift, activation=None)
    assert set(plans) == set(names)
    result = CalibrationResult(sites=plans, weight_scale={}, provenance={})
    run_passes(model, [FoldScaling(result=result)])


@dataclass(frozen=True)
class Folds:
    """The result of an analysis: counts of sites by cost, and the change of the float output by folding."""

    gemms: Counter[str]
    convolutions: Counter[str]
    shared: int
    sites: dict[str, GraphSite]
    change: float


def measure(case: Case) -> Folds:
    """Analyse a network, and fold random scalings and shifts at every site with more than one row per sample."""
    model, feed = exported(case)
    roles = structure(model, case.conditions).linears
    run_passes(model, [FoldTranspose(), MergeDuplicates()])
    exact = output_of(model, feed)

    def reads_tokens(item: GraphSite) -> bool:
        return item.readers[0].name not in roles or any(
            roles[reader.name].role in ("gemm", "static") for reader in item.readers if reader.name in roles
        )

    sites = {item.site.name: item for item in graph_sites(model, convolutions=True) if reads_tokens(item)}
    kinds = {name: sites[item.site.shares or name].site.fold.kind for name, item in sites.items()}
    fold_at_random(model, sites, convolutions=True)
    return Folds(
        gemms=Counter(kind for name, kind in kinds.items() if sites[name].readers[0].axis < 0),
        convolutions=Counter(kind for name, kind in kinds.items() if sites[name].readers[0].axis > 0),
        shared=sum(bool(item.site.shares) for item in sites.values()),
        sites=sites,
        change=float(np.abs(output_of(model, feed) - exact).max() / np.abs(exact).max()),
    )


def main(names: list[str]) -> None:
    """Print the table."""
    print("| network | GEMM sites: free / vector / token | convolutions: free / vector / pixels | shared | relative change |")
    print("|---|---|---|---|---|")
    for name in names or CASES:
        result = measure(CASES[name])
        gemms, convolutions = (
            " / ".join(str(counts[kind]) for kind in ("free", "vector", "token"))
            for counts in (result.gemms, result.convolutions)
        )
        print(f"| {name} | {gemms} | {convolutions} | {result.shared} | {result.change:.1e} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
