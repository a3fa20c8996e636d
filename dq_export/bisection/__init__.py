"""Which pass, and which linear, moves a graph away from PyTorch."""
