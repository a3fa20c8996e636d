"""Probes diffusers' samplers for tables of coefficients. A server reads the tables without any code of diffusers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np

from dq_export.deploy.triton.serving.schedules import COLUMNS, Float64, Schedules, Step

from .config_values import RAISED, reason_of
from .loading import silent
from .prediction import FLOW, NOISE, Prediction
from .reference import ModelError, Samplers

KINDS: Mapping[str, Mapping[str, tuple[str, dict[str, Any]]]] = {
    NOISE.name: {
        "ddim": ("DDIMScheduler", {}),
        "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
        "euler": ("EulerDiscreteScheduler", {}),
    },
    FLOW.name: {"euler": ("FlowMatchEulerDiscreteScheduler", {})},
}
"""By the kind of prediction and the name in requests: diffusers' class, and its values beside the checkpoint's own
configuration."""
GREAT = 1e4
"""A value far outside any picture. A sampler that clips it is not linear."""
EXACT = 1e-6
"""The greatest relative deviation from a linear step that float32 rounding explains."""


@dataclass(frozen=True, kw_only=True)
class Sending:
    """How a pipeline uses a scheduler.

    Args:
        integers: whether the network takes integer timesteps.
        set_timesteps: sets a scheduler's timesteps for a number of steps.
        divisor: the scheduler's timesteps are divided by it, in float32, for the network.
    """

    integers: bool = True
    set_timesteps: Callable[[Any, int], None] = lambda scheduler, count: scheduler.set_timesteps(count)
    divisor: float = 1.0


PLAIN = Sending()


class CurvedError(Exception):
    """No table can hold the sampler."""


def tabulate(
    scheduler: Any,
    max_steps: int,
    progress: Callable[[int, int], None],
    prediction: Prediction = NOISE,
    sending: Sending = PLAIN,
) -> Samplers:
    """Compute the tables of every sampler of KINDS with the checkpoint's own configuration.

    Args:
        scheduler: the checkpoint's diffusers scheduler. If its class is not one of KINDS, the first sampler replaces it.
        max_steps: the greatest number of steps.
        prediction: the kind of the network's output.
        sending: how the network's pipeline uses a scheduler.

    Raises:
        ModelError: no sampler has a table, or the checkpoint's scheduler samples another kind of prediction.
    """
    import diffusers

    sampler, kinds = type(scheduler).__name__, KINDS.get(prediction.name, {})
    # diffusers would build a sampler for another prediction from these values, and draw wrong pictures
    if sampler not in prediction.schedulers or not kinds:
        raise ModelError(f"--triton: no table holds {sampler} for a network that predicts {prediction.name}; leave --triton out")
    tables: dict[str, Float64] = {}
    total, refused = len(kinds) * max_steps, []
    for name, (kind, options) in kinds.items():
        try:
            with warnings.catch_warnings(), silent():
                warnings.simplefilter("ignore")  # about keys that only one of the schedulers has
                same = scheduler if sampler == kind else None
                probed = same or getattr(diffusers, kind).from_config({**scheduler.config, **options})
            tables[name] = table_of(probed, max_steps, lambda n: progress(len(tables) * max_steps + n, total), sending)
        except CurvedError as error:
            refused.append(f"{kind} {error}")
        except RAISED as error:
            refused.append(f"{kind} does not take its values ({reason_of(error)})")
    if not tables:
        raise ModelError(f"no sampler of this checkpoint can be served: {'; '.join(refused)}")
    if sampler not in [kind for kind, _ in kinds.values()]:
        refused.append(f"{sampler}, the checkpoint's own, is not offered")
    default = next((name for name, (kind, _) in kinds.items() if kind == sampler and name in tables), next(iter(tables)))
    return Samplers(schedules=Schedules(tables), default=default, refused=tuple(refused))


def table_of(
    scheduler: Any, max_steps: int, progress: Callable[[int], None] = lambda count: None, sending: Sending = PLAIN
) -> Float64:
    """Compute a table of `Schedules`, float64[max_steps * (max_steps + 1) / 2, 9].

    The rows of a number of steps that the scheduler does not support are NaN.

    Raises:
        CurvedError: the scheduler is not linear (clipping, thresholding), draws noise, uses more than one earlier step, or
            sends fractional timesteps to a network that takes integers.
    """
    rows, last, largest = [], "", 0
    for count in range(1, max_steps + 1):
        try:
            steps = [astuple(step) for step in probe(scheduler, count, sending)]
            if not np.isfinite(steps).all():
                raise ValueError("gives numbers that are not finite")
            largest = count
        except RAISED as error:
            steps = [(np.nan,) * len(COLUMNS)] * count
            last = reason_of(error)
        rows += steps
        progress(count)
    table: Float64 = np.array(rows, dtype=np.float64)
    if largest < min(max_steps, 2):  # one step does not prove it: a sampler with two calls per step passes it, too
        raise CurvedError(last)
    return table


def probe(scheduler: Any, count: int, sending: Sending = PLAIN) -> list[Step]:
    """Measure the coefficients of one trajectory with unit vectors as latents and network outputs.

    Each step has two elements of the sample that are 1, one in its latents and one in its output. They are 0 in the next two
    steps, so the result shows separately what a step takes of its own values and of those of the step before.

    Exactness: that of diffusers' own arithmetic, float32.

    Raises:
        CurvedError: see `table_of`.
        ValueError: the scheduler does not support the number of steps, or calls the network more or less often.
    """
    import torch

    sending.set_timesteps(scheduler, count)
    timesteps = list(scheduler.timesteps)
    if len(timesteps) != count:
        raise ValueError(f"calls the network {len(timesteps)} times in {count} steps")
    steps: list[tuple[float, ...]] = []
    period, state = 3, torch.get_rng_state()
    for index, timestep in enumerate(timesteps):
        if sending.integers and float(timestep) != int(timestep):
            raise CurvedError(f"sends the fractional timestep {float(timestep):g}")
        current, before = 2 * (index % period), 2 * ((index - 1) % period)
        latents, output = torch.zeros(1, 1, 1, 2 * period + 2), torch.zeros(1, 1, 1, 2 * period + 2)
        latents[..., current], output[..., current + 1] = 1.0, 1.0
        latents[..., -2] = GREAT
        factor = float(scheduler.scale_model_input(torch.ones(1), timestep)) if hasattr(scheduler, "scale_model_input") else 1.0
        result = scheduler.step(output, timestep, latents).prev_sample.flatten().double().tolist()
        x, e, great, zero = result[current], result[current + 1], result[-2], result[-1]
        x_before, e_before = (result[before], result[before + 1]) if index else (0.0, 0.0)
        older = [value for i, value in enumerate(result[:-2]) if i // 2 not in (current // 2, before // 2)]
        if zero != 0:
            raise CurvedError("draws noise at every step")
        if any(older):
            raise CurvedError("uses more than one earlier step")
        steps.append((float(timestep), factor, x, e, x_before, e_before, great))
    torch.set_rng_state(state)
    divisor = np.float32(sending.divisor)
    return [replace(step, timestep=float(np.float32(step.timestep) / divisor)) for step in _steps(scheduler, steps)]


def _steps(scheduler: Any, probed: list[tuple[float, ...]]) -> list[Step]:
    """Turn coefficients into steps, and check that the element of value GREAT was scaled and not clipped.

    A linear step gives GREAT * (x + x_before) there, because the element is GREAT in the step before, too.
    """
    steps = []
    for index, (timestep, factor, x, e, x_before, e_before, great) in enumerate(probed):
        expected = GREAT * (x + (x_before if index else 0.0))
        if abs(great - expected) > EXACT * GREAT * (abs(x) + abs(x_before)):
            raise CurvedError("clips or thresholds the sample")
        sigma = float(getattr(scheduler, "init_noise_sigma", 1.0))
        clean = _clean(scheduler, index, timestep, factor)
        steps.append(Step(timestep, sigma, factor, x, e, x_before, e_before, *clean))
    return steps


def _clean(scheduler: Any, index: int, timestep: float, factor: float) -> tuple[float, float]:
    """Return the factors of the latents and of the network's output in the predicted picture."""
    if type(scheduler).__name__ in FLOW.schedulers:
        return 1.0, -float(scheduler.sigmas[index])
    noise, signal = _noise_and_signal(scheduler, timestep)
    if scheduler.config.prediction_type == "epsilon":
        return factor / signal, -noise / signal
    return (signal * factor, -noise) if scheduler.config.prediction_type == "v_prediction" else (0.0, 1.0)


def _noise_and_signal(scheduler: Any, timestep: float) -> tuple[float, float]:
    """Return (noise, signal). The latents at a timestep are signal * picture + noise * unit noise."""
    power = float(scheduler.alphas_cumprod[int(timestep)])
    return float(np.sqrt(1 - power)), float(np.sqrt(power))
