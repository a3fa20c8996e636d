"""The programs that a Triton server runs. They are copied into each repository, and import only numpy and Triton's module."""
