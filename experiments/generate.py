"""Text generation from a trained model, byte by byte, with a state of constant size.

    python -m experiments.generate --workdir=runs/lm-gated_deltanet --prompt="def main("
    python -m experiments.generate --workdir=runs/lm-mamba --num_bytes=2000 --temperature=0.5

The run's configuration applies; `python -m experiments.train --help` lists its fields.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags

from experiments.base import cli
from experiments.base.errors import UserError
from experiments.configs import lm
from experiments.objectives import language, sampling
from experiments.training import checkpoints


def define_flags(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Define the flags of this script."""
    flags.DEFINE_string("workdir", "", "Folder of the run.", flag_values=values)
    flags.DEFINE_enum(
        "which", "latest", ["latest", "best"], "Which checkpoint to use.", flag_values=values
    )
    flags.DEFINE_string("prompt", "", "Text to continue.", flag_values=values)
    flags.DEFINE_integer("num_bytes", 500, "Bytes to generate.", flag_values=values)
    flags.DEFINE_float(
        "temperature",
        lm.TEMPERATURE,
        "Sampling temperature; 0: the most likely byte.",
        flag_values=values,
    )
    flags.DEFINE_float(
        "top_p",
        lm.TOP_P,
        "Draw from the most likely bytes with this total probability.",
        flag_values=values,
    )
    flags.DEFINE_integer("seed", 0, "Seed of the random draws.", flag_values=values)


def main(values: Any) -> int:
    """Print a sample from the run that the flags select."""
    if values.num_bytes < 1:
        raise UserError(f"--num_bytes={values.num_bytes}: must be at least 1")
    prompt = "".join(sampling.decode(sampling.encode(values.prompt)))
    print(sampling.printable(prompt, sys.stdout), end="", flush=True)
    for text in generate(
        values.workdir,
        values.prompt,
        which=values.which,
        num_bytes=values.num_bytes,
        temperature=values.temperature,
        top_p=values.top_p,
        seed=values.seed,
    ):
        print(sampling.printable(text, sys.stdout), end="", flush=True)
    print()
    return 0


def generate(
    workdir: str,
    prompt: str = "",
    *,
    which: str = "latest",
    num_bytes: int = 500,
    temperature: float = lm.TEMPERATURE,
    top_p: float = lm.TOP_P,
    seed: int = 0,
) -> Iterator[str]:
    """Yield text from a checkpoint of a workdir as it is generated."""
    model, params, config, _ = checkpoints.load_for_inference(workdir, which)
    language.require_text(config, "generation")
    sample = sampling.make_sampler(model)
    prompt_bytes = sampling.encode(prompt)
    yield from sampling.decode(sample(params, prompt_bytes, num_bytes, seed, temperature, top_p))


if __name__ == "__main__":
    sys.exit(cli.run(define_flags, main))
