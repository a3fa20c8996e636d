"""dq-export: diffusion transformers to quantized engines that provably run on low-precision kernels."""

from __future__ import annotations
