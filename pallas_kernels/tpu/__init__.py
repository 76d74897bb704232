"""Parts that the TPU kernels share."""
