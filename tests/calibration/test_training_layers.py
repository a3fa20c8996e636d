"""Gradients of the linears that are trained."""

from __future__ import annotations

from pathlib import Path

import torch
from conftest import calibration_of, feed_of, recipe_of

from dq_export.calibration.calibrate import calibrate
from dq_export.calibration.training.network import QuantizedNetwork
from dq_export.families.reference import Reference


def test_latent_weights_get_the_gradient_of_their_codes_inside_the_range(tiny: Reference, tmp_path: Path) -> None:
    recipe = recipe_of(tiny, bits="w4a4", rounding="distill")
    start = calibrate(calibration_of(tiny, recipe, tmp_path))
    assert start is not None
    network = QuantizedNetwork(tiny, start, recipe.assign(tiny.linears), tiny.chain(feed_of(tiny, 600)))
    layers = network.layers(tiny.blocks[0], "all")
    linear = next(linear for linear in layers.linears.values() if linear.training == "all")
    with torch.no_grad():
        linear.latent[0, :4] = torch.tensor([7.4, 7.6, -7.6, 3.2])  # codes are -7 ... 7
    layers.round()
    step = float(linear.steps[0, 0, 0])
    torch.testing.assert_close(linear.weight[0, :4].detach(), torch.tensor([7.0, 7.0, -7.0, 3.0]) * step)
    for _ in range(2):  # parts of a batch
        torch.nn.functional.linear(torch.arange(1.0, linear.weight.shape[1] + 1), linear.weight).sum().backward()
    layers.pass_gradients()
    assert linear.latent.grad is not None
    torch.testing.assert_close(linear.latent.grad[0, :4], 2 * step * torch.tensor([1.0, 0.0, 0.0, 4.0]))
    assert linear.weight.grad is None
