"""Quantized linears and convolutions in PyTorch with gradients. Rounding passes a gradient through, clipping stops it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from dq_export.core.artifacts import CalibrationResult, SitePlan
from dq_export.core.folding import folded_weight, row_factors
from dq_export.core.network import Denoiser
from dq_export.core.scales import ScaleTable, TimestepBins, TokenScale
from dq_export.core.scheme import Scheme

if TYPE_CHECKING:
    import torch

Float32 = npt.NDArray[np.float32]
Training = Literal["nothing", "scales", "all"]
"""The trained values of layers. `scales` includes biases, `all` also weights."""
PULL, INSIDE = 0.5, 0.8
"""A latent weight starts at its code plus PULL times its rounding error, which is clipped to INSIDE. GPTQ leaves many weights at
the edge of their code, and the first random step would move them over it."""


@dataclass(eq=False)
class Clock:
    """The timestep of each sample of the current call."""

    timesteps: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(1))

    def rows(self, bins: TimestepBins) -> torch.Tensor:
        """Return each sample's row of a table, int64[B]."""
        import torch

        return torch.from_numpy(bins.index(self.timesteps))


class SiteInput:
    """The input of a site's readers: (x - in_shift) / in_scale, rounded with the scale of each sample's timestep.

    Args:
        pictures: whether convolutions read the site. All pixels of a channel's patch have one scaling.
        trained: whether the scales get gradients.
    """

    def __init__(self, plan: SitePlan, clock: Clock, device: Any, *, pictures: bool, trained: bool) -> None:
        import torch

        self.plan, self.clock, self.activation = plan, clock, plan.activation
        self.in_scale, self.in_shift = (torch.from_numpy(v.copy()).to(device) for v in (plan.in_scale, plan.in_shift))
        self.pictures = pictures
        start = None
        if isinstance(self.activation, ScaleTable):
            start = np.log(self.activation.scale)
        elif self.activation is not None and not self.activation.group:
            start = np.log(np.asarray([self.activation.clip], dtype=np.float32))
        self.log = None if start is None else torch.from_numpy(start.copy()).to(device).requires_grad_(trained)
        self.last: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        """Round a value [B, ..., K], or pictures [B, C, H, W], to its codes' values, with the same shape."""
        if self.last is None or self.last[0] is not value:  # readers of the same tensor share its rounded value
            shift, scale = self.in_shift, self.in_scale
            if self.pictures:
                shift, scale = (v[:: self.plan.taps, None, None] for v in (shift, scale))
            self.last = value, self._rounded((value - shift) / scale)
        return self.last[1]

    def forget(self) -> None:
        """Free the values of the last call."""
        self.last = None

    def scales(self) -> ScaleTable | TokenScale | None:
        """Return the present scales."""
        if self.log is None or self.activation is None:
            return self.activation
        values = np.exp(self.log.detach().cpu().numpy()).astype(np.float32)
        if isinstance(self.activation, ScaleTable):
            return ScaleTable(scale=values, bins=self.activation.bins, qtype=self.activation.qtype)
        start = self.activation
        return TokenScale(constant=start.constant, group=start.group, clip=float(min(values[0], 1.0)), qtype=start.qtype)

    def _rounded(self, value: torch.Tensor) -> torch.Tensor:
        import torch

        if self.activation is None:
            return value
        qmax = self.activation.qtype.qmax
        if isinstance(self.activation, ScaleTable):
            assert self.log is not None
            rows = self.clock.rows(self.activation.bins).to(value.device)
            step = self.log[rows].exp().repeat_interleave(len(value) // len(rows)).reshape(-1, *[1] * (value.ndim - 1))
            rounded: torch.Tensor = round_through().apply(value, step, float(qmax))
            return rounded
        tokens = value.movedim(1, -1) if self.pictures else value
        groups = tokens.unflatten(-1, (-1, self.activation.group or tokens.shape[-1]))
        step = groups.detach().abs().amax(dim=-1, keepdim=True) / qmax
        step = torch.where(step > 0, step, torch.ones_like(step))
        if self.log is not None:
            step = step * self.log.clamp(max=0.0).exp()
        rounded = round_through().apply(groups, step, float(qmax)).reshape(tokens.shape)
        return rounded.movedim(-1, 1) if self.pictures else rounded


class QuantizedLinear:
    """A quantized linear or convolution that replaces one of the float network.

    Args:
        plans: the plans that change its weight.
    """

    def __init__(
        self, name: str, denoiser: Denoiser, result: CalibrationResult, scheme: Scheme, plans: Sequence[SitePlan]
    ) -> None:
        assert scheme.weight is not None
        self.qtype = scheme.weight.qtype
        weight = denoiser.weight(name)
        folded = folded_weight(weight, name, plans)
        grid = result.grid(name, self.qtype)
        self.divisors = 1 / row_factors(name, len(weight), plans)
        self.blocks = grid.steps(grid.blocks)  # [out, blocks]
        codes = result.codes.get(name)
        self.codes = grid.codes(folded) if codes is None else codes.astype(np.float32)
        self.error = folded / grid.steps(folded.shape[1]) - self.codes
        input_plan = next((plan for plan in plans if name in plan.site.linears), None)
        bias = denoiser.bias(name).astype(np.float64)
        if input_plan is not None:
            bias = bias + weight.astype(np.float64) @ input_plan.in_shift
        self.correction = result.correction.get(name, np.float32(0))
        self.start = (bias + self.divisors * self.correction).astype(np.float32)
        self.site: SiteInput | None = None
        self.product = denoiser.product(name)

    def place(self, device: Any, site: SiteInput | None, training: Training) -> QuantizedLinear:
        """Move the linear to a device, with latent weights if all of it is trained. `site` rounds its input."""
        import torch

        self.site, self.training = site, training
        self.steps = torch.from_numpy((self.blocks * self.divisors[:, None]).astype(np.float32)).to(device)[:, :, None]
        self.bias = torch.from_numpy(self.start.copy()).to(device).requires_grad_(training != "nothing")
        self.weight = torch.from_numpy(np.ascontiguousarray(self.codes, dtype=np.float32)).to(device)
        if training == "all":
            latent = self.codes + PULL * np.clip(self.error, -INSIDE, INSIDE)
            self.latent = torch.from_numpy(np.ascontiguousarray(latent, dtype=np.float32)).to(device).requires_grad_()
            self.round()
            self.weight.requires_grad_()
        else:
            self._scale(self.weight)
        del self.codes, self.error
        return self

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        """Compute [..., out] from [..., in], or pictures from pictures."""
        return self.product(value if self.site is None else self.site(value), self.weight, self.bias)

    def round(self) -> None:
        """Compute the weight from the nearest codes of the latent weight. No memory is taken."""
        import torch

        limit = self.qtype.qmax
        with torch.no_grad():
            self._scale(self.weight.copy_(self.latent).round_().clamp_(-limit, limit))

    def pass_gradient(self) -> None:
        """Move the weight's gradient to the latent weight, inside the range of codes, widened by half a code."""
        gradient, self.weight.grad = self.weight.grad, None
        if gradient is not None:
            inside = self.latent.detach().abs() <= self.qtype.qmax + 0.5
            self.latent.grad = self._scale(gradient).mul_(inside)

    def _scale(self, codes: torch.Tensor) -> torch.Tensor:
        """Multiply codes by their steps in place."""
        codes.view(len(codes), self.steps.shape[1], -1).mul_(self.steps)
        return codes

    def rounded_codes(self) -> npt.NDArray[np.int8]:
        """Return the codes of trained latent weights, int8[out, in]."""
        limit = self.qtype.qmax
        codes: npt.NDArray[np.int8] = self.latent.detach().round().clamp(-limit, limit).cpu().numpy().astype(np.int8)
        return codes

    def bias_correction(self) -> Float32:
        """Return the correction of the folded bias, float32[out]."""
        change = (self.bias.detach().cpu().numpy() - self.start) / self.divisors
        correction: Float32 = (self.correction + change).astype(np.float32)
        return correction


@cache
def round_through() -> Any:
    """Return an autograd function (value [...], step that broadcasts to it, qmax) -> code * step.

    Backward: the value gets the gradient inside the range, and 0 outside. The step gets code - value / step inside the range
    and the code outside, summed over all values that share it. Source: LSQ (arXiv 1902.08153) without its gradient scale.
    """
    import torch

    class Round(torch.autograd.Function):  # type: ignore[misc]
        @staticmethod
        def forward(context: Any, value: torch.Tensor, step: torch.Tensor, qmax: float) -> torch.Tensor:
            ratio = value / step
            context.save_for_backward(ratio, step)
            context.qmax = qmax
            return ratio.round().clamp_(-qmax, qmax).mul_(step)

        @staticmethod
        def backward(context: Any, gradient: torch.Tensor) -> Any:
            ratio, step = context.saved_tensors
            inside = ratio.abs() <= context.qmax
            of_step = None
            if context.needs_input_grad[1]:
                code = ratio.round().clamp_(-context.qmax, context.qmax)
                of_step = (gradient * code.sub_(ratio.where(inside, torch.zeros_like(ratio)))).sum_to_size(step.shape)
            return gradient * inside, of_step, None

    return Round
