"""A checkpoint's diffusers scheduler: loaded, tried before any work, and its loop of network calls."""

from __future__ import annotations

import inspect
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dq_export.core.documents import shown, shown_path

from .checkpoint import SCHEDULER_CONFIG
from .config_values import RAISED, reason_of, refused, require_values
from .network import read_config, silent
from .reference import Feed, Float32, ModelError

SCHEDULERS = frozenset({
    "DDIMParallelScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDPMScheduler", "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "EDMEulerScheduler", "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler",
    "LCMScheduler", "LMSDiscreteScheduler", "PNDMScheduler", "SASolverScheduler", "TCDScheduler", "UniPCMultistepScheduler",
})  # fmt: skip
"""Samplers of a network that predicts noise, picture or velocity of a variance-preserving diffusion. Others sample flows,
tokens or several stages: a loop over them may run to its end and draw nothing of what the network learned.
Source: diffusers' `KarrasDiffusionSchedulers`, which DiTPipeline takes, less the one that draws noise without a seed."""
CHANGES: tuple[tuple[str, Any], ...] = (
    ("timestep_spacing", "trailing"), ("timestep_spacing", "leading"), ("timestep_type", "discrete"), ("steps_offset", 0),
    ("use_karras_sigmas", False), ("use_exponential_sigmas", False), ("use_beta_sigmas", False), ("use_lu_lambdas", False),
    ("final_sigmas_type", "sigma_min"), ("final_sigmas_type", "zero"), ("solver_order", 1), ("skip_prk_steps", True),
)  # fmt: skip
"""Of the way of sampling alone: none of them changes what the network was trained for."""


def load_scheduler(folder: Path | None, default: Mapping[str, Any]) -> Any:
    """The diffusers scheduler of a folder; DDIM with `default` where there is none.

    Raises:
        ModelError: the folder names something that does not sample such a network, or values that it does not take.
    """
    import diffusers

    if folder is None:
        return diffusers.DDIMScheduler(**default)
    path = folder / SCHEDULER_CONFIG
    config = read_config(path, finite=False)  # diffusers itself writes -Infinity
    name = config.get("_class_name")
    scheduler: Any = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (inspect.isclass(scheduler) and issubclass(scheduler, diffusers.SchedulerMixin)):
        raise ModelError(f"{shown_path(path)}: {shown(name)} is not a scheduler of diffusers {diffusers.__version__}")
    require_sampler(str(name), shown_path(path))
    require_values(scheduler, config, path)
    with silent(), refused(f"{shown_path(path)}: makes no {name}", "correct its values, or download it again"):
        return scheduler.from_config(config)  # type: ignore[attr-defined]


def require_sampler(name: str, where: str) -> None:
    """Let a diffusers class pass that samples a network which predicts noise.

    Raises:
        ModelError: another one.
    """
    if name not in SCHEDULERS:
        raise ModelError(
            f"{where}: {name} does not sample a network that predicts noise, as a DiT does; put the scheduler there that the "
            "network was trained for, for example DDIMScheduler"
        )


def rehearsed_timesteps(scheduler: Any, steps: int, channels: int) -> list[float]:
    """The timesteps of a trajectory, after a run of all its steps with a network that gives zeros.

    Raises:
        ModelError: the scheduler fails, sends timesteps that are no integers, or gives NaN or Inf; the message says what
            to change, and that was tried.
    """
    try:
        return _rehearse(scheduler, steps, channels)
    except RAISED as error:
        problem = reason_of(error)
    raise ModelError(
        f"scheduler {type(scheduler).__name__} cannot sample in {steps} steps ({problem}); {_remedy(scheduler, steps, channels)}"
    )


