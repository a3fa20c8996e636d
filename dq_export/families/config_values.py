"""The possible values of a checkpoint's configuration files, checked before an object is created from them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dq_export.core.documents import printable, shown, shown_path

from .reference import ModelError

STEPS = 10_000
"""The greatest number of training timesteps of a scheduler. Published checkpoints have 1000, a few 4000; each timestep costs
time and memory."""
RAISED = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, MemoryError, NameError, OSError, RuntimeError,
    TypeError, ValueError,
)  # fmt: skip
"""The errors of diffusers on values that it does not take: it checks few of them, and fails at the first use of one; NameError
where it has no branch for a value."""

Channels = Annotated[int, Field(ge=1, le=16_384)]
Infinite = Annotated[float, Field(allow_inf_nan=True, le=1e6)]
Shift = Annotated[float, Field(ge=-100, le=100)]
Positive = Annotated[float, Field(gt=0, le=1e6)]
Share = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(gt=0, le=1)]


class Values(BaseModel):
    """Keys of a configuration with their types, ranges and diffusers' defaults; other keys are ignored, as diffusers does."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)

    buffers_stored: ClassVar[bool] = False
    """Whether the files contain everything that a network computes at its creation."""


V = TypeVar("V", bound=Values)


class SchedulerValues(Values):
    """The keys of all schedulers; each scheduler uses some of them."""

    num_train_timesteps: int = Field(1000, ge=1, le=STEPS)
    beta_start: Beta = 1e-4
    beta_end: Beta = 0.02
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "laplace", "sigmoid"] = "linear"
    trained_betas: list[Beta] | None = Field(default=None, min_length=1, max_length=STEPS)
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    timestep_spacing: Literal["linspace", "leading", "trailing"] = "leading"
    steps_offset: int = Field(0, ge=0, le=STEPS)
    rescale_betas_zero_snr: bool = False
    variance_type: (
        Literal["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"] | None
    ) = None
    clip_sample: bool = False
    clip_sample_range: Positive = 1.0
    thresholding: bool = False
    dynamic_thresholding_ratio: Share = 0.995
    sample_max_value: Positive = 1.0
    set_alpha_to_one: bool = True
    skip_prk_steps: bool = False
    use_karras_sigmas: bool | None = False
    use_exponential_sigmas: bool | None = False
    use_beta_sigmas: bool | None = False
    use_flow_sigmas: Literal[False] | None = False
    use_lu_lambdas: bool | None = False
    use_dynamic_shifting: bool = False
    flow_shift: Positive | None = 1.0
    shift: Positive = 1.0
    base_shift: Shift | None = 0.5
    max_shift: Shift | None = 1.15
    base_image_seq_len: int = Field(256, ge=1, le=1 << 24)
    max_image_seq_len: int = Field(4096, ge=1, le=1 << 24)
    invert_sigmas: Literal[False] = False
    shift_terminal: float | None = Field(None, ge=0, lt=1)
    stochastic_sampling: Literal[False] = False
    time_shift_type: str = Field("exponential", max_length=40)
    interpolation_type: Literal["linear", "log_linear"] = "linear"
    timestep_type: Literal["discrete", "continuous"] = "discrete"
    final_sigmas_type: Literal["zero", "sigma_min"] | None = "zero"
    sigma_min: Positive | None = None
    sigma_max: Positive | None = None
    sigma_data: Positive = 0.5
    sigma_schedule: Literal["karras", "exponential"] = "karras"
    rho: Annotated[float, Field(gt=0, le=100)] = 7.0
    solver_order: int = Field(2, ge=1, le=3)
    predictor_order: int = Field(2, ge=1, le=4)
    corrector_order: int = Field(2, ge=1, le=4)
    algorithm_type: str = Field("dpmsolver++", max_length=40)
    solver_type: str = Field("midpoint", max_length=40)
    lower_order_final: bool = True
    euler_at_final: bool = False
    lambda_min_clipped: Infinite = float("-inf")
    predict_x0: bool = True
    disable_corrector: list[int] = Field([], max_length=STEPS)
    solver_p: None = None
    tau_func: None = None
    original_inference_steps: int = Field(50, ge=1, le=STEPS)
    timestep_scaling: Positive = 10.0

    @model_validator(mode="after")
    def _fit_each_other(self) -> SchedulerValues:
        if self.trained_betas is not None and len(self.trained_betas) != self.num_train_timesteps:
            raise ValueError(
                f"trained_betas: expected num_train_timesteps {self.num_train_timesteps} of them, found {len(self.trained_betas)}"
            )
        return self


def require_levels(values: Any) -> None:
    """Raise ValueError unless there is a block for each of `block_out_channels`, up and down where a network goes up, and
    GroupNorm divides them."""
    levels = len(values.block_out_channels)
    for key in ("down_block_types", "up_block_types"):
        if len(getattr(values, key, values.block_out_channels)) != levels:
            raise ValueError(f"{key}: expected {levels} of them, one for each of block_out_channels")
    if wrong := [width for width in values.block_out_channels if width % values.norm_num_groups]:
        raise ValueError(f"block_out_channels {wrong[0]}: expected a multiple of norm_num_groups {values.norm_num_groups}")


def require_halved(values: Any) -> None:
    """Raise ValueError unless `sample_size` can be halved between the levels."""
    levels = len(values.block_out_channels)
    if values.sample_size % 2 ** (levels - 1):
        raise ValueError(
            f"sample_size {values.sample_size}: expected a multiple of {2 ** (levels - 1)}, which {levels} levels halve"
        )


def require_values(architecture: Any, values: type[Values], config: Mapping[str, Any], path: Path) -> None:
    """Check that a class takes the values of a configuration, as far as this is possible without creating an object.

    Args:
        architecture: a diffusers class; keys that it does not take are not checked.
        values: the possible values of its keys.
        path: the file, for messages.

    Raises:
        ModelError: every key whose value is of another type or out of range, up to three of them.
    """
    parameters = inspect.signature(architecture.__init__).parameters
    values_of(values, {key: value for key, value in config.items() if key in parameters}, path)


def values_of(values: type[V], config: Mapping[str, Any], path: Path) -> V:
    """The values of a configuration.

    Raises:
        ModelError: see `require_values`.
    """
    try:
        return values.model_validate(config)
    except ValidationError as error:
        problems = [_problem(item) for item in error.errors()[:3]]
        raise ModelError(f"{shown_path(path)}: {'; '.join(dict.fromkeys(problems))}; correct it, or download it again") from error


@contextmanager
def refused(message: str, advice: str) -> Iterator[None]:
    """A context for a call of diffusers with a file's values; any error becomes a ModelError of one line.

    Args:
        message: its beginning, the file and the failed step.
        advice: its end, the remedy.
    """
    try:
        yield
    except RAISED as error:
        raise ModelError(f"{message} ({reason_of(error)}); {advice}") from error


def reason_of(error: BaseException) -> str:
    """The first line of an error's message, or its class if the message is empty."""
    return printable(str(error).strip().split("\n")[0], 200) or type(error).__name__


def _problem(item: Any) -> str:
    message = str(item["msg"]).removeprefix("Value error, ").replace("Input should be", "expected")
    if not item["loc"]:
        return printable(message)
    key = item["loc"][0]
    inside = [part for part in item["loc"][1:] if isinstance(part, int)]
    name = f"{key}[{inside[0]}]" if inside else str(key)
    return printable(f"{name} = {shown(item['input'])}: {message}")
