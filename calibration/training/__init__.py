"""Block-wise distillation: trains each block of the quantized network to match the float network's block."""
