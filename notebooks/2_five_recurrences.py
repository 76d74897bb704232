# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Five recurrences side by side
#
# LRU, S5, GateLoop, Mamba and DeltaNet differ in what their fixed-size state keeps. This notebook trains all five on the same task, with the same width and number of steps. It then inspects their predictions and states.
#
# It needs the extras `flax` and `experiments` of seqjax. In Colab, the next cell installs them.

# %%
# In Colab this cell installs seqjax; elsewhere it does nothing. Before you run it in Colab, put the
# address of seqjax's git repository between the quotes of REPOSITORY. It is what you would give to
# `git clone`, such as https://HOST/OWNER/seqjax.git. After a restart, run this cell again.
import os
import subprocess
import sys

REPOSITORY = ""  # @param {type:"string"}
if "COLAB_RELEASE_TAG" in os.environ:
    if not os.path.isdir("seqjax-checkout"):
        if not REPOSITORY:
            raise ValueError(
                "REPOSITORY must be the address of seqjax's git repository, got an empty string; "
                "fill it in at the top of this cell, as you would give it to `git clone`."
            )
        subprocess.run(["git", "clone", "--depth=1", REPOSITORY, "seqjax-checkout"], check=True)
        packages = "./seqjax-checkout[flax,experiments,pretrained]"
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", packages], check=True)
    if "seqjax-checkout" not in sys.path:  # also after a restart of the kernel
        sys.path.insert(0, "seqjax-checkout")

# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import seqjax
from experiments.tasks.mqar import NO_TARGET, mqar

TINY = os.environ.get("SEQJAX_NOTEBOOK") == "tiny"  # small sizes, for tests
plt.rcParams.update({"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# ## The task
#
# The task is multi-query associative recall (MQAR, arXiv 2312.04927). A sequence starts with a few key-value pairs. Noise follows, in which every key is repeated once. At a repeated key, the model must output its value.

# %%
VOCAB, PAIRS, LENGTH = 32, 4, 16 if TINY else 32
rng = np.random.default_rng(0)
inputs, targets = mqar(rng, 1, LENGTH, PAIRS, VOCAB)
asked = targets[0] != NO_TARGET
figure, axis = plt.subplots(figsize=(10, 1.5), layout="constrained")
for t, token in enumerate(inputs[0]):
    pair = np.flatnonzero(inputs[0, : 2 * PAIRS : 2] == token)
    kind = t // 2 if t < 2 * PAIRS else pair[0] if asked[t] else None
    color = "0.92" if kind is None else plt.cm.tab10(kind)
    axis.add_patch(plt.Rectangle((t, 0), 0.92, 1, color=color, alpha=1.0 if kind is None else 0.6))
    axis.text(t + 0.46, 0.5, token, ha="center", va="center", fontsize=8)
    if asked[t]:
        axis.text(t + 0.46, -0.55, f"{targets[0, t]}?", ha="center", va="center", fontsize=8)
axis.set(xlim=(0, LENGTH), ylim=(-1, 1.1), title="pairs of key and value, then noise and questions")
axis.axis("off")
plt.show()

# %% [markdown]
# ## The five recurrences
#
# | | state update | input-dependent |
# |---|---|---|
# | LRU | h = λ h + B x, one complex λ per channel | nothing |
# | S5 | the same, discretized from a continuous-time system | nothing |
# | Mamba | h = exp(Δ A) h + Δ B x | Δ, B and C |
# | GateLoop | S = diag(a) S + k vᵀ, a matrix | a, k and v |
# | DeltaNet | S = (I - β k kᵀ) S + β k vᵀ, a matrix | k, v and β; *replaces* the value stored at k |
#
# All layers have the same protocol, so one loop trains all models. Each model has two layers of width 32 and no MLPs. As in their papers, Mamba and DeltaNet include short convolutions.

# %%
DIM, STEPS, BATCH = (8, 2, 4) if TINY else (32, 500, 64)
layers = seqjax.layers
FIVE = {
    "LRU": layers.LRU(DIM, r_min=0.9, r_max=0.999),
    "S5": layers.S5(DIM),
    "GateLoop": layers.GateLoop(DIM, heads=2),
    "Mamba": layers.Mamba(DIM),
    "DeltaNet": layers.DeltaNet(DIM, heads=2),
}
COLORS = dict(zip(FIVE, ("#9ecae1", "#3182bd", "#31a354", "#e6550d", "#c51b8a"), strict=True))
models = {
    name: seqjax.models.LanguageModel(VOCAB, seqjax.models.Backbone(layer, depth=2, mlp_ratio=0))
    for name, layer in FIVE.items()
}
schedule = optax.warmup_cosine_decay_schedule(0, 1e-2, STEPS // 10 + 1, STEPS)
optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98))


def answers(model, params, inputs, targets):
    """Return the mean loss and the accuracy at the positions with a target."""
    logits, _ = model.apply(params, inputs)
    asked = targets != NO_TARGET
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(asked, targets, 0))
    right = (logits.argmax(axis=-1) == targets) & asked
    return jnp.sum(jnp.where(asked, losses, 0)) / asked.sum(), right.sum() / asked.sum()


