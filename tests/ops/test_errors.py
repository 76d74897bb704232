"""Contract: bad input raises one line with the op, the argument and the requirement."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqjax
from seqjax.layers import LRU
from seqjax.models import Backbone, Classifier, LanguageModel
from tests.contract.cases import OPS
from tests.contract.harness import by_row, cast, make

pytestmark = pytest.mark.usefixtures("compiled_quickly")
BY_OP = {str(case).split("-")[0]: case for case in reversed(OPS)}


def op_arguments(case):
    inputs, state, reset = make(case)
    return cast(inputs, "float32"), cast(state, "float32"), reset


# These take trees of arrays, and have separate tests.
TREES = {"monoid_scan", "nonlinear_scan", "step_scan"}


@pytest.mark.parametrize("name", sorted(set(BY_OP) - TREES))
def test_every_argument_is_checked(name):
    case = BY_OP[name]
    inputs, state, reset = op_arguments(case)
    for argument, value in inputs.items():
        wrong = dict(inputs, **{argument: jnp.concatenate([value, value], axis=-1)[None, None]})
        with pytest.raises(ValueError, match=rf"^{name}: `\w+` must have shape .* got \["):
            case.run(wrong, state, reset)
        wrong = dict(inputs, **{argument: jnp.ones(value.shape, int)})
        with pytest.raises(ValueError, match=rf"^{name}: `{argument}` must be .* cast it first"):
            case.run(wrong, state, reset)
    with pytest.raises(ValueError, match=f"^{name}: `initial_state` must have shape"):
        case.run(inputs, state[:1], reset)
    with pytest.raises(ValueError, match=rf"^{name}: `reset` must have shape \[B=2, T=13\]"):
        case.run(inputs, state, reset[:, :3])
    with pytest.raises(ValueError, match=rf"^{name}: `reset` must be boolean.*segment_starts"):
        case.run(inputs, state, reset.astype(int))


@pytest.mark.parametrize("case", OPS, ids=str)
def test_empty_time_is_refused(case):
    inputs, state, reset = op_arguments(case)
    empty = {
        k: v[:, :0] if k in case.timed else v[:0] if k in case.shared else v
        for k, v in inputs.items()
    }
    with pytest.raises(ValueError, match=r"at least one element|T >= 1"):
        case.run(empty, state, reset[:, :0])


@pytest.mark.parametrize("case", BY_OP.values(), ids=str)
def test_named_choices_are_honoured_or_refused(case):
    args = op_arguments(case)
    name = str(case).split("-")[0]
    with pytest.raises(ValueError, match=f"^{name}: `algorithm` must be one of .*got 'fastest'"):
        case.run(*args, algorithm="fastest")
    lacking = "newton" if name != "nonlinear_scan" else "chunked"
    with pytest.raises(NotImplementedError, match=f"^{name}: there is no '{lacking}' algorithm"):
        case.run(*args, algorithm=lacking)
    with pytest.raises(ValueError, match=f"^{name}: `implementation` must be"):
        case.run(*args, implementation="cuda")
    with pytest.raises(NotImplementedError, match=f"^{name}: there is no Pallas kernel"):
        case.run(*args, implementation="pallas")
    if "chunked" in case.algorithms:
        with pytest.raises(ValueError, match=f"^{name}: `chunk_size` must be a positive integer"):
            case.run(*args, chunk_size=0)
    with pytest.raises(TypeError, match="unexpected keyword"):
        case.run(*args, chunksize=3)
    case.run(*args, implementation="xla")


@pytest.mark.parametrize("name", ["selective_scan", "delta_rule"])
def test_real_ops_refuse_complex_input(name):
    case = BY_OP[name]
    inputs, state, reset = op_arguments(case)
    first = case.timed[0]
    with pytest.raises(ValueError, match=f"^{name}: `{first}` must be real|must be floating"):
        case.run(inputs | {first: inputs[first] * 1j}, state, reset)


def test_monoid_scan_checks_its_trees():
    ones = jnp.ones((2, 5, 3))
    with pytest.raises(ValueError, match="got none"):
        seqjax.monoid_scan(jnp.add, {})
    with pytest.raises(ValueError, match="same B and T"):
        seqjax.monoid_scan(jnp.add, (ones, ones[:, :4]))
    with pytest.raises(ValueError, match="structure of `elems`"):
        seqjax.monoid_scan(jnp.add, ones, (ones[:, 0],))
    with pytest.raises(ValueError, match="must have shapes"):
        seqjax.monoid_scan(jnp.add, ones, ones[:, 0, :2])


def test_nonlinear_scan_checks_its_trees():
    case = BY_OP["nonlinear_scan"]
    inputs, state, reset = op_arguments(case)
    x = inputs["x"]
    for xs in (x[0, 0, 0], (x, x[:, :4]), x[:, :0], ()):
        with pytest.raises(
            ValueError, match=r"^nonlinear_scan: every leaf of `xs` must have shape"
        ):
            case.run(inputs | {"x": xs}, state, reset)
    for wrong in ({"x": x.astype(int)}, {"x": x * 1j}, {"params": inputs["params"] | {"A_z": 1j}}):
        with pytest.raises(ValueError, match=r"^nonlinear_scan: `(xs|params)"):
            case.run(inputs | wrong, state, reset)
    for wrong in (state[0], state[:1], state[None, None]):
        with pytest.raises(ValueError, match=r"^nonlinear_scan: `initial_state` must have shape"):
            case.run(inputs, wrong, reset)
    with pytest.raises(ValueError, match=r"^nonlinear_scan: `guess` must have shape \[2, 13, 3\]"):
        case.run(inputs, state, reset, guess=x[:, :4])
    with pytest.raises(ValueError, match=r"^nonlinear_scan: `on_failure` must be one of"):
        case.run(inputs, state, reset, on_failure="hope")
    with pytest.raises(ValueError, match=r"^nonlinear_scan: `reset` must have shape"):
        case.run(inputs, state, reset[:, :3])
    with pytest.raises(
        ValueError, match=r"^nonlinear_scan: `reset` must be boolean.*segment_starts"
    ):
        case.run(inputs, state, reset.astype(int))


def test_segment_starts():
    ids = np.array([[1, 1, 2, 2, 0], [3, 1, 1, 1, 1]])
    expected = [[True, False, True, False, True], [True, True, False, False, False]]
    assert seqjax.segment_starts(ids).tolist() == expected
    for wrong in (ids[0], ids.astype(float)):
        with pytest.raises(ValueError, match="segment_starts: `segment_ids` must be integers"):
            seqjax.segment_starts(wrong)


@by_row(lambda case: case.layer is not None)
def test_layers_check_their_arguments(case):
    layer, name = case.layer, type(case.layer).__name__
    inputs, _, reset = make(case)
    params, x = cast(inputs["params"], "float32"), cast(inputs["x"], "float32")
    with pytest.raises(ValueError, match=f"{name}.*x"):
        layer.apply(params, x[..., :1])
    with pytest.raises(ValueError, match=f"{name}.*x"):
        layer.apply(params, x[:, :0])
    with pytest.raises(ValueError, match=f"{name}.*x"):
        layer.apply(params, jnp.ones(x.shape, int))
    with pytest.raises(ValueError, match=f"{name}.*reset"):
        layer.apply(params, x, None, reset[:, :2])
    with pytest.raises(ValueError, match=f"{name}.*params"):
        layer.apply({"other": x}, x)
    if layer.causal:
        with pytest.raises(ValueError, match=f"{name}.*state"):
            layer.apply(params, x, {"other": x})
        with pytest.raises(ValueError, match=f"{name}.*x"):
            layer.step(params, x, layer.initial_state(2))
    if name == "Scaled":  # its size is that of the layer inside
        return
    with pytest.raises(ValueError, match=f"{name}.*dim"):
        dataclasses.replace(layer, dim=0)


@by_row(lambda case: case.layer is not None)
def test_param_trees_agree(case):
    layer = case.layer
    params = layer.init(jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    is_axes = lambda node: isinstance(node, tuple)  # noqa: E731
    axes = jax.tree.leaves(layer.param_axes(), is_leaf=is_axes)
    assert jax.tree.structure(layer.param_axes(), is_leaf=is_axes) == tree
    assert jax.tree.structure(layer.param_roles()) == tree
    assert [leaf.ndim for leaf in leaves] == [len(a) for a in axes]
    roles = {"weight", "bias", "norm", "embedding", "recurrence"}
    assert set(jax.tree.leaves(layer.param_roles())) <= roles
    assert hash(layer) == hash(layer)


TOKENS = [
    LanguageModel(5, Backbone(LRU(4))),
    Classifier(3, Backbone(LRU(4)), vocab_size=5),
]


@pytest.mark.parametrize("model", TOKENS, ids=lambda model: type(model).__name__)
@pytest.mark.parametrize("token", [-1, 5])
def test_tokens_outside_the_vocabulary(model, token):
    """Check that concrete tokens raise an error and that traced tokens have NaN logits."""
    params = model.init(jax.random.key(0))
    tokens = jnp.array([[0, 4, token], [1, 2, 3]])
    message = (
        rf"^{type(model).__name__}: `tokens` must be from 0 to vocab_size - 1 = 4, got {token};"
    )
    with pytest.raises(ValueError, match=message):
        model.apply(params, tokens)
    with pytest.raises(ValueError, match=message):
        model.step(params, tokens[:, 2], model.initial_state(2))
    logits, _ = jax.jit(model.apply)(params, tokens)
    found = np.isnan(logits).reshape(2, -1)
    assert found[0].any()
    assert not found[1].any()


def test_masked_tokens_may_lie_outside_the_vocabulary():
    model = TOKENS[1]
    params = model.init(jax.random.key(0))
    tokens = jnp.array([[0, 4, -1], [1, 2, 3]])
    logits, _ = model.apply(params, tokens, mask=tokens >= 0)
    assert np.isfinite(logits).all()
    with pytest.raises(ValueError, match="got -1"):
        model.apply(params, tokens, mask=tokens < 4)


LAYER = seqjax.layers.LRU(4)
MODEL = seqjax.models.LanguageModel(7, seqjax.models.Backbone(LAYER))
CLASSIFIER = seqjax.models.Classifier(3, seqjax.models.Backbone(LAYER), input_dim=4)


@pytest.mark.parametrize("layer", [LAYER, MODEL, CLASSIFIER], ids=lambda x: type(x).__name__)
def test_layers_name_mistaken_arguments(layer):
    name, params, x = type(layer).__name__, layer.init(jax.random.key(0)), jnp.ones((2, 5, 4))
    with pytest.raises(
        ValueError, match=rf"^{name}: `x` must be an array, got a dict; .*\(params, x"
    ):
        layer.apply(x, params)
    with pytest.raises(ValueError, match=rf"^{name}: `x_t` must be an array, got a dict"):
        layer.step(x[:, 0], params, layer.initial_state(2))
    for wrong in (None, "text"):
        with pytest.raises(ValueError, match=rf"^{name}: `x` must be an array, got"):
            layer.apply(params, wrong)
    with pytest.raises(
        ValueError, match=rf"^{name}: `sequence_axis` must be a mesh axis .*got 'T'; call it inside"
    ):
        layer.apply(params, x, sequence_axis="T")
    for wrong in (0, jnp.zeros(3), jax.random.split(jax.random.key(0))):
        with pytest.raises(ValueError, match=rf"^{name}: `key` must be .*jax.random.key\(0\)"):
            layer.init(wrong)
    layer.init(np.asarray(jax.random.PRNGKey(0)))


def test_states_of_another_layer_are_described():
    conv, mamba = seqjax.layers.ShortConv(4), seqjax.layers.Mamba(4)
    x, state = jnp.ones((2, 5, 4)), mamba.initial_state(2)
    cases = [
        (conv, state, r"ShortConv: `state` must be an array, got a dict .*'conv', 'ssm'"),
        (
            mamba,
            x,
            r"Mamba: `state` must be a dict with the entries \['conv', 'ssm'\], got an array",
        ),
        (
            mamba,
            {"conv": (), "ssm": x},
            r"Mamba: `state\['conv'\]` must be an array, got a tuple of 0",
        ),
        (mamba, mamba.initial_state(3), r"`state\['conv'\]` must be float32 of shape \[2, "),
        (
            seqjax.models.Backbone(mamba),
            [state],
            "Backbone: `state` must be a tuple of 1, got a list",
        ),
    ]
    for layer, wrong, message in cases:
        with pytest.raises(ValueError, match=message) as raised:
            layer.apply(layer.init(jax.random.key(0)), x, wrong)
        assert "PyTreeDef" not in str(raised.value)


@pytest.mark.parametrize("case", BY_OP.values(), ids=str)
def test_ops_name_an_unbound_sequence_axis(case):
    name = str(case).split("-")[0]
    for wrong in ("T", 1):
        with pytest.raises(ValueError, match=rf"^{name}: `sequence_axis` must be a mesh axis"):
            case.run(*op_arguments(case), sequence_axis=wrong)


@pytest.mark.parametrize("name", sorted(set(BY_OP) - TREES))
def test_missing_arrays_are_named(name):
    inputs, state, reset = op_arguments(BY_OP[name])
    for argument in set(inputs) - {"log_decay", "D"}:
        with pytest.raises(ValueError, match=rf"^{name}: `{argument}` must have shape .*got None"):
            BY_OP[name].run(inputs | {argument: None}, state, reset)


def test_nonlinear_scan_names_a_wrong_cell():
    xs, h0, cell = jnp.ones((2, 5, 3, 4)), jnp.ones((2, 4)), seqjax.cells.GRU(4)
    for wrong in (lambda h, x: h, seqjax.cells.GRU, seqjax.layers.GRU(4), 3):
        with pytest.raises(ValueError, match=r"^nonlinear_scan: `cell` must be a function of"):
            seqjax.nonlinear_scan(wrong, {}, xs, h0)
    with pytest.raises(ValueError, match=r"^nonlinear_scan: `params` must be a dict .*'W_n'"):
        seqjax.nonlinear_scan(cell, {}, xs, h0)
    params = dict.fromkeys(cell.recurrent, jnp.ones((4, 4)))
    with pytest.raises(ValueError, match=r"^nonlinear_scan: `xs` must have shape \[B, T, 3, D\]"):
        seqjax.nonlinear_scan(cell, params, xs[:, :, :2], h0)
    with pytest.raises(ValueError, match=r"^nonlinear_scan: `initial_state` .*got None"):
        seqjax.nonlinear_scan(cell, params, xs, None)


ELEMENTWISE = r"\(a multiple of 16, a multiple of 128 or D=\d\)"
MATRIX = r"\(a power of two from 16 on, a multiple of 8 or H=\d\)"


@pytest.mark.parametrize(
    ("name", "wanted", "wrong"),
    [
        ("linear_scan", ELEMENTWISE, (8, 128)),
        ("selective_scan", ELEMENTWISE, (16, 100)),
        ("linear_attention", MATRIX, (48, 8)),
        ("delta_rule", MATRIX, (16, 12)),
        ("generalized_delta_rule", MATRIX, (8, 8)),
    ],
)
def test_block_sizes_are_checked(name, wanted, wrong):
    case = BY_OP[name]
    args = op_arguments(case)
    for sizes in (wrong, 16, (16,), (16, 0), (16.0, 128)):
        with pytest.raises(ValueError, match=f"^{name}: `block_sizes` must be {wanted}, got .*"):
            case.run(*args, block_sizes=sizes)
    with pytest.raises(ValueError, match=f"^{name}: `block_sizes` .*combined with .*'xla'; leave"):
        case.run(*args, block_sizes=(16, 128), implementation="xla")
    other = "associative" if name != "selective_scan" else "chunked"
    with pytest.raises(NotImplementedError, match=f"not {other}; use .* or leave out `block_siz"):
        case.run(*args, block_sizes=(16, 128), algorithm=other)
    half = cast(args[0], "float16")
    with pytest.raises(NotImplementedError, match=r"not support float16.* leave out `block_sizes`"):
        case.run(half, *args[1:], block_sizes=(16, 128))


def test_block_sizes_require_a_kernel():
    one = jnp.ones((1, 8, 1, 1))
    own = seqjax.ops.MatrixRecurrence("own", lambda S, DS, x: DS)
    with pytest.raises(NotImplementedError, match=r"^own: there is no Pallas kernel .*; leave out"):
        own({"q": one, "k": one, "v": one}, block_sizes=(16, 8))
