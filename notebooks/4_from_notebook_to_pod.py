# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # From notebook to pod
#
# This notebook trains a Flax NNX model with a seqjax backbone on one device, and with the same code on a mesh of eight devices. It then compiles the training step for a TPU slice and reads the memory that each chip needs. The eight devices are virtual devices of one CPU, which show everything except the speed.
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
import collections
import importlib.util
import pathlib
import re

import jax

jax.config.update("jax_platforms", "cpu")  # also on a machine with a GPU or TPU
jax.config.update("jax_num_cpu_devices", 8)

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import seqjax.nnx

TINY = os.environ.get("SEQJAX_NOTEBOOK") == "tiny"  # small sizes, for tests
plt.rcParams.update({"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# ## A model
#
# The model reads and predicts bytes. The embedding and the head are Flax layers; a seqjax backbone, wrapped in `seqjax.nnx.Recurrent`, is between them. There are two ways to shard parameters. Flax layers name mesh axes directly. A seqjax layer names logical axes (`embed`, `heads`, `mlp`, ...), and rules map them to mesh axes.

# %%
RULES = {"embed": "fsdp", "heads": "tensor", "mlp": "tensor"}


class ByteModel(nnx.Module):
    def __init__(self, dim, depth, heads, rngs):
        def split(initializer, *axes):
            return nnx.with_partitioning(initializer, axes)

        normal = nnx.initializers.normal(dim**-0.5)
        self.embed = nnx.Embed(256, dim, embedding_init=split(normal, "tensor", "fsdp"), rngs=rngs)
        layer = seqjax.layers.DeltaNet(dim, heads=heads)
        backbone = seqjax.models.Backbone(layer, depth=depth)
        self.backbone = seqjax.nnx.Recurrent(backbone, rngs=rngs, sharding_rules=RULES)
        self.head = nnx.Linear(
            dim, 256, use_bias=False, kernel_init=split(normal, "fsdp", "tensor"), rngs=rngs
        )

    def __call__(self, tokens, state=None, reset=None):
        # Collect the table before the lookup, so that activations are split like the batch.
        # Otherwise the compiler splits their features like the table's, over `fsdp`.
        table = jax.lax.with_sharding_constraint(self.embed.embedding[...], P())
        x = table[tokens] * self.embed.features**0.5
        y, state = self.backbone(x, state, reset)
        return self.head(y), state


SIZE = (16, 1, 2) if TINY else (64, 2, 4)  # dim, depth, heads
STEPS, BATCH, LENGTH = (2, 8, 16) if TINY else (60, 16, 128)


def make_mesh(data, fsdp, tensor):
    devices = jax.devices()[: data * fsdp * tensor]
    names = ("data", "fsdp", "tensor")
    return jax.make_mesh(
        (data, fsdp, tensor), names, axis_types=(AxisType.Auto,) * 3, devices=devices
    )


def create(size=SIZE):
    model = ByteModel(*size, nnx.Rngs(0))
    return model, nnx.Optimizer(model, optax.adamw(3e-3), wrt=nnx.Param)


@nnx.jit
def train_step(model, optimizer, tokens):
    def loss_of(model):
        logits, _ = model(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    loss, gradients = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, gradients)
    return loss


# %% [markdown]
# ## One device, then eight
#
# The model and the training step do not mention devices. Set a mesh, then create the model: every parameter is created with its sharding. Batches are split over `data` and `fsdp`.

# %%
text = b"".join(
    path.read_bytes() for path in sorted(pathlib.Path(os.__file__).parent.glob("*.py"))[:60]
)
text = np.frombuffer(text, np.uint8)


def batches():
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        starts = rng.integers(0, len(text) - LENGTH - 1, BATCH)
        yield text[starts[:, None] + np.arange(LENGTH + 1)].astype(np.int32)


def train(mesh):
    with jax.set_mesh(mesh):
        model, optimizer = nnx.jit(create)()
        where = NamedSharding(mesh, P(("data", "fsdp")))
        losses = [
            float(train_step(model, optimizer, jax.device_put(tokens, where)))
            for tokens in batches()
        ]
    return model, np.array(losses) / np.log(2)


_, alone = train(make_mesh(1, 1, 1))
mesh = make_mesh(2, 2, 2)
model, together = train(mesh)
figure, axis = plt.subplots(figsize=(8, 3.2), layout="constrained")
axis.plot(alone, linewidth=3, color="0.7", label="one device")
axis.plot(together, "--", color="C3", label="2 x 2 x 2 devices")
axis.set(xlabel="step", ylabel="bits per byte", title="the same training")
axis.legend(frameon=False)
plt.show()
print(f"largest difference of the losses: {np.abs(alone - together).max():.1e} bits")

# %% [markdown]
# ## Shardings of the parameters
#
# Each square is a parameter, and each tile is a shard with the numbers of its devices. `embed` is split over `fsdp` and `heads` over `tensor`. All parameters are replicated over `data`. Axes without a rule are not split.

# %%
params = model.backbone.params["block_0"]
mixer = params["mixer"]
chosen = {
    "embedding": model.embed.embedding,
    "q_proj": mixer["q_proj"],
    "out_proj": mixer["out_proj"],
    "beta_proj": mixer["beta_proj"],
    "norm": mixer["norm"],
}
figure, axes = plt.subplots(1, len(chosen), figsize=(11, 2.8), layout="constrained")
for axis, (name, variable) in zip(axes, chosen.items(), strict=True):
    array = variable[...]
    shape = array.shape if array.ndim == 2 else (array.shape[0], 1)
    tiles = collections.defaultdict(list)
    for device, index in array.sharding.devices_indices_map(array.shape).items():
        bounds = [part.indices(size)[:2] for part, size in zip(index, array.shape, strict=True)]
        tiles[tuple((*bounds, (0, 1))[:2])].append(device.id)
    for number, (((top, bottom), (left, right)), devices) in enumerate(sorted(tiles.items())):
        box = (left / shape[1], top / shape[0])
        size = ((right - left) / shape[1], (bottom - top) / shape[0])
        axis.add_patch(plt.Rectangle(box, *size, facecolor=plt.cm.Pastel1(number), edgecolor="w"))
        lines = "\n".join(" ".join(map(str, devices[i : i + 4])) for i in range(0, len(devices), 4))
        axis.text(box[0] + size[0] / 2, box[1] + size[1] / 2, lines, ha="center", va="center")
    names = variable.out_sharding
    axis.set(xlim=(0, 1), ylim=(1, 0), xticks=[], yticks=[])
    axis.set_title(f"{name} {list(array.shape)}\n{', '.join(map(str, names))}", fontsize=9)
plt.show()

# %% [markdown]
# ## Communication between devices
#
# The compiler inserts the collectives. Count them in the compiled step: if their number grows with the length of the sequence, some array is split along the wrong axis. With `data=8`, one all-reduce sums the gradients. On 2 x 2 x 2 devices there are about 40 collectives, because the parameters are split: they are gathered before use. Neither number depends on T. To see the effect of a sharding constraint, remove the line in `__call__` that gathers the embedding table. The compiler then splits features like the parameters.

# %%
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")


def collectives(compiled):
    text = compiled.as_text()
    return {kind: len(re.findall(rf" {kind}(?:-start)?\(", text)) for kind in KINDS}


def step_of(graph):
    """Return the training step as a jitted function of arrays, to compile ahead of time."""

    def step(state, tokens):
        model, optimizer = nnx.merge(graph, state)
        loss = train_step(model, optimizer, tokens)
        return nnx.state((model, optimizer)), loss

    return jax.jit(step, donate_argnums=0)


def compile_for(mesh, size=SIZE, batch=BATCH, length=LENGTH):
    """Compile the step for a mesh from shapes, without creating arrays."""
    graph, state = nnx.get_abstract_model(lambda: create(size), mesh)
    where = NamedSharding(mesh, P(("data", "fsdp")))
    tokens = jax.ShapeDtypeStruct((batch, length + 1), jnp.int32, sharding=where)
    with jax.set_mesh(mesh):
        return step_of(graph).lower(state, tokens).compile()


counts = {
    f"{name}, T = {length}": collectives(compile_for(mesh, length=length))
    for name, mesh in {"data=8": make_mesh(8, 1, 1), "2 x 2 x 2": make_mesh(2, 2, 2)}.items()
    for length in ((LENGTH,) if TINY else (LENGTH, 2 * LENGTH))
}
figure, axis = plt.subplots(figsize=(8, 3), layout="constrained")
left = np.zeros(len(counts))
for kind in KINDS:
    values = np.array([count[kind] for count in counts.values()])
    axis.barh(list(counts), values, left=left, label=kind)
    left += values
axis.invert_yaxis()
axis.set_title("collectives in one training step, as compiled for eight CPU devices")
axis.legend(frameon=False, fontsize=8)
plt.show()

# %% [markdown]
# ## Compile for a TPU slice
#
# The TPU compiler runs on any machine. Install it with `pip install -e ".[aot]"` from a clone (200 MB). It compiles the same step, with a larger model, for the same mesh on a slice of eight v5e chips, and reports the memory that each chip needs. (In Colab, install it in a separate cell and run this cell again.)

# %%
if importlib.util.find_spec("libtpu") and not TINY:
    for name, value in (  # libtpu asks the cloud for settings that are missing
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_ACCELERATOR_TYPE", "v5litepod-8"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
    ):
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    chips = topologies.get_topology_desc("v5e:2x4", platform="tpu").devices
    slice_mesh = jax.make_mesh(
        (2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=chips
    )
    compiled = compile_for(slice_mesh, size=(256, 1, 4), batch=64, length=1024)
    memory = compiled.memory_analysis()
    arguments, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    print(f"{len(chips)} chips {chips[0].device_kind}; of the 16 GiB of each:")
    print(f"  parameters, optimizer, batch {arguments / 2**20:7.1f} MiB")
    print(f"  temporaries                  {temporary / 2**20:7.1f} MiB")
    print("  collectives", {kind: n for kind, n in collectives(compiled).items() if n})
else:
    print("libtpu is not installed (or this is a test): pip install -e '.[aot]' from a clone")

# %% [markdown]
# This model is small, but the steps are the same for a model that needs a pod. Name the axes and map the names to mesh axes. Count the collectives. Compile for the TPU slice before you use it.
#
# If one *sequence* is too long for a device, split time: see `sequence_axis` in the guide on sharding. For models defined by a configuration, one command reports memory, communication and a roofline: `python -m experiments.plan --config=experiments/configs/pod.py:mamba_1b,131k --topology=v5e:16x16`.
