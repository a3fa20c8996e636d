"""Block-wise distillation: each block of the quantized network is trained against the float network's."""
