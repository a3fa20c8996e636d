"""Load a checkpoint's diffusers scheduler, and try it before any work."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dq_export.core.documents import shown, shown_path
from dq_export.core.network import Feed
from dq_export.core.plugins import fault_of_plugin

from .checkpoint import SCHEDULER_CONFIG
from .config_values import RAISED, SchedulerValues, reason_of, refused, require_values
from .family import Pictures
from .loading import read_config, silent
from .prediction import NOISE, Prediction
from .reference import Float32, MissingPackageError, ModelError, Network
from .stand_in import StandIn


def load_scheduler(folder: Path | None, default: Mapping[str, Any], prediction: Prediction = NOISE) -> Any:
    """The diffusers scheduler of a folder, or the one that `default` describes if the folder has none.

    Args:
        prediction: what the network predicts.

    Raises:
        ModelError: the folder's class does not sample such a network, or its configuration has invalid values.
    """
    import diffusers

    if folder is None:
        return getattr(diffusers, default["_class_name"]).from_config(dict(default))
    path = folder / SCHEDULER_CONFIG
    config = read_config(path, finite=False)  # diffusers itself writes -Infinity
    name = config.get("_class_name")
    scheduler: Any = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (inspect.isclass(scheduler) and issubclass(scheduler, diffusers.SchedulerMixin)):
        raise ModelError(f"{shown_path(path)}: {shown(name)} is not a scheduler of diffusers {diffusers.__version__}")
    _require_sampler(str(name), prediction, shown_path(path))
    require_values(scheduler, SchedulerValues, config, path)
    with silent(), refused(f"{shown_path(path)}: makes no {name}", "correct its values, or download it again"):
        return scheduler.from_config(config)  # type: ignore[attr-defined]


def noise_of(shape: tuple[int, ...], samples: int, seed: int) -> Float32:
    """float32[samples, *shape] with one generator for each sample: picture i does not depend on how many are drawn with it."""
    import torch

    seeds = [(seed * 100_003 + i) % 2**64 for i in range(samples)]  # PyTorch takes 64 bits
    samples_of_noise = [torch.randn(shape, generator=torch.Generator().manual_seed(value)) for value in seeds]
    noise: Float32 = torch.stack(samples_of_noise).numpy()
    return noise


def _require_sampler(name: str, prediction: Prediction, place: str) -> None:
    """Check that a diffusers class samples a network with this prediction.

    Raises:
        ModelError: it does not.
    """
    if name not in prediction.schedulers:
        raise ModelError(
            f"{place}: {name} does not sample a network that predicts {prediction.name}; put the scheduler there that the "
            f"network was trained for, for example {prediction.plain}"
        )


def set_steps(scheduler: Any, steps: int) -> None:
    """`scheduler.set_timesteps`.

    Raises:
        ModelError: the scheduler does not take this number of steps. A `Rehearsal` finds other faults.
    """
    with silent(), refused(f"scheduler {type(scheduler).__name__} cannot sample in {steps} steps", "change --steps"):
        scheduler.set_timesteps(steps)


def sampled(network: StandIn, scheduler: Any, pictures: Pictures, *, steps: int, guidance: float) -> Float32:
    """Sample latents in a plain loop, for networks whose pipelines take no noise or no conditions.

    With guidance > 1 a feed holds every sample twice: with its condition, then without. Of an output with more channels than
    the state, a learned sigma's, the first ones are used: they are the noise.
    """
    import torch

    set_steps(scheduler, steps)
    latents = torch.from_numpy(pictures.noise) * scheduler.init_noise_sigma
    guided, state = guidance > 1, network.inputs[0].name
    rows = dict(pictures.conditions)
    if guided:
        rows = {name: np.concatenate([value, pictures.null[name]]) for name, value in rows.items()}
    extra = {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        extra["generator"] = torch.Generator().manual_seed(0)
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(torch.cat([latents, latents]) if guided else latents, timestep)
        feed = {state: scaled.numpy(), "timestep": np.asarray([float(timestep)]), **rows}
        predicted = torch.from_numpy(network.run(feed))[:, : latents.shape[1]]
        if guided:
            conditional, unconditional = predicted.chunk(2)
            predicted = unconditional + guidance * (conditional - unconditional)
        latents = scheduler.step(predicted, timestep, latents, **extra).prev_sample
    final: Float32 = latents.numpy()
    return final


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """A trajectory with a network that returns zeros, before any work.

    Args:
        draw: samples a picture with a scheduler in a number of steps; raises the scheduler's errors, and ValueError for
            timesteps that the network does not take.
        state: name of the input that the sampler changes.
        output: the shape of the network's output, from that of the state.
        prediction: what the network predicts.
    """

    draw: Callable[[Any, int, Network], Float32]
    state: str
    output: Callable[[tuple[int, ...]], tuple[int, ...]]
    prediction: Prediction = NOISE

    def timesteps(self, scheduler: Any, steps: int) -> list[float]:
        """The timesteps of the trajectory, one for each call.

        Raises:
            ModelError: the scheduler fails, sends timesteps that the network does not take, or returns NaN or Inf; the
                message says what to change, and this change was tried.
            MissingPackageError: see `pipeline_of`.
            PluginError: the loop of a plug-in's family fails.
        """
        try:
            return self._rehearse(scheduler, steps)
        except MissingPackageError:
            raise
        except ModelError as error:  # of `set_steps`
            problem = reason_of(error.__cause__ or error)
        except RAISED as error:
            # A family's loop raises ValueError for timesteps that its network does not take; other errors are its own faults.
            fault = None if isinstance(error, ValueError) else fault_of_plugin(error, within=True)
            if fault:
                raise fault from error
            problem = reason_of(error)
        raise ModelError(
            f"scheduler {type(scheduler).__name__} cannot sample in {steps} steps ({problem}); {self._remedy(scheduler, steps)}"
        )

    def _rehearse(self, scheduler: Any, steps: int) -> list[float]:
        timesteps: list[float] = []

        def zeros(feed: Feed) -> Float32:
            states, timestep = np.asarray(feed[self.state], dtype=np.float32), float(feed["timestep"][0])
            if not 0 <= timestep < np.inf:
                raise ValueError(f"it sends the timestep {timestep:g}")
            if not np.isfinite(states).all():
                raise ValueError(f"step {len(timesteps) + 1} of {steps} gives numbers that are not finite")
            timesteps.append(timestep)
            return np.zeros(self.output(states.shape), dtype=np.float32)

        latents = self.draw(scheduler, steps, zeros)
        if not timesteps:
            raise ValueError("it sends no timestep")
        if not np.isfinite(latents).all():
            raise ValueError(f"the last of {len(timesteps)} steps gives numbers that are not finite")
        return timesteps

    def _remedy(self, scheduler: Any, steps: int) -> str:
        """The first change with which the scheduler runs, found by trying it."""
        import diffusers

        kind = type(scheduler)
        # Remove diffusers' list of keys that were not in the file: it would reset their values to the class's defaults.
        config = {key: value for key, value in scheduler.config.items() if key != "_use_default_values"}
        limit = int(config.get("num_train_timesteps", steps))
        if steps > limit and self._runs(kind, config, limit):
            return f"change --steps to {limit} or less"
        changes, plain = self.prediction.changes, self.prediction.plain
        if str(config.get("variance_type")).startswith("learned"):  # the loop gives a sampler the noise alone
            changes = (("variance_type", inspect.signature(kind.__init__).parameters["variance_type"].default), *changes)
        for key, value in changes:
            if key in config and config[key] != value and self._runs(kind, {**config, key: value}, steps):
                return f"set {key} to {'null' if value is None else str(value).lower()} in its configuration"
        for count in (50, 20, 10, 4):
            if count < steps and self._runs(kind, config, count):
                return f"change --steps, for example to {count}"
        if self._runs(getattr(diffusers, plain), config, min(steps, limit)):
            return f"put {plain} in its place, which takes the same keys"
        return f"put another scheduler in its place, for example {plain} with the values that the network was trained with"

    def _runs(self, kind: Any, config: Mapping[str, Any], steps: int) -> bool:
        """Whether a diffusers class with a configuration runs."""
        try:
            with silent():
                self._rehearse(kind.from_config(config), steps)
        except (ModelError, *RAISED):
            return False
        return True
