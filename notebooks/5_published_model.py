# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Use a published model
#
# This notebook loads a checkpoint in the format of the Hugging Face hub, continues a text with it, fine-tunes it in two ways, and exports the result. The checkpoint is a Mamba-2 of 300 KB with random weights, which the notebook writes itself, so nothing is downloaded. With a real checkpoint, replace `CHECKPOINT` by its folder or by a name such as `state-spaces/mamba-130m-hf`.
#
# It needs the extras `experiments` and `pretrained` of seqjax. In Colab, the next cell installs them.

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
import inspect
import json
import pathlib
import shutil

import jax

jax.config.update("jax_platforms", "cpu")  # also on a machine with a GPU or TPU

import argparse

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import tokenizers

from experiments import evaluate, finetune, generate
from experiments.base import cli, logs
from seqjax import pretrained

TINY = os.environ.get("SEQJAX_NOTEBOOK") == "tiny"  # small sizes, for tests
STEPS, LENGTH = (4, 16) if TINY else (60, 64)
plt.rcParams.update({"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False})

HERE = pathlib.Path("published-model")
shutil.rmtree(HERE, ignore_errors=True)
CHECKPOINT = HERE / "checkpoint"

# %% [markdown]
# ## A checkpoint
#
# A checkpoint is a folder with `config.json`, the weights in safetensors files, and the tokenizer. `read_model` makes the model that a `config.json` describes, and `save` writes weights with their published names. The tokenizer has one token per byte and one that ends a text.

# %%
FIELDS = {
    "model_type": "mamba2",
    "architectures": ["Mamba2ForCausalLM"],
    "hidden_size": 64,
    "num_heads": 4,
    "head_dim": 32,
    "state_size": 16,
    "n_groups": 1,
    "num_hidden_layers": 1 if TINY else 2,
    "vocab_size": 257,
    "tie_word_embeddings": True,
    "eos_token_id": 256,
    "torch_dtype": "float32",
}
model = pretrained.read_model(FIELDS)
pretrained.save(model, model.init(jax.random.key(0)), CHECKPOINT)

alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
tokens = {symbol: i for i, symbol in enumerate(alphabet)} | {"<end>": 256}
tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=tokens, merges=[]))
tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = tokenizers.decoders.ByteLevel()
tokenizer.add_special_tokens(["<end>"])
tokenizer.save(str(CHECKPOINT / "tokenizer.json"))

for file in sorted(CHECKPOINT.iterdir()):
    print(f"{file.name:24}{file.stat().st_size / 1024:8.1f} KB")

# %% [markdown]
# ## Load
#
# `load` returns an ordinary `LanguageModel` and its parameters, a tree of arrays. The model has the same methods as every other model of seqjax.

# %%
model, params = pretrained.load(CHECKPOINT)
print(model)
prompt = jnp.array([tokenizer.encode("def add(a, b):").ids])
logits, state = model.apply(params, prompt)
print(logits.shape)

# %% [markdown]
# ## Generate
#
# The commands of `experiments` read the tokenizer, too. On a command line the next cell is `python -m experiments.generate --checkpoint=... --prompt="def "`. Random weights write random bytes.


# %%
def run(command, **options):
    """Run a command of experiments with its flags."""
    arguments = [f"--{name}={value}" for name, value in options.items()]
    assert cli.run(command.define_flags, command.main, [command.__name__, *arguments]) == 0


run(generate, checkpoint=CHECKPOINT, prompt="def ", num_bytes=20)

# %% [markdown]
# ## Fine-tune
#
# `experiments.finetune` trains low-rank adapters (LoRA) by default, and all weights with `--lora_rank=0`. The text is the source of Python's module `argparse`; its last part is held out. The adapters change the projections only. Here the embedding is random and stays as it is, so adapters learn less than a training of all weights. On a real checkpoint, which starts from a good embedding, adapters are usually enough.

# %%
text = HERE / "text.txt"
text.write_text(inspect.getsource(argparse)[: 4_000 if TINY else None], encoding="utf-8")
RUNS = {"adapters": (8, 1e-2), "all weights": (0, 1e-2)}
for name, (rank, rate) in RUNS.items():
    workdir = HERE / name.replace(" ", "-")
    run(
        finetune,
        checkpoint=CHECKPOINT,
        data=text,
        workdir=workdir,
        export=workdir / "export",
        lora_rank=rank,
        **{
            "config.steps": STEPS,
            "config.log_every": STEPS // 2,
            "config.eval_every": STEPS // 2,
            "config.save_every": STEPS,
            "config.optimizer.learning_rate": rate,
            "config.data.length": LENGTH,
        },
    )

# %%
figure, axes = plt.subplots(figsize=(6, 3.2))
for name in RUNS:
    rows = [row for row in logs.read_rows(HERE / name.replace(" ", "-")) if "loss" in row]
    axes.plot([row["step"] for row in rows], [row["loss"] / np.log(2) for row in rows], label=name)
axes.set(xlabel="step", ylabel="bits per byte", title="Loss on the training text")
axes.legend()
plt.show()

# %% [markdown]
# The same command resumes a stopped run, with the same losses as without the stop.
#
# ## Use the export
#
# Each run wrote its result in the format of the checkpoint, with merged adapters and the tokenizer. Other libraries that read Mamba-2 checkpoints can read it. Here `evaluate` reads it, on the first 5,000 bytes of the same text, which both runs have read.

# %%
RESULT = HERE / "all-weights" / "export"
print(sorted(file.name for file in RESULT.iterdir()))
print(json.loads((RESULT / "config.json").read_text())["model_type"])
for folder in (CHECKPOINT, HERE / "adapters" / "export", RESULT):
    run(evaluate, checkpoint=folder, text=text, num_bytes=500 if TINY else 5_000)

# %%
run(generate, checkpoint=RESULT, prompt="def ", num_bytes=20 if TINY else 100, temperature=0.5)

# %% [markdown]
# ## In your own program
#
# `pretrained.LoRA` is a pure transformation of parameters: `init` makes adapters, and `merge` adds them to the weights. Differentiate with respect to the adapters, and the rest of the model stays fixed. `merge` before any adapter was trained changes nothing.

# %%
lora = pretrained.LoRA(model, rank=4)
adapters = lora.init(jax.random.key(1))
merged = lora.merge(params, adapters)
same = jax.tree.map(lambda a, b: bool((a == b).all()), params, merged)
print(all(jax.tree.leaves(same)))
sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (params, adapters)]
print(f"{sizes[0]:,} parameters, {sizes[1]:,} in the adapters")
shutil.rmtree(HERE)

# %% [markdown]
# The guide [Use a published model](../docs/guides/pretrained.md) has the families of checkpoints, meshes, dtypes and chats.
