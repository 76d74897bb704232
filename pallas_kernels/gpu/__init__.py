"""Shared parts of the GPU kernels."""

from pallas_kernels.gpu.limits import whole_rows

__all__ = ["whole_rows"]