def train(model):
    """Train a model; return its parameters and the accuracy on each new batch."""

    @jax.jit
    def train_step(params, state, inputs, targets):
        def loss_of(params):
            return answers(model, params, inputs, targets)

        (_, accuracy), gradient = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, accuracy

    params = model.init(jax.random.key(0))
    state, rng, curve = optimizer.init(params), np.random.default_rng(1), []
    for _ in range(STEPS):
        params, state, accuracy = train_step(params, state, *mqar(rng, BATCH, LENGTH, PAIRS, VOCAB))
        curve.append(accuracy)
    return params, np.array(curve)


trained, curves = {}, {}
for name, model in models.items():
    trained[name], curves[name] = train(model)
    size = sum(leaf.size for leaf in jax.tree.leaves(trained[name]))
    print(f"{name:9s} {size:6,d} parameters, accuracy {curves[name][-50:].mean():.2f}")

# %%
figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
width = max(STEPS // 30, 1)
for name, curve in curves.items():
    smooth = np.convolve(curve, np.full(width, 1 / width), mode="valid")
    axis.plot(np.arange(width - 1, STEPS), smooth, color=COLORS[name], label=name, linewidth=2)
axis.axhline(1 / PAIRS, color="k", linestyle=":", linewidth=1, label="1 / pairs")
axis.set(title="accuracy on questions", xlabel="step", ylim=(0, 1.02))
axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %% [markdown]
# Two accuracies are reached without any association of keys with values:
#
# - 1 / 16 = 0.06: the model outputs a random one of the 16 symbols that are values.
# - 1 / pairs = 0.25, the dotted line: the model outputs a random one of the four values in the sequence.
#
# So 0.25 is not the lowest accuracy that a model can have, and *a curve below the dotted line is not an error*. GateLoop stays near 0.06 for 300 steps and ends at 0.21. It has no convolution, so its state cannot combine a key with the value next to it. It first has to learn which symbols are values, and then to store the values of the sequence. LRU and S5 reach the dotted line and stay there. Only Mamba and DeltaNet rise above it: they associate keys with values.
#
# All models train for 500 steps, at one learning rate and with one seed. This takes about four minutes for the five models on two CPU cores. The result shows which recurrences learn the task quickly, not which can learn it. In the longer sweeps of the paper, gated linear recurrences of sufficient width learn it too.
#
# ## Predictions by key
#
# For the key of pair i, how much probability does the model assign to the value of pair j? A model that associates keys with values has its probability on the diagonal. A model that stores only the values spreads it evenly.


# %%
def confusion(model, params, count):
    """Return mean probabilities, [pair of the key, pair of the value]."""
    inputs, targets = mqar(np.random.default_rng(2), count, LENGTH, PAIRS, VOCAB)
    logits, _ = jax.jit(model.apply)(params, inputs)
    chance = np.asarray(jax.nn.softmax(logits))
    keys, values = inputs[:, 0 : 2 * PAIRS : 2], inputs[:, 1 : 2 * PAIRS : 2]
    rows = np.arange(count)
    table = np.zeros((PAIRS, PAIRS))
    for i in range(PAIRS):
        where = ((inputs == keys[:, [i]]) & (targets != NO_TARGET)).argmax(axis=1)
        for j in range(PAIRS):
            table[i, j] = chance[rows, where, values[:, j]].mean()
    return table


figure, axes = plt.subplots(1, 5, figsize=(11, 2.6), layout="constrained", sharey=True)
for axis, (name, model) in zip(axes, models.items(), strict=True):
    image = axis.imshow(confusion(model, trained[name], 16 if TINY else 512), vmin=0, vmax=1)
    numbers = range(1, PAIRS + 1)
    axis.set(title=name, xlabel="value of pair", xticks=range(PAIRS), xticklabels=numbers)
    axis.set(yticks=range(PAIRS), yticklabels=numbers)
axes[0].set_ylabel("key of pair")
figure.colorbar(image, ax=axes, label="probability", shrink=0.8)
plt.show()

# %% [markdown]
# ## Memory of the states
#
# The derivative of the final state with respect to the input at step t measures how much of that input the last layer still remembers. If the state treats all inputs alike, the line is smooth. If the input decides what to keep, the pairs have larger values than the noise after them.


# %%
@functools.partial(jax.jit, static_argnums=0)
def memory(model, params, inputs):
    """Return the sensitivity of the last layer's final state to each input, scaled to sum 1."""
    hidden = params["embedding"][inputs] * DIM**0.5
    backbone, params = model.backbone, params["backbone"]
    _, final = backbone.apply(params, hidden)
    leaves, tree = jax.tree.flatten(final[-1])

    def along(key, hidden):
        _, final = backbone.apply(params, hidden)
        keys = jax.tree.unflatten(tree, list(jax.random.split(key, len(leaves))))
        pairs = zip(jax.tree.leaves(final[-1]), jax.tree.leaves(keys), strict=True)
        return sum(jnp.sum(jnp.real(s * jax.random.normal(k, s.shape))) for s, k in pairs)

    keys = jax.random.split(jax.random.key(0), 4)
    slopes = jax.vmap(jax.grad(along, argnums=1), in_axes=(0, None))(keys, hidden)
    size = jnp.sqrt(jnp.mean(jnp.sum(slopes**2, axis=-1), axis=(0, 1)))
    return size / size.sum()


inputs, _ = mqar(np.random.default_rng(3), 4 if TINY else 32, LENGTH, PAIRS, VOCAB)
figure, axes = plt.subplots(1, 5, figsize=(11, 2.3), layout="constrained", sharey=True)
for axis, (name, model) in zip(axes, models.items(), strict=True):
    start = memory(model, model.init(jax.random.key(0)), inputs)
    end = memory(model, trained[name], inputs)
    axis.axvspan(-0.5, 2 * PAIRS - 0.5, color="0.92")
    axis.plot(start, color="0.6", linewidth=1, label="before training")
    axis.plot(end, color=COLORS[name], linewidth=2, label="after")
    axis.set(title=name, xlabel="t")
axes[0].set_ylabel("share of the memory")
axes[0].legend(frameon=False, fontsize=7)
plt.show()

# %% [markdown]
# The gray area marks the steps of the pairs. Before training, states remember the latest inputs best. After training:
#
# - LRU and S5 have slow decays, the same for every input, so their lines fall almost smoothly. Early inputs have the largest share. An early input reaches the last layer through all later steps of the first one.
# - Mamba and DeltaNet ignore most of the noise and keep the pairs. Their lines rise again in the last steps, which the short convolutions read directly.
# - GateLoop has changed little. It has not learned the task.
#
# ## Size of the states
#
# The size of the state does not depend on the length of the sequence:

# %%
for name, layer in FIVE.items():
    state = jax.eval_shape(lambda layer=layer: layer.initial_state(1))
    numbers = sum(
        leaf.size * (2 if leaf.dtype == jnp.complex64 else 1) for leaf in jax.tree.leaves(state)
    )
    print(f"{name:9s} {numbers:5d} numbers per layer and sequence")

# %% [markdown]
# Next: nonlinear recurrences, solved in parallel with Newton's method.
