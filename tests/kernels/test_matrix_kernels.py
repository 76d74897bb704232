"""Interpreted kernels of the matrix-state ops, in cases that the contract tests leave out.

The contract tests run one form of each op with few heads, in chunks of 8. These tests cover the
other forms, chunks whose inverse has several levels, more heads than a block, and whole tiles,
which are read differently.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqjax
from tests.contract.cases import OPS
from tests.contract.harness import assert_close, cast, make

FORMS = [case for case in OPS if case.name.startswith(("linear_attention", "delta_rule"))]
# Forms without a kernel, forms with the kernel of another form, and those of test_fused_inputs.
OTHER = ("complex", "negative", "values", "normalizer", "exclusive", "fused", "fused-scalar")
REAL = [case for case in FORMS if not case.name.endswith(OTHER)]


def arrays(op, decay, batch, length, heads, keys, values, dtype, seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal((batch, length, heads, *shape))

    k = normal(keys)
    made = {"q": normal(keys), "k": k, "v": normal(values)}
    if op == "delta_rule":
        made["beta"] = rng.uniform(0, 2, k.shape[:3]) / np.sum(k**2, axis=-1)
    if decay is not None:
        made["log_decay"] = -rng.uniform(0, 1, k.shape[: 3 if decay == "scalar" else 4])
    return {name: jnp.asarray(x, dtype) for name, x in made.items()}


def both_ways(op, given, reset, chunk_size, **options):
    """Return outputs, final state and gradients of a kernel and of the XLA form."""
    w = None
    for implementation in ("xla", "pallas"):
        keywords = options | {"implementation": implementation, "reset": reset}
        if implementation == "pallas":
            keywords |= {"interpret": True, "chunk_size": chunk_size}
        run = jax.jit(functools.partial(getattr(seqjax, op), **keywords))

        @jax.jit
        def all_of(given, run=run, w=w):
            out, pull = jax.vjp(lambda given: run(**given), given)
            ct = jax.tree.map(lambda x: jnp.cos(3 * x), out) if w is None else w
            return out, ct, pull(ct)

        out, w, gradients = all_of(given)
        yield out, gradients


@pytest.mark.slow
@pytest.mark.parametrize("case", REAL, ids=str)
def test_every_form_in_chunks_with_levels(case, x64, strict, compiled_quickly):
    inputs, state, reset = make(case, length=39)
    given = cast(inputs | {"initial_state": state}, "float64")
    op = case.name.split("-")[0]
    expected, found = both_ways(op, given, reset, chunk_size=32)
    assert_close(found, expected, 1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_whole_tiles(dtype):
    """Check 8 heads of 128 keys, read with a stride; two bfloat16 heads share a word."""
    given = arrays("linear_attention", "scalar", 1, 24, 8, 128, 128, dtype)
    expected, found = both_ways("linear_attention", given, None, chunk_size=16)
    # bfloat16: gradients are rounded, and so are products.
    assert_close(found, expected, {"float32": 2e-5, "bfloat16": 2e-2}[dtype])


@pytest.mark.slow
def test_more_heads_than_a_block_has(x64, strict, compiled_quickly):
    given = arrays("delta_rule", "scalar", 1, 9, 10, 3, 2, "float64")
    reset = np.arange(9)[None] == 5
    expected, found = both_ways("delta_rule", given, reset, chunk_size=8)
    assert_close(found, expected, 1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("op", ["linear_attention", "delta_rule"])
def test_slices_of_wide_values_share_keys(op, x64, strict, compiled_quickly):
    """Check two slices, of 150 columns each, of two heads that share their keys."""
    given = arrays(op, "scalar", 1, 9, 2, 3, 299, "float64")
    given |= {name: given[name][:, :, :1] for name in ("q", "k")}
    given["initial_state"] = jnp.ones((1, 2, 3, 299))
    reset = np.arange(9)[None] == 5
    exclusive = {"exclusive": True} if op == "linear_attention" else {}
    expected, found = both_ways(op, given, reset, chunk_size=8, **exclusive)
    assert_close(found, expected, 1e-11)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": jnp.complex64}, "has no complex form"),
        ({"v": jnp.float16}, "does not support float16"),
        ({"k": jnp.float64}, "does not support float64"),
    ],
    ids=["complex", "float16", "float64"],
)
def test_what_the_kernel_cannot_do(change, message, x64):
    given = arrays("linear_attention", "scalar", 1, 9, 2, 3, 2, "float32")
    given |= {name: given[name].astype(dtype) for name, dtype in change.items()}
    with pytest.raises(NotImplementedError, match=message):
        seqjax.linear_attention(**given, implementation="pallas")
    seqjax.linear_attention(**given)


@pytest.mark.parametrize(
    ("keys", "values", "message"),
    [
        (300, 2, "supports keys of at most 256 numbers, got 300"),
        (2, 513, "supports values of at most 512 numbers, got 513"),
    ],
)
def test_the_kernel_says_how_wide_it_can_be(keys, values, message):
    given = arrays("linear_attention", None, 1, 9, 1, keys, values, "float32")
    with pytest.raises(NotImplementedError, match=message):
        seqjax.linear_attention(**given, implementation="pallas")


def test_the_kernel_has_no_decays_of_values():
    given = arrays("linear_attention", None, 1, 9, 1, 2, 2, "float32")
    given["value_log_decay"] = -jnp.ones((1, 9, 1, 2))
    with pytest.raises(NotImplementedError, match="has no decays of values"):
        seqjax.linear_attention(**given, implementation="pallas")
