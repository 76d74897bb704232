"""States as values: donated to a call, and saved by NumPy and Orbax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqjax
from tests.generation.models import hybrid, prompts, small

pytestmark = pytest.mark.usefixtures("compiled_quickly")
OPTIONS = {"max_new_tokens": 3, "temperature": 0}


def read():
    """Return a state after the prompts."""
    return seqjax.prefill(*hybrid(), prompts())[1]


def test_a_donated_state_gives_its_memory_to_the_result():
    model, params = hybrid()
    expected = seqjax.generate(model, params, prompts(), state=read(), **OPTIONS)
    runs = {
        "generate": lambda state: seqjax.generate(
            model, params, prompts(), state=state, donate_state=True, **OPTIONS
        ),
        "prefill": lambda state: seqjax.prefill(model, params, prompts(), state, donate_state=True),
        "stream": lambda state: next(
            seqjax.stream(model, params, prompts(), state=state, donate_state=True, **OPTIONS)
        ),
    }
    for name, run in runs.items():
        state = read()
        places = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)}
        out = run(state)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state)), name
        new = jax.tree.leaves(out[1] if name == "prefill" else out.state)
        assert {leaf.unsafe_buffer_pointer() for leaf in new} == places, name
        if name == "generate":
            assert jnp.array_equal(out.tokens, expected.tokens)


def test_a_state_is_kept_by_default():
    model, params = hybrid()
    state = read()
    first = seqjax.generate(model, params, prompts(), state=state, **OPTIONS)
    again = seqjax.generate(model, params, prompts(), state=state, **OPTIONS)
    assert jnp.array_equal(first.tokens, again.tokens)


def test_there_may_be_no_state_to_donate():
    model, params = small()
    out = seqjax.generate(model, params, prompts(), donate_state=True, **OPTIONS)
    expected = seqjax.generate(model, params, prompts(), **OPTIONS)
    assert jnp.array_equal(out.tokens, expected.tokens)


def test_orbax_saves_a_state(tmp_path):
    """Check that a text continues from the snapshot as from the state itself."""
    checkpoint = pytest.importorskip("orbax.checkpoint")
    model, params = hybrid()
    state = read()
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        got = checkpointer.restore(tmp_path / "state", model.initial_state(3))
    jax.tree.map(np.testing.assert_array_equal, got, state)
    outs = [seqjax.generate(model, params, prompts(), state=s, **OPTIONS) for s in (got, state)]
    assert jnp.array_equal(outs[0].tokens, outs[1].tokens)


def test_numpy_saves_every_dtype(tmp_path):
    state = {
        "wide": np.arange(3.0, dtype=np.float32),
        "complex": jnp.array([1 + 2j]),
        "narrow": jnp.array([1.5, -2.0], jnp.bfloat16),
        "flag": jnp.array([True]),
    }
    seqjax.save_state(tmp_path / "state", state)
    got = seqjax.load_state(tmp_path / "state", like=state)
    for name, leaf in state.items():
        assert got[name].dtype == leaf.dtype
        np.testing.assert_array_equal(got[name], leaf)
    for dtype in (jnp.float16, jnp.int16):  # of the same size as bfloat16
        like = state | {"narrow": jnp.zeros(2, dtype)}
        with pytest.raises(ValueError, match=r"^load_state: .*narrow"):
            seqjax.load_state(tmp_path / "state", like=like)


def test_other_files_are_no_snapshots(tmp_path):
    state = small()[0].initial_state(1)
    (tmp_path / "text").write_text("not a snapshot")
    (tmp_path / "empty").touch()
    np.save(tmp_path / "array.npy", np.zeros(2))
    for name in ("text", "empty", "array.npy"):
        with pytest.raises(ValueError, match=r"^load_state: `path` must be a file that save_state"):
            seqjax.load_state(tmp_path / name, like=state)
    with pytest.raises(FileNotFoundError):
        seqjax.load_state(tmp_path / "nothing", like=state)
