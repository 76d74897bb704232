"""Rows of the linear recurrences with block-diagonal and with constant transitions."""

import functools

import numpy as np

import seqjax
from tests.contract.case import Arrays, Case, D, H, K, N, normal, op
from tests.oracles import op_oracles


def _block(name: str, axes: str, columns: tuple[int, ...] = (), **options: bool) -> Case:
    complex_ = options.pop("complex_", False)

    def make(rng: np.random.Generator, batch: int, length: int) -> Arrays:
        shape = tuple({"B": batch, "T": length, "G": H}[axis] for axis in axes)
        A = normal(rng, *shape, K, K, complex_=complex_)
        x = normal(rng, batch, length, H, K, *columns, complex_=complex_)
        # Norms up to 1: the states neither grow nor vanish.
        norms = np.linalg.norm(A, 2, axis=(-2, -1), keepdims=True)
        return {"transition": A * rng.uniform(0.5, 1.0, norms.shape) / norms, "x": x}

    return Case(
        name=name,
        inputs=make,
        run=op(seqjax.block_scan, ("transition", "x"), **options),
        oracle=functools.partial(op_oracles.block_scan, **options),
        state=lambda rng, batch: normal(rng, batch, H, K, *columns, complex_=complex_),
        algorithms=("sequential", "associative", "chunked"),
        timed=("transition", "x") if axes == "BTG" else ("x",),
        shared=("transition",) if axes == "TG" else (),
        reverse=options.get("reverse", False),
    )


def _ssm(name: str, complex_: bool) -> Case:
    def make(rng: np.random.Generator, batch: int, length: int) -> Arrays:
        A = -rng.uniform(0.01, 1.0, (D, N)) + (1j * rng.uniform(0, 3, (D, N)) if complex_ else 0)
        B, C = (normal(rng, D, N, complex_=complex_) for _ in range(2))
        return {"u": normal(rng, batch, length, D), "A": A, "B": B, "C": C}

    return Case(
        name=name,
        inputs=make,
        run=op(seqjax.ssm_scan, ("u", "A", "B", "C")),
        oracle=op_oracles.ssm_scan,
        state=lambda rng, batch: normal(rng, batch, D, N, complex_=complex_),
        algorithms=("sequential", "chunked"),
        timed=("u",),
    )


SSM_OPS = [
    _block("block_scan", "BTG"),
    _block("block_scan-shared_over_batch", "TG", columns=(2,)),
    _block("block_scan-time_invariant", "G", columns=(2,)),
    _block("block_scan-complex", "G", complex_=True),
    _block("block_scan-reverse", "BTG", reverse=True),
    _ssm("ssm_scan", complex_=True),
    _ssm("ssm_scan-real", complex_=False),
]
