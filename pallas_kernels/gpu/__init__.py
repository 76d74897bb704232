"""Parts that the GPU kernels share."""
