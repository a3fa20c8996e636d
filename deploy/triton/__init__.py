"""A Triton model repository: written, checked, and what its server runs of ours."""
