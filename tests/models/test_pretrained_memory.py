"""Host memory of loading a checkpoint, measured in a separate process."""

import json
import os
import pathlib
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from seqjax import pretrained
from seqjax.pretrained import files
from seqjax.pretrained.model import parameter_parts

pytest.importorskip("safetensors")

# A process inherits `ru_maxrss` from the process that starts it, but not VmHWM.
LOAD = """
import re, sys
import jax
from seqjax import pretrained
model, params = pretrained.load(sys.argv[1])
jax.block_until_ready(params)
peak = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())
print(int(peak[1]) * 1024, sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""


def write_mamba(folder, depth):
    """Write a Mamba in bfloat16 in shards of 500 MB, and return its bytes."""
    config = {
        "model_type": "mamba",
        "hidden_size": 2048,
        "num_hidden_layers": depth,
        "vocab_size": 50280,
    }
    (folder / "config.json").write_text(json.dumps(config))
    model = pretrained.read_model(config, "bfloat16")
    table = model.source.architecture(1).table()
    cuts = {
        found[0].tensor.name: found[0]
        for leaf in parameter_parts(model, table, ()).values()
        for found in leaf
    }
    dtype = np.dtype(ml_dtypes.bfloat16)
    shapes = {
        name.replace("@", model.source.prefix): cut.stored_shape for name, cut in cuts.items()
    }
    files.write(
        folder,
        {name: (shape, dtype) for name, shape in shapes.items()},
        lambda name: np.full(shapes[name], 0.01, dtype),
        500_000_000,
    )
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no /proc")
def test_loading_peaks_at_little_more_than_the_checkpoint(tmp_path):
    size = write_mamba(tmp_path, depth=34)
    assert size > 1.9e9
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        cwd=pathlib.Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    peak, params = map(int, done.stdout.split())
    assert params >= size * 0.99
    assert peak <= 1.2 * size, f"checkpoint {size:,} bytes, peak {peak:,} bytes"