def sample(
    scheduler: Any, noise: Float32, labels: npt.NDArray[np.int64], *, null: int, steps: int, guidance: float
) -> Generator[Feed, Float32, Float32]:
    """diffusers' DiTPipeline loop as a coroutine: yields a feed, is sent the network's output, returns the latents.

    With guidance > 1 a feed holds every sample twice, first with its label, then with the null label.

    Args:
        noise: float32[B, C, H, W].
        null: the label of no class.

    Raises:
        ModelError: the scheduler does not take so many steps. What else it cannot do, `rehearsed_timesteps` finds.
    """
    import torch

    with silent(), refused(f"scheduler {type(scheduler).__name__} cannot sample in {steps} steps", "change --steps"):
        scheduler.set_timesteps(steps)
    latents = torch.from_numpy(noise) * scheduler.init_noise_sigma
    guided = guidance > 1
    class_labels = np.concatenate([labels, np.full_like(labels, null)]) if guided else labels
    extra = {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        extra["generator"] = torch.Generator().manual_seed(0)
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(torch.cat([latents, latents]) if guided else latents, timestep)
        output = yield {
            "hidden_states": scaled.numpy(),
            "timestep": np.asarray([int(timestep)], dtype=np.int64),
            "class_labels": class_labels,
        }
        # A learned sigma doubles the channels; the samplers use the first half, the noise.
        predicted = torch.from_numpy(output)[:, : latents.shape[1]]
        if guided:
            conditional, unconditional = predicted.chunk(2)
            predicted = unconditional + guidance * (conditional - unconditional)
        latents = scheduler.step(predicted, timestep, latents, **extra).prev_sample
    final: Float32 = latents.numpy()
    return final


def _rehearse(scheduler: Any, steps: int, channels: int) -> list[float]:
    """Raises what the scheduler raises, and ValueError for what a DiT cannot take."""
    with silent():
        scheduler.set_timesteps(steps)
    timesteps = [float(timestep) for timestep in scheduler.timesteps]
    if not timesteps:
        raise ValueError("it sends no timestep")
    for timestep in timesteps:
        if timestep != int(timestep):
            raise ValueError(f"it sends the fractional timestep {timestep:g}, and DiT takes integers")
        if timestep < 0:
            raise ValueError(f"it sends the timestep {timestep:g}")
    loop = sample(
        scheduler, np.ones((1, channels, 2, 2), dtype=np.float32), np.zeros(1, dtype=np.int64), null=0, steps=steps, guidance=2.0
    )
    feed, done = next(loop), 0
    while np.isfinite(states := np.asarray(feed["hidden_states"])).all():
        try:
            feed, done = loop.send(np.zeros_like(states)), done + 1
        except StopIteration as end:
            if not np.isfinite(end.value).all():
                break
            return timesteps
    raise ValueError(f"step {done + 1} of {len(timesteps)} gives numbers that are not finite")


def _remedy(scheduler: Any, steps: int, channels: int) -> str:
    """The first change with which the scheduler runs, by running it."""
    import diffusers

    made = type(scheduler)
    # Without diffusers' list of keys that were not in the file, whose values it would put back to the class's own.
    config = {key: value for key, value in scheduler.config.items() if key != "_use_default_values"}
    limit = int(config.get("num_train_timesteps", steps))
    if steps > limit and _runs(made, config, limit, channels):
        return f"change --steps to {limit} or less"
    changes = CHANGES
    if str(config.get("variance_type")).startswith("learned"):  # the loop gives a sampler the noise alone
        changes = (("variance_type", inspect.signature(made.__init__).parameters["variance_type"].default), *CHANGES)
    for key, value in changes:
        if key in config and config[key] != value and _runs(made, {**config, key: value}, steps, channels):
            return f"set {key} to {'null' if value is None else str(value).lower()} in its configuration"
    for count in (50, 20, 10, 4):
        if count < steps and _runs(made, config, count, channels):
            return f"change --steps, for example to {count}"
    if _runs(diffusers.DDIMScheduler, config, min(steps, limit), channels):
        return "put DDIMScheduler in its place, which takes the same keys"
    return "put another scheduler in its place, for example DDIMScheduler with the values that the network was trained with"


def _runs(scheduler: Any, config: Mapping[str, Any], steps: int, channels: int) -> bool:
    """Whether a diffusers class with a configuration runs."""
    try:
        with silent():
            _rehearse(scheduler.from_config(config), steps, channels)
    except RAISED:
        return False
    return True
