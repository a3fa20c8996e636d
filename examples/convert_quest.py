"""QuEST's checkpoint (arXiv 2402.03666, github.com/hatchetProject/QuEST) as tables for dq-export.

Of a linear M it holds `M.weight`, trained, in float, `M.weight_quantizer.delta` and `.zero_point` [out, 1] (`.alpha` [out, in]
after adaptive rounding), and `M.act_quantizer.delta_list` and `.zero_point_list` [T, 1, C], whose rows are in the order of the
sampler's list of timesteps. Equal columns become one scale. Others are split into an in_scale and in_shift
of each channel, which the timesteps share, and a scale of each timestep; the script prints how far the split is from the file.

    python examples/convert_quest.py ckpt.pth tables.safetensors --timesteps 1:1000:50 --activation-bits 4 --weight-bits 4 \\
        --rename '^model\\.='
"""

from __future__ import annotations

from typing import Any

import torch
from converting import Codes, Tables, float_parts, options, read_state, shared, weight_parts

LIST = ".act_quantizer.delta_list"


def split(delta: torch.Tensor, zero: torch.Tensor, bits: int) -> tuple[dict[str, torch.Tensor], str]:
    """Steps and zero points [T, C] as in_scale[C], in_shift[C] and scale[T]; and the change of steps and ranges, in words.

    delta[t, c] = scale[t] in_scale[c] in the mean of the logarithms over either; the middle of each range, over t, is the shift.
    """
    steps = delta.log()
    in_scale = (steps.mean(0) - steps.mean()).exp()
    scale = (steps - in_scale.log()).mean(1).exp()
    middle = delta * ((2**bits - 1) / 2 - zero)
    in_shift = middle.mean(0)
    ratio = delta / (scale[:, None] * in_scale)
    difference = float(torch.maximum(ratio, 1 / ratio).max()) - 1
    moved = float(((middle - in_shift).abs() / delta).max())
    return {
        "activation.scale": scale,
        "in_scale": in_scale,
        "in_shift": in_shift,
    }, f"steps {difference:.0%} apart, ranges by {moved:.1f} codes"


def lists_of(state: dict[str, Any], module: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Steps and zero points, float[T, C]; one column if all are equal. The zero point may be one number."""
    delta = state[f"{module}{LIST}"].flatten(1)
    zero = state[f"{module}.act_quantizer.zero_point_list"].float()
    zero = zero.flatten(1).expand_as(delta) if zero.ndim else zero.expand_as(delta)
    equal = (delta == delta[:, :1]).all() and (zero == zero[:, :1]).all()
    return (delta[:, :1], zero[:, :1]) if equal else (delta, zero)


def main(words: list[str] | None = None) -> None:
    """Convert a file."""
    parser = options(__doc__ or "")
    parser.add_argument("--weight-bits", type=int, required=True)
    parser.add_argument("--float-weights", action="store_true", help="write weights, which dq-export rounds, in place of codes")
    arguments = parser.parse_args(words)
    state = read_state(arguments.checkpoint)
    tables = Tables("QuEST", arguments.timesteps, arguments.rename, arguments.skip)
    modules = {tables.name(key.removesuffix(LIST)): key.removesuffix(LIST) for key in state if key.endswith(LIST)}
    # A convolution's weight has four axes.
    modules = {name: module for name, module in modules.items() if name and state[f"{module}.weight"].ndim == 2}
    lists = {name: lists_of(state, module) for name, module in modules.items()}
    for name, (delta, zero) in shared(lists, arguments.shared, arguments.activation_bits).items():
        module, weight = modules[name], state[f"{modules[name]}.weight"]
        if delta.shape[1] == 1:
            rows = {"activation.scale": delta[:, 0], "activation.zero_point": zero[:, 0]}
            activation = Codes(bits=arguments.activation_bits, signed=False)
        else:
            rows, difference = split(delta, zero, arguments.activation_bits)
            activation = Codes(bits=arguments.activation_bits, signed=True)
            weight = weight * rows["in_scale"]
            print(f"{name}: {difference}")
        codes = None
        if "in_scale" in rows:  # the file's codes belong to the unscaled weight
            parts = {"weight": weight}
        else:
            step, point = (state[f"{module}.weight_quantizer.{part}"] for part in ("delta", "zero_point"))
            up = state.get(f"{module}.weight_quantizer.alpha")
            parts = weight_parts(weight, step, point, arguments.weight_bits, up=None if up is None else up >= 0)
            codes = Codes(bits=arguments.weight_bits, signed=False)
            if arguments.float_weights:
                parts, codes = float_parts(parts), None
        tables.add(name, {**rows, **parts, "bias": state.get(f"{module}.bias")}, activation, codes)
    tables.write(arguments.output)


if __name__ == "__main__":
    main()
