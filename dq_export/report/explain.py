"""The decisions for a linear and their reasons, from a report alone."""

from __future__ import annotations

from .report import LinearReport, Report


def explain_linear(report: Report, linear: LinearReport) -> dict[str, str]:
    """The decisions for a linear: label -> text."""
    kernels = [gemm.kernel for gemm in report.audit.gemms if gemm.name == linear.name] if report.audit else []
    values = [value for value in linear.sqnr if value is not None]
    alternatives = sorted(_alternatives(report, linear).items(), key=lambda pair: pair[1])
    return {
        "action": linear.action,
        "rule": f"'{linear.rule}'{' (' + linear.reason + ')' if linear.reason else ''}",
        "input": linear.site or "not quantized",
        "scaling": linear.scaling or "none",
        "fold": linear.fold or "nothing to fold",
        "bins": str(linear.bins),
        "SQNR": f"{min(values):.1f} to {max(values):.1f} dB over the timesteps" if values else "not measured",
        "error": "not measured" if linear.error is None else f"{linear.error:.2e} of the output's power",
        "measured": ", ".join(f"{method} {error:.2e}" for method, error in alternatives) or "the recipe chose the scaling",
        "kernel": ", ".join(kernels) or "merged with an identical linear, or not built",
        "left alone": "; ".join(_left_alone(report, linear)) or "by no pass",
    }


def linear_lines(report: Report, part: str) -> list[list[str]]:
    """For each linear whose name contains `part`: its name; action, worst SQNR, scaling and fold; the next best scaling."""
    lines = []
    for linear in (item for item in report.linears if part in item.name):
        values = [value for value in linear.sqnr if value is not None]
        others = {key: error for key, error in _alternatives(report, linear).items() if key != linear.scaling}
        second = min(others, key=lambda key: others[key], default="")
        text = f"{linear.action:11} {min(values):5.1f} dB" if values else linear.action
        text += f"  {linear.scaling}" if linear.scaling else ""
        text += f" into {linear.fold}" if linear.fold else ""
        lines.append([linear.name, text])
        if second and linear.error:
            lines[-1].append(f"next best {second}, {others[second] / linear.error:.2f} times the error")
    return lines


def _alternatives(report: Report, linear: LinearReport) -> dict[str, float]:
    return next((table.alternatives for table in report.tables if table.site == linear.site), {})


def _left_alone(report: Report, linear: LinearReport) -> list[str]:
    """`pass: reason` where a pass left the linear's GEMM, or its input, as it was."""
    names = {linear.name, linear.site} - {""}
    return [
        f"{name}: {reason}"
        for name, reason, places in report.left_alone()
        if any(place in names or place.rpartition(".")[0] == linear.site != "" for place in places)
    ]
