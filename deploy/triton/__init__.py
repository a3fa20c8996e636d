"""Writes and checks Triton model repositories, and holds the programs that their servers run."""
