"""EfficientDM's checkpoint (arXiv 2310.03270, github.com/ThisisBillhe/EfficientDM) as tables for dq-export.

Of a linear M it holds `M.weight`, packed codes uint8[out * bits / 8, in], `M.intn_dequantizer.delta` and `.zero_point`
[out, 1], `M.loraA.weight` [rank, in] and `M.loraB.weight` [out, rank], `M.weight_quantizer.delta` and `.zero_point` [out, 1],
which quantize the sum of both, and `M.act_quantizer.delta_list` and `.zp_list` [T]. A counter of calls picks the row, from the
last to the first, so row r is the r-th of the sampler's timesteps in ascending order; of a DDIM sampler of 100 steps over 1000,
1:1000:10.

    python examples/convert_efficientdm.py quantw4a4.pth tables.safetensors --timesteps 1:1000:10 --activation-bits 4 \\
        --rename '^model\\.=' --skip 'proj_out'

Weights of 4 bits have codes of -15 … 15 about their zero points. --bits w4a4 holds only -7 … 7: wider codes need --float-weights.
"""

from __future__ import annotations

from typing import Any

import torch
from converting import Codes, Tables, float_parts, options, read_state, shared, weight_parts

LIST, ZEROS = ".act_quantizer.delta_list", ".act_quantizer.zp_list"


def unpacked(packed: torch.Tensor, outputs: int) -> tuple[torch.Tensor, int]:
    """uint8[out, in] from codes that are packed with several rows in a byte, the first in its lowest bits; and their bits."""
    bits = 8 * len(packed) // outputs
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)[None, :, None]
    codes = torch.bitwise_right_shift(packed.to(torch.uint8)[:, None], shifts) & (2**bits - 1)
    return codes.reshape(outputs, packed.shape[1]), bits


def merged(state: dict[str, Any], module: str) -> tuple[torch.Tensor, int]:
    """float32[out, in]: codes and low-rank matrices together; and the bits of the codes."""
    delta, zero = (state[f"{module}.intn_dequantizer.{part}"].flatten()[:, None] for part in ("delta", "zero_point"))
    codes, bits = unpacked(state[f"{module}.weight"], len(delta))
    return (codes - zero) * delta + state[f"{module}.loraB.weight"] @ state[f"{module}.loraA.weight"], bits


def main(words: list[str] | None = None) -> None:
    """Convert a file."""
    parser = options(__doc__ or "")
    parser.add_argument("--float-weights", action="store_true", help="write weights, which dq-export rounds, in place of codes")
    arguments = parser.parse_args(words)
    state = read_state(arguments.checkpoint)
    tables = Tables("EfficientDM", arguments.timesteps, arguments.rename, arguments.skip)
    activation = Codes(bits=arguments.activation_bits, signed=False)
    modules = {tables.name(key.removesuffix(LIST)): key.removesuffix(LIST) for key in state if key.endswith(LIST)}
    # A convolution's matrices have four axes.
    modules = {name: module for name, module in modules.items() if name and state[f"{module}.loraA.weight"].ndim == 2}
    lists = {name: (state[f"{module}{LIST}"], state[f"{module}{ZEROS}"]) for name, module in modules.items()}
    for name, (scale, point) in shared(lists, arguments.shared, arguments.activation_bits).items():
        module = modules[name]
        weight, bits = merged(state, module)
        step, zero = (state[f"{module}.weight_quantizer.{part}"] for part in ("delta", "zero_point"))
        parts = weight_parts(weight, step, zero, bits)
        codes = None if arguments.float_weights else Codes(bits=bits, signed=False)
        if arguments.float_weights:
            parts = float_parts(parts)
        rows = {"activation.scale": scale, "activation.zero_point": point}
        tables.add(name, {**rows, **parts, "bias": state.get(f"{module}.bias")}, activation, codes)
    tables.write(arguments.output)


if __name__ == "__main__":
    main()
