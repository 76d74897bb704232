"""Shared parts of the TPU kernels of matrix-state recurrences."""

from pallas_kernels.tpu.chunk_math import chunk_steps

__all__ = ["chunk_steps"]
