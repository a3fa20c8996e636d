"""diffusers' samplers, probed into tables of coefficients that a server reads without any of its code."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import astuple
from typing import Any

import numpy as np

from dq_export.deploy.triton.serving.schedules import COLUMNS, Float64, Schedules, Step

from .config_values import RAISED, reason_of
from .loading import silent
from .prediction import FLOW, NOISE, Prediction
from .reference import ModelError, Samplers

KINDS: Mapping[str, Mapping[str, tuple[str, dict[str, Any]]]] = {
    NOISE.what: {
        "ddim": ("DDIMScheduler", {}),
        "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
        "euler": ("EulerDiscreteScheduler", {}),
    },
    FLOW.what: {"euler": ("FlowMatchEulerDiscreteScheduler", {})},
}
"""By what a network predicts and the name in a request: diffusers' class, and what it needs beside the checkpoint's own
configuration."""
GREAT = 1e4
"""A sample far outside any picture: what clips it is not linear."""
EXACT = 1e-6
"""How far float32 may let a linear step seem to bend, relative."""


class CurvedError(Exception):
    """A sampler that no table can hold."""


def tabulate(
    scheduler: Any, most: int, progress: Callable[[int, int], None], prediction: Prediction = NOISE, *, whole: bool = True
) -> Samplers:
    """The tables of every sampler of KINDS with the checkpoint's own configuration.

    Args:
        scheduler: the checkpoint's diffusers scheduler; one of another kind has no table, and the first takes its place.
        most: the greatest number of steps.
        prediction: what the network predicts.
        whole: the network takes integers as timesteps.

    Raises:
        ModelError: not one sampler has a table, or the checkpoint's samples something else than they do.
    """
    import diffusers

    mine, kinds = type(scheduler).__name__, KINDS.get(prediction.what, {})
    # diffusers would make another kind of sampler of its values, and draw wrong pictures
    if mine not in prediction.schedulers or not kinds:
        raise ModelError(
            f"--triton: {mine} does not sample a network that predicts {prediction.what} so that a table holds it; leave "
            "--triton out"
        )
    tables: dict[str, Float64] = {}
    refused = []
    for name, (kind, options) in kinds.items():
        try:
            with warnings.catch_warnings(), silent():
                warnings.simplefilter("ignore")  # of keys that one scheduler knows and the other does not
                own = scheduler if type(scheduler).__name__ == kind else None
                made = own or getattr(diffusers, kind).from_config({**scheduler.config, **options})
            tables[name] = table_of(made, most, lambda done: progress(len(tables) * most + done, len(kinds) * most), whole=whole)
        except CurvedError as error:
            refused.append(f"{kind} {error}")
        except RAISED as error:
            refused.append(f"{kind} does not take its values ({reason_of(error)})")
    if not tables:
        raise ModelError(f"no sampler of this checkpoint can be served: {'; '.join(refused)}")
    if mine not in [kind for kind, _ in kinds.values()]:
        refused.append(f"{mine}, the checkpoint's own, is not offered")
    own = next((name for name, (kind, _) in kinds.items() if kind == mine and name in tables), next(iter(tables)))
    return Samplers(schedules=Schedules(tables), own=own, refused=tuple(refused))


def table_of(scheduler: Any, most: int, progress: Callable[[int], None] = lambda done: None, *, whole: bool = True) -> Float64:
    """float64[most * (most + 1) / 2, 9]: what `Schedules` holds. NaN where the scheduler cannot take so many steps.

    Raises:
        CurvedError: it is not linear (clipping, thresholding), draws noise, looks back further than one step, or sends
            timesteps that are no integers where `whole` asks for them.
    """
    rows, last, largest = [], "", 0
    for count in range(1, most + 1):
        try:
            found = [astuple(step) for step in probe(scheduler, count, whole=whole)]
            if not np.isfinite(found).all():
                raise ValueError("gives numbers that are not finite")
            largest = count
        except RAISED as error:
            found = [(np.nan,) * len(COLUMNS)] * count
            last = reason_of(error)
        rows += found
        progress(count)
    table: Float64 = np.array(rows, dtype=np.float64)
    if largest < min(most, 2):  # one step alone is no trajectory: a sampler of two calls a step makes it as well
        raise CurvedError(last)
    return table


def probe(scheduler: Any, count: int, *, whole: bool = True) -> list[Step]:
    """The coefficients of one trajectory, found by feeding unit vectors to the scheduler itself.

    Every step gets two elements of the sample that are 1 for its latents or for its network output and 0 at all other
    steps, so what the scheduler remembers of earlier steps shows apart from what it is given.

    Exactness: of diffusers' own arithmetic, float32.
    Raises:
        CurvedError: see `table_of`.
        ValueError: for a number of steps that the scheduler cannot take, or makes more or fewer calls in.
    """
    import torch

    scheduler.set_timesteps(count)
    timesteps = list(scheduler.timesteps)
    if len(timesteps) != count:
        raise ValueError(f"calls the network {len(timesteps)} times in {count} steps")
    steps: list[tuple[float, ...]] = []
    period, state = 3, torch.get_rng_state()
    for index, timestep in enumerate(timesteps):
        if whole and float(timestep) != int(timestep):
            raise CurvedError(f"sends the fractional timestep {float(timestep):g}")
        here, before = 2 * (index % period), 2 * ((index - 1) % period)
        latents, output = torch.zeros(1, 1, 1, 2 * period + 2), torch.zeros(1, 1, 1, 2 * period + 2)
        latents[..., here], output[..., here + 1] = 1.0, 1.0
        latents[..., -2] = GREAT
        factor = float(scheduler.scale_model_input(torch.ones(1), timestep)) if hasattr(scheduler, "scale_model_input") else 1.0
        moved = scheduler.step(output, timestep, latents).prev_sample.flatten().double().tolist()
        x, e, great, zero = moved[here], moved[here + 1], moved[-2], moved[-1]
        x_before, e_before = (moved[before], moved[before + 1]) if index else (0.0, 0.0)
        older = [value for i, value in enumerate(moved[:-2]) if i // 2 not in (here // 2, before // 2)]
        if zero != 0:
            raise CurvedError("draws noise at every step")
        if any(older):
            raise CurvedError("looks back further than one step")
        steps.append((float(timestep), factor, x, e, x_before, e_before, great))
    torch.set_rng_state(state)
    return _finished(scheduler, steps)


def _finished(scheduler: Any, probed: list[tuple[float, ...]]) -> list[Step]:
    """With what the last step shows: the great element holds x * GREAT plus what was remembered of the step before."""
    found = []
    for index, (timestep, factor, x, e, x_before, e_before, great) in enumerate(probed):
        expected = GREAT * (x + (x_before if index else 0.0))
        if abs(great - expected) > EXACT * GREAT * (abs(x) + abs(x_before)):
            raise CurvedError("clips or thresholds the sample")
        sigma = float(getattr(scheduler, "init_noise_sigma", 1.0))
        clean = _clean(scheduler, index, timestep, factor)
        found.append(Step(timestep, sigma, factor, x, e, x_before, e_before, *clean))
    return found


def _clean(scheduler: Any, index: int, timestep: float, factor: float) -> tuple[float, float]:
    """What the predicted picture takes of the latents, and of the network's output."""
    if type(scheduler).__name__ in FLOW.schedulers:
        return 1.0, -float(scheduler.sigmas[index])
    noise, signal = _noise_and_signal(scheduler, timestep)
    if scheduler.config.prediction_type == "epsilon":
        return factor / signal, -noise / signal
    return (signal * factor, -noise) if scheduler.config.prediction_type == "v_prediction" else (0.0, 1.0)


def _noise_and_signal(scheduler: Any, timestep: float) -> tuple[float, float]:
    """What a network at this timestep sees: signal * picture + noise * unit noise."""
    kept = float(scheduler.alphas_cumprod[int(timestep)])
    return float(np.sqrt(1 - kept)), float(np.sqrt(kept))
