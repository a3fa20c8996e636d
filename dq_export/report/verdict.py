"""Whether an export keeps what its recipe requires, and what to try where it does not."""

from __future__ import annotations

from dataclasses import replace

from dq_export.core.documents import shown
from dq_export.core.recipe import Recipe, RecipeError
from dq_export.core.scheme import PRESETS
from dq_export.deploy.audit import Audit, AuditError
from dq_export.deploy.backend import NotHereError
from dq_export.deploy.backends import backend_of
from dq_export.deploy.parity import FLOAT_SQNR, CallParity, ParityError
from dq_export.deploy.replay import polygraphy_command

from ..finished_folder import portable_name
from .report import FLOAT_STAGE, Report, Verdict

IN_FLOAT, TOO_FAR, ELSEWHERE = 3, 4, 5
ERRORS: dict[int, type[Exception]] = {IN_FLOAT: AuditError, TOO_FAR: ParityError, ELSEWHERE: NotHereError}
"""By exit status."""


def judge(report: Report, recipe: Recipe, unbuilt: str = "") -> Verdict | None:
    """The verdict on the finished stages; None if neither an engine was audited nor a call compared.

    Args:
        unbuilt: why the engine could not be built on this machine; empty if it was.
    """
    if report.audit is None and report.parity is None:
        return None
    low = [call for stage in report.stages() if (call := report.worst_call(stage)) and call.sqnr < _floor(call, recipe)]
    quantized = [call for stage in report.stages() if stage != FLOAT_STAGE and (call := report.worst_call(stage))]
    in_float = _in_float(report.audit, recipe.min_coverage) if report.audit else []
    far_pictures = [*_far_pictures(report, recipe), *_unencoded(report, recipe)]
    status = IN_FLOAT if in_float else TOO_FAR if low or far_pictures else ELSEWHERE if unbuilt else 0
    return Verdict(
        outcome="passed" if not status else "unfinished" if status == ELSEWHERE else "failed",
        status=status,
        min_coverage=recipe.min_coverage,
        coverage=report.audit.coverage if report.audit else None,
        min_sqnr=recipe.min_sqnr,
        worst=min(quantized, key=lambda call: call.sqnr, default=None),
        reasons=[*in_float, *(_too_far(call, recipe) for call in low), *far_pictures, *filter(None, [unbuilt])],
        advice=_advice(low[0], recipe) if low else "",
    )


def concluded(report: Report, recipe: Recipe, unbuilt: str = "") -> Report:
    """The report, completed by the verdict and the command that replays the calls."""
    parity = report.parity
    if parity:
        command = polygraphy_command(report.replay_floor(recipe.min_sqnr), portable_name(recipe))
        parity = replace(parity, replay=command)
    return report.model_copy(update={"parity": parity, "verdict": judge(report, recipe, unbuilt)})


def require(verdict: Verdict | None) -> None:
    """Fail where an export does not keep what its recipe requires.

    Raises:
        AuditError, ParityError: a requirement is not kept; the message says which, and what to try.
        NotHereError: all is done except the engine, which another machine must build.
    """
    if verdict and verdict.status:
        raise ERRORS[verdict.status]("\n".join(filter(None, [*verdict.reasons, verdict.advice])))


def _floor(call: CallParity, recipe: Recipe) -> float:
    return FLOAT_SQNR if call.stage == FLOAT_STAGE else recipe.min_sqnr


def _in_float(audit: Audit, required: float) -> list[str]:
    """Lines about too small a share in low precision, and each GEMM in float; none if the share is kept."""
    if audit.coverage >= required:
        return []
    float_gemms = [f"{g.name}: {g.kernel}; {g.reason}" for g in audit.gemms if g.required and not g.integer]
    share = f"{audit.coverage:.1%} of the quantized GEMMs' FLOPs run on low-precision kernels, the recipe requires {required:.1%}"
    return [f"{share}. In float:", *(f"  {line}" for line in float_gemms)]


def _too_far(call: CallParity, recipe: Recipe) -> str:
    return f"{call.stage}: {call.sqnr:.1f} dB at timestep {call.timestep:g}, required {_floor(call, recipe):.1f} dB"


def _far_pictures(report: Report, recipe: Recipe) -> list[str]:
    """Lines about pictures that look too different; none if LPIPS was not measured."""
    trajectories = report.parity.trajectories if report.parity else ()
    far = [item for item in trajectories if item.lpips is not None and item.lpips > recipe.max_lpips]
    return [f"{item.stage}: LPIPS {item.lpips:.4f} of the pictures, allowed {recipe.max_lpips:g}" for item in far]


def _unencoded(report: Report, recipe: Recipe) -> list[str]:
    """Lines about quantized text encoders of a server that are too far from PyTorch's."""
    encoder = report.text_encoder
    if encoder is None or encoder.sqnr >= recipe.min_sqnr:
        return []
    prompt = f"the prompt {shown(encoder.prompt)}" if encoder.prompt else "the empty prompt"
    return [f"text encoder: {encoder.sqnr:.1f} dB of {prompt}, required {recipe.min_sqnr:.1f} dB; leave --text-encoder-bits out"]


def _advice(call: CallParity, recipe: Recipe) -> str:
    """Advice for a call that is too far from PyTorch: options that this recipe does not use yet and can use."""
    if call.stage == FLOAT_STAGE:
        return (
            "The float graph differs from PyTorch before anything is quantized: its weights amplify float32 rounding, or an "
            "operator was exported wrongly; no option of quantization helps."
        )
    weight, activation = PRESETS[recipe.bits].weight, PRESETS[recipe.bits].activation
    table = activation is not None and recipe.granularity in (None, "tensor")
    integers = weight is not None and not weight.qtype.is_float
    fitting = [
        ("--granularity token", table and integers and _runs(recipe, granularity="token")),
        ("--rounding gptq", integers and recipe.first_rounding != "gptq"),
        ("--rounding distill", integers and recipe.rounding == "gptq"),
        ("--scaling auto", recipe.scaling != "auto"),
        ("--bins per-step", table and recipe.bins != "per-step"),
        ("--bits w8a8", activation is not None and weight is not None and min(activation.qtype.bits, weight.qtype.bits) < 8),
    ]
    options = [option for option, fits in fitting if fits]
    return (
        f"Try {', '.join([*options, '--exclude for the linears with the largest error in report.json'])}; or, if the pictures "
        "are good enough, a lower --min-sqnr."
    )


def _runs(recipe: Recipe, **changes: str) -> bool:
    """Whether the recipe's backend runs its bits with some options changed."""
    try:
        backend_of(recipe.model_copy(update={"rules": None, **changes}))
    except RecipeError:
        return False
    return True
