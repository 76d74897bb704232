"""Choice of the algorithm of a matrix-state recurrence, and the static options of a call."""

import dataclasses
from collections.abc import Mapping

from seqjax.ops.core import backends


def default_algorithms(
    sizes: Mapping[str, int],
    decay_axes: int,
    diagonal: bool,
    cpu_chunks_from: tuple[int, int, int] | None,
) -> tuple[str, str, str]:
    """Return the algorithms for T steps of B x H states of K x V elements.

    They are those on CPU without derivatives, on CPU with derivatives, and on other platforms.

    On CPU, a step on a small state costs little more than a kernel call, and small matmuls run far
    below their peak. The size from which chunks are faster depends on the number of matmuls in a
    chunk, which is small for a chunk of a few steps. If all states together are small, the number
    of kernel calls decides: chunks have fewer, unless their decays require many. The small chunks
    of a diagonal recurrence are faster all at once. These limits were measured with gradients
    (`experiments.bench choice`). On other platforms chunks are the default from 8 steps on, which
    has not been measured there.

    Without gradients, steps store no states and are the default on CPU. At T=2048 and K=V=64 chunks
    take 1.2 times as long for linear attention without decay, and longer for the other ops
    (`experiments.bench forward`).

    Args:
      sizes: B, T, H, K and V.
      decay_axes: 0 without decays, 1 for one per head, 2 for decays per channel.
      diagonal: see `MatrixRecurrence`.
      cpu_chunks_from: see `MatrixRecurrence`; None for recurrences without a chunked form.
    """
    if cpu_chunks_from is None:
        return "sequential", "sequential", "sequential"
    # Treat symbolic sizes, under `jax.export`, as large ones.
    batch, length = (size if isinstance(size, int) else 2**31 for size in (sizes["B"], sizes["T"]))
    elements = sizes["K"] * sizes["V"]
    together = batch * sizes["H"] * elements
    light = diagonal or decay_axes == 0
    if length < 16:
        pays = length >= 4 and elements >= 4096 and (diagonal or together >= 2**17)
    else:
        pays = elements >= cpu_chunks_from[decay_axes] and length * elements >= 8192
        pays |= together <= 1024 and light and (decay_axes < 2 or length <= 64)
    if not pays:
        on_cpu = "sequential"
    else:
        many = diagonal and elements <= 1024 and length >= 256
        many &= isinstance(sizes["T"], int)
        on_cpu = "associative" if many else "chunked"
    return "sequential", on_cpu, "sequential" if length < 8 else "chunked"


@dataclasses.dataclass(frozen=True)
class CallOptions:
    """Static options of a call: each combination of them is compiled once.

    Attributes:
      forward_on_cpu: the algorithm if the program is compiled for CPU and has no derivatives.
      on_cpu: the algorithm if the program is compiled for CPU and has derivatives.
      elsewhere: the algorithm on other platforms.
      chunk_size: the caller's choice.
      backend: the backend of the call.
      scale: the default, K**-0.5; None if the caller passes a scale, which is then an operand. As a
        static option it would compile the op again for every new number.
      exclusive: whether outputs read the state before their step.
      narrow_state: whether the final state is bfloat16.
      normalize: whether queries and keys are normalized first.
    """

    forward_on_cpu: str
    on_cpu: str
    elsewhere: str
    chunk_size: int | None
    backend: backends.Backend
    scale: float | None
    exclusive: bool
    narrow_state: bool
    normalize: bool
