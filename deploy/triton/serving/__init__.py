"""What a Triton server runs of ours: numpy and Triton's own module alone. These files are copied into each repository."""
