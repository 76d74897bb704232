"""Published specifications of TPUs, for predictions from compiled programs.

Peaks, memory sizes and memory bandwidths are those of Google Cloud (docs.cloud.google.com/tpu/docs,
pages v5e, v5p, v6e and tpu7x, November 2026). Link bandwidths are those of the Scaling Book,
chapter "How to Think About TPUs", which states them per link. They are 10 % below the sums of
Google Cloud over all links of a chip, divided by the number of links.
"""

from typing import NamedTuple


class Chip(NamedTuple):
    """One TPU device of JAX. TPU7x has two devices per chip, the other TPUs have one.

    Attributes:
      topology: libtpu's name of the smallest slice.

      hbm: bytes of memory.

      bandwidth: memory bandwidth in bytes per second.

      flops: bfloat16 operations per second.

      link: bytes per second to both neighbors along one axis of the torus.

      clock: clock rate in Hz, from the published peak and the operations per cycle.
    """

    topology: str
    hbm: int
    bandwidth: float
    flops: float
    link: float
    clock: float


CHIPS = {
    # 197 TFLOP/s, 16 GB, 819 GB/s. The Scaling Book rounds the bandwidth to 8.2e11.
    "v5e": Chip("v5e:2x2", 16 * 2**30, 819e9, 197e12, 9e10, 1.5e9),
    # 459 TFLOP/s, 95 GB, 2765 GB/s. The Scaling Book rounds the bandwidth to 2.8e12.
    "v5p": Chip("v5p:2x2x1", 95 * 2**30, 2765e9, 459e12, 1.8e11, 1.75e9),
    # 918 TFLOP/s, 32 GB, 1638 GB/s. The Scaling Book rounds to 9.2e14 and 1.6e12.
    "v6e": Chip("v6e:2x2", 32 * 2**30, 1638e9, 918e12, 1.8e11, 1.75e9),
    # Half of a chip with 2307 TFLOP/s, 192 GiB, 7380 GB/s. The link is a third of the published
    # 1200 GB/s (3 axes, both directions), one direction, less the same 10 %.
    "v7x": Chip("tpu7x:2x2x1", 96 * 2**30, 3690e9, 1153.5e12, 1.8e11, 2.2e9),
}
