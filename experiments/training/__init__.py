"""The training loop, checkpoints and optimizers."""
