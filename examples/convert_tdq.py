"""TDQ's steps (arXiv 2306.02316) as tables for dq-export.

In TDQ a small network computes each layer's step from the timestep. Evaluate it at the timesteps that the sampler sends, and
save the steps by the name of the linear. The engine needs nothing else:

    torch.save({name: step_of(timesteps) for name, step_of in layers.items()}, "steps.pth")        # float32[T] each

    python examples/convert_tdq.py steps.pth tables.safetensors --timesteps 1:1000:20 --activation-bits 8 --unsigned 'ff.net.2'

Weights are quantized by dq-export, from the float checkpoint that TDQ trained.
"""

from __future__ import annotations

import re

import torch
from converting import Codes, Tables, options, read_state, shared


def main(words: list[str] | None = None) -> None:
    """Convert a file."""
    parser = options(__doc__ or "")
    parser.add_argument("--unsigned", default="$^", metavar="REGEX", help="modules whose inputs have codes from 0 on")
    arguments = parser.parse_args(words)
    tables = Tables("TDQ", arguments.timesteps, arguments.rename, arguments.skip)
    steps_of = {tables.name(module): steps.flatten() for module, steps in read_state(arguments.checkpoint).items()}
    steps_of.pop("", None)
    rows = {name: (steps, torch.zeros_like(steps)) for name, steps in steps_of.items()}
    for name, (steps, _) in shared(rows, arguments.shared, arguments.activation_bits).items():
        codes = Codes(bits=arguments.activation_bits, signed=not re.search(arguments.unsigned, name))
        tables.add(name, {"activation.scale": steps}, codes)
    tables.write(arguments.output)


if __name__ == "__main__":
    main()
