"""Streams text from a trained model, byte by byte, with a state of constant size.

    python -m experiments.generate --workdir=runs/lm-gated_deltanet --prompt="def main("
    python -m experiments.generate --workdir=runs/lm-mamba --num_bytes=2000 --temperature=0.5

The configuration is the one of the run: `python -m experiments.train --help` lists its fields.
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
    """Defines the flags of this script."""
    flags.DEFINE_string("workdir", "", "Folder of the run.", flag_values=values)
    flags.DEFINE_enum(
        "which", "latest", ["latest", "best"], "Which checkpoint to use.", flag_values=values
    )
    flags.DEFINE_string("prompt", "", "Text to go on from.", flag_values=values)
    flags.DEFINE_integer("num_bytes", 500, "How many bytes to generate.", flag_values=values)
    flags.DEFINE_float(
        "temperature", lm.TEMPERATURE, "0 takes the most likely byte.", flag_values=values
    )
    flags.DEFINE_float(
        "top_p", lm.TOP_P, "Draw from this much of the probability.", flag_values=values
    )
    flags.DEFINE_integer("seed", 0, "Another seed, another text.", flag_values=values)


def main(values: Any) -> int:
    """Prints a sample of the run given by flags."""
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
    """Yields text as it is made, from the checkpoint of a workdir."""
    model, params, config, _ = checkpoints.load_for_inference(workdir, which)
    language.require_text(config, "generation")
    sample = sampling.make_sampler(model)
    prompt_bytes = sampling.encode(prompt)
    yield from sampling.decode(sample(params, prompt_bytes, num_bytes, seed, temperature, top_p))


if __name__ == "__main__":
    sys.exit(cli.run(define_flags, main))
