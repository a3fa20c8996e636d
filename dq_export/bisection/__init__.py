"""Find the pass and the linear at which a graph departs from PyTorch."""
