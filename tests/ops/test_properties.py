"""Property-based tests on generated inputs."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

import seqjax
from tests.contract.harness import assert_close
from tests.oracles import op_oracles

packed = st.lists(st.integers(0, 3), min_size=1, max_size=12)


@hypothesis.given(packed)
@hypothesis.settings(deadline=None, max_examples=50)
def test_segment_starts_marks_every_change(ids):
    starts = seqjax.segment_starts(np.array([ids]))[0].tolist()
    assert starts == [t == 0 or ids[t] != ids[t - 1] for t in range(len(ids))]


@hypothesis.given(
    st.integers(0, 2**32 - 1),
    st.lists(st.floats(-1, 1, width=32), min_size=13, max_size=13),
    st.lists(st.booleans(), min_size=13, max_size=13),
    st.sampled_from(["sequential", "associative", "chunked"]),
)
@hypothesis.settings(deadline=None, max_examples=50)
def test_linear_scan_with_any_decay_and_reset(seed, decay, reset, algorithm):
    rng = np.random.default_rng(seed)
    inputs = {
        "decay": np.array(decay, np.float32).reshape(1, 13, 1),
        "x": rng.standard_normal((1, 13, 1)).astype(np.float32),
    }
    state = rng.standard_normal((1, 1)).astype(np.float32)
    reset = np.array([reset])
    got = seqjax.linear_scan(
        **{name: jnp.asarray(value) for name, value in inputs.items()},
        initial_state=state,
        reset=reset,
        algorithm=algorithm,
        chunk_size=4,
    )
    wide = {name: value.astype(np.float64) for name, value in inputs.items()}
    assert_close(got, op_oracles.linear_scan(wide, state.astype(np.float64), reset), 1e-5)


def test_growing_decays_stay_exact_in_the_stated_range():
    """Check growing decays: sequential while states are finite, others while decay products are."""
    long, short = (jnp.zeros((1, length, 1)).at[0, -1].set(1.0) for length in (130, 30))
    decay = jnp.full(1, 10.0)

    def last(x, algorithm):
        run = jax.value_and_grad(
            lambda x: jnp.sum(seqjax.linear_scan(decay, x, algorithm=algorithm)[1])
        )
        value, gradient = run(x)
        return float(value), float(gradient[0, -1, 0])

    assert last(long, "sequential") == (1.0, 1.0)
    for algorithm in ("associative", "chunked"):
        assert last(short, algorithm) == (1.0, 1.0)
