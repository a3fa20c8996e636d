"""Names of attention's tensors in diffusers before 0.15, which published checkpoints still have."""

from __future__ import annotations

import re

LINEARS = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
OLD = re.compile(rf"(attentions\.\d+)\.({'|'.join(LINEARS)})\.(weight|bias)$")


def todays_name(tensor: str) -> str:
    """Return diffusers' present name of a tensor."""
    return OLD.sub(lambda match: f"{match[1]}.{LINEARS[match[2]]}.{match[3]}", tensor)
