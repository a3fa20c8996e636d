"""The kinds of prediction of networks, and diffusers' schedulers for each kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One kind of output.

    Args:
        name: a description for messages.
        schedulers: diffusers' classes that sample it. With another class the loop may run, but the pictures are wrong.
        plain: one of them, which runs with the keys of the others.
        changes: keys of a configuration with values that change only the way of sampling, and not what the network was
            trained for.
    """

    name: str
    schedulers: frozenset[str]
    plain: str
    changes: tuple[tuple[str, Any], ...]


NOISE = Prediction(
    name="noise",
    schedulers=frozenset({
        "DDIMParallelScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDPMScheduler", "DEISMultistepScheduler",
        "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "EDMEulerScheduler", "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler",
        "LCMScheduler", "LMSDiscreteScheduler", "PNDMScheduler", "SASolverScheduler", "TCDScheduler", "UniPCMultistepScheduler",
    }),
    plain="DDIMScheduler",
    changes=(
        ("timestep_spacing", "trailing"), ("timestep_spacing", "leading"), ("timestep_type", "discrete"), ("steps_offset", 0),
        ("use_karras_sigmas", False), ("use_exponential_sigmas", False), ("use_beta_sigmas", False), ("use_lu_lambdas", False),
        ("final_sigmas_type", "sigma_min"), ("final_sigmas_type", "zero"), ("solver_order", 1), ("skip_prk_steps", True),
    ),
)  # fmt: skip
"""Networks that predict noise, picture or velocity of a variance-preserving diffusion. Source: diffusers'
`KarrasDiffusionSchedulers`, which DiTPipeline takes, without the one that draws noise without a seed."""
FLOW = Prediction(
    name="the velocity of a flow",
    schedulers=frozenset({"FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"}),
    plain="FlowMatchEulerDiscreteScheduler",
    changes=(
        ("use_karras_sigmas", False), ("use_exponential_sigmas", False), ("use_beta_sigmas", False), ("shift_terminal", None),
        ("use_dynamic_shifting", False),
    ),
)  # fmt: skip
"""Networks that predict noise - picture along the line (1 - sigma) * picture + sigma * noise (flow matching). Without
diffusers' `FlowMatchLCMScheduler`, which draws noise without a seed. Source: arXiv 2209.03003, 2403.03206."""
