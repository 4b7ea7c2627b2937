"""From checkpoints to the packed bytes that kernels read."""
