"""Static description of a matrix-state kernel, and the references that it reads and writes."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from pallas_kernels.tpu.numerics import Numerics


class ChunkRecurrence(NamedTuple):
    """A recurrence: its name, and the forward and adjoint computation of a chunk of all heads."""

    name: str
    forward: Callable[..., Any]
    backward: Callable[..., Any]


class Variant(NamedTuple):
    """Specialization of a kernel.

    Attributes:
      recurrence: the recurrence.
      num: accuracy of products.
      chunk: steps in a chunk.
      heads: heads in a block.
      head_blocks: number of blocks of heads.
      length: T.
      decay: None, "scalar" (per head) or "channel".
      reset: whether there are resets.
      beta: whether there is a `beta`.
      vectors: names of further inputs [B, T, H, K], `a` and `b` of the generalized delta rule.
      normalize: whether q and k are divided by their lengths.
      gate: whether the decays are computed from `g` by a gate.
      scale: factor of the outputs.
      save_states: whether the forward kernel returns the state before each chunk.
      backward: whether this is the backward kernel.
    """

    recurrence: ChunkRecurrence
    num: Numerics
    chunk: int
    heads: int
    head_blocks: int
    length: int
    decay: str | None
    reset: bool
    beta: bool
    vectors: tuple[str, ...]
    scale: float
    normalize: bool = False
    gate: bool = False
    save_states: bool = False
    backward: bool = False

    @property
    def chunks(self) -> int:
        """Number of chunks of time."""
        return -(-self.length // self.chunk)

    @property
    def head_logs(self) -> bool:
        """Flag for logarithms per head: of decays, or of resets alone."""
        return self.decay == "scalar" or (self.reset and self.decay is None)


@dataclasses.dataclass(frozen=True)
class Refs:
    """References of a kernel; None for an absent array. Names in `_s` are scratch.

    Attributes:
      q, k, v, a, b, beta, g, reset, initial: blocks of the inputs; `g` is the logarithm of the
        decay, or the input of the gate.
      rate, bias: rows of the gate, [1, heads, K], or [1, 1, heads] for one decay per head.
      o, final: blocks of the forward outputs.
      states: states before the chunks, an output of the forward and an input of the backward pass.
      do, d_final: blocks of the cotangents of the outputs.
      dq, dk, dv, da, db, d_beta, d_g, d_initial: blocks of the cotangents of the inputs.
      d_rate, d_bias: their cotangents for one sequence, summed over the chunks.
      q_raw_s, k_raw_s: q and k before normalization, for the backward pass.
      g_raw_s: inputs of the gate [heads, C, K], for the backward pass.
      q_s, k_s, v_s, a_s, b_s, o_s, do_s: matrices of the heads [heads, C, K or V].
      beta_s: [C, heads].
      g_s: logarithms [C, heads or 1], or [heads, C, K] per channel.
      reset_s: [C, 1], for decays per channel.
      state_s: the carried states [heads, K, V]; in the backward pass those before the chunk.
      ct_s: the carried cotangents of the states.
      masks_s: masks of steps [4, C, heads], written by `_repair`.
      flat_s: scratch of `join_heads`.
    """

    q: Any
    k: Any
    v: Any
    q_s: Any
    k_s: Any
    v_s: Any
    state_s: Any
    masks_s: Any
    a: Any = None
    b: Any = None
    beta: Any = None
    g: Any = None
    rate: Any = None
    bias: Any = None
    reset: Any = None
    initial: Any = None
    o: Any = None
    final: Any = None
    states: Any = None
    do: Any = None
    d_final: Any = None
    dq: Any = None
    dk: Any = None
    dv: Any = None
    da: Any = None
    db: Any = None
    d_beta: Any = None
    d_g: Any = None
    d_rate: Any = None
    d_bias: Any = None
    d_initial: Any = None
    q_raw_s: Any = None
    k_raw_s: Any = None
    g_raw_s: Any = None
    a_s: Any = None
    b_s: Any = None
    o_s: Any = None
    do_s: Any = None
    beta_s: Any = None
    g_s: Any = None
    reset_s: Any = None
    ct_s: Any = None
    flat_s: Any = None

    def written(self, p: Variant) -> list[Any]:
        """Return the scratch of the inputs that a step writes: a number in them reaches states."""
        return [self.k_s, self.v_s, *(getattr(self, name + "_s") for name in p.vectors)]
