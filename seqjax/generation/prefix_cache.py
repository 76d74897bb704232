"""PrefixCache: states at the ends of known prompts, so that shared prefixes are read once."""

import collections
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seqjax.generation.arguments import as_integers, describe, positive
from seqjax.generation.prompts import prefill
from seqjax.layers._base import Layer
from seqjax.types import PyTree


class PrefixCache:
    """Cache of states by the tokens that led to them.

    A recurrent state has a constant size, so a prompt of any length costs the same memory. When the
    states exceed `max_bytes`, those that were used least recently are dropped.

    Example:
      >>> import jax, jax.numpy as jnp, seqjax
      >>> model = seqjax.models.LanguageModel(7, seqjax.models.Backbone(seqjax.layers.LRU(8)))
      >>> params = model.init(jax.random.key(0))
      >>> cache = seqjax.PrefixCache(max_bytes=1 << 20)
      >>> system = [1, 2, 3, 4]
      >>> _ = cache.prefill(model, params, system)
      >>> cache.longest([*system, 5, 6])[0]
      4
      >>> logits, state = cache.prefill(model, params, [*system, 5, 6])  # reads two tokens
    """

    def __init__(self, max_bytes: int) -> None:
        """Make an empty cache that holds at most `max_bytes` of states."""
        [self.max_bytes] = positive("PrefixCache", max_bytes=max_bytes)
        self._entries: collections.OrderedDict[bytes, tuple[PyTree, int]] = (
            collections.OrderedDict()
        )

    def __len__(self) -> int:
        """Return the number of states."""
        return len(self._entries)

    @property
    def num_bytes(self) -> int:
        """Size of all states in bytes."""
        return sum(size for _, size in self._entries.values())

    def insert(self, tokens: Any, state: PyTree) -> None:
        """Add the state of one sequence (batch size 1) after `tokens` [P].

        Raises:
          ValueError: if tokens are not integers [P], the state is not that of one sequence, or it
            exceeds `max_bytes`.
        """
        name = _key(tokens)
        shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(state)]
        if any(shape[:1] != (1,) for shape in shapes):
            raise ValueError(
                "PrefixCache: `state` must be that of one sequence, with a batch axis of 1, got"
                f" shapes {', '.join(str(list(shape)) for shape in shapes)}."
            )
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        if size > self.max_bytes:
            raise ValueError(
                f"PrefixCache: a state of {size} bytes must fit into max_bytes={self.max_bytes}."
            )
        self._entries.pop(name, None)
        self._entries[name] = state, size
        while self.num_bytes > self.max_bytes:
            self._entries.popitem(last=False)

    def longest(self, tokens: Any) -> tuple[int, PyTree]:
        """Return the length of the longest known proper prefix of `tokens` [P], and its state.

        At least one token remains to be read. Without a known prefix the result is `(0, None)`.
        """
        name = _key(tokens)
        sizes = sorted({len(known) for known in self._entries}, reverse=True)
        for size in sizes:
            if size < len(name) and name[:size] in self._entries:
                if _is_deleted(self._entries[name[:size]][0]):  # a call with `donate_state` took it
                    del self._entries[name[:size]]
                    continue
                self._entries.move_to_end(name[:size])
                return size // 4, self._entries[name[:size]][0]
        return 0, None

    def prefill(
        self,
        model: Layer,
        params: PyTree,
        tokens: Any,
        *,
        positions: Iterable[int] = (),
        chunk_size: int = 512,
    ) -> tuple[jax.Array, PyTree]:
        """Read one prompt from its longest known prefix, and store states.

        Args:
          model, params, chunk_size: as in `seqjax.prefill`.
          tokens: [P] integers.
          positions: numbers of tokens after which states are stored, in addition to the end.
            Tokens of the known prefix are not read again, so positions inside it are left out.

        Returns:
          `(logits, state)` [1, V] after the last token, for `generate` with a next prompt.

        Raises:
          ValueError: if tokens are not integers [P], or a position is not from 1 to P.
        """
        row, positions = np.frombuffer(_key(tokens), np.int32), list(positions)
        outside = [p for p in positions if not 1 <= p <= len(row)]
        if outside:
            raise ValueError(
                f"PrefixCache: `positions` must be from 1 to {len(row)}, the number of tokens, got"
                f" {outside[0]}."
            )
        start, state = self.longest(row)
        stops = sorted({p for p in positions if start < p < len(row)} | {len(row)})
        logits: Any = None
        for stop in stops:
            piece = jnp.asarray(row[None, start:stop])
            logits, state = prefill(model, params, piece, state, chunk_size=chunk_size)
            self.insert(row[:stop], state)
            start = stop
        return logits, state


def _is_deleted(state: PyTree) -> bool:
    return any(isinstance(x, jax.Array) and x.is_deleted() for x in jax.tree.leaves(state))


def _key(tokens: Any) -> bytes:
    row = as_integers(tokens)
    if row is None or row.ndim != 1 or not len(row):
        raise ValueError(
            f"PrefixCache: `tokens` must be integers of shape [P], P >= 1, got {describe(tokens)}."
        )
    return np.asarray(row).tobytes()
