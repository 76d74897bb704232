"""Text generation from a trained model, byte by byte, with a state of constant size.

    python -m experiments.generate --workdir=runs/lm-gated_deltanet --prompt="def main("
    python -m experiments.generate --workdir=runs/lm-mamba --num_bytes=2000 --temperature=0.5
    python -m experiments.generate --workdir=runs/lm-mamba --prompts=prompts.txt --num_samples=4
    python -m experiments.generate --workdir=runs/lm-mamba --interactive
    python -m experiments.generate --checkpoint=path/to/mamba-130m-hf --prompt="The capital of"

`--checkpoint` samples from a published checkpoint with its tokenizer, also with `--interactive`;
`--num_bytes` then counts tokens. `--int8` stores its projections in int8. The run's configuration
applies; `python -m experiments.train --help` lists its fields.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from absl import flags

from experiments.base import cli
from experiments.base.errors import UserError
from experiments.configs import lm
from experiments.objectives import language, published, sampling
from experiments.training import checkpoints


def define_flags(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Define the flags of this script."""
    flags.DEFINE_string("workdir", "", "Folder of the run.", flag_values=values)
    flags.DEFINE_enum(
        "which", "latest", ["latest", "best"], "Which checkpoint to use.", flag_values=values
    )
    flags.DEFINE_string(
        "checkpoint",
        "",
        "Folder of a published checkpoint, or its name on the Hugging Face hub; instead of a run.",
        flag_values=values,
    )
    flags.DEFINE_boolean(
        "int8",
        False,
        "Store the projections of the published checkpoint in int8; needs the package qwix.",
        flag_values=values,
    )
    flags.DEFINE_string("prompt", "", "Text to continue.", flag_values=values)
    flags.DEFINE_string(
        "prompts", "", "File with one prompt per line, continued in one batch.", flag_values=values
    )
    flags.DEFINE_integer("num_samples", 1, "Samples of each prompt.", flag_values=values)
    flags.DEFINE_boolean(
        "interactive",
        False,
        "Read lines from the terminal and continue each; the state keeps the earlier lines.",
        flag_values=values,
    )
    flags.DEFINE_integer("num_bytes", 500, "Bytes to generate, at most.", flag_values=values)
    flags.DEFINE_string(
        "stop",
        "",
        r"End a text after this string. Escapes such as \n are decoded.",
        flag_values=values,
    )
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
    flags.DEFINE_integer(
        "top_k", 0, "Draw from this number of most likely bytes; 0: all.", flag_values=values
    )
    flags.DEFINE_integer("seed", 0, "Seed of the random draws.", flag_values=values)


def main(values: Any) -> int:
    """Print samples from the run that the flags select."""
    settings = sampling.Settings(
        num_bytes=values.num_bytes,
        temperature=values.temperature,
        top_p=values.top_p,
        top_k=values.top_k,
        seed=values.seed,
        stop=_unescape(values.stop),
    )
    if values.num_samples < 1:
        raise UserError(f"--num_samples={values.num_samples}: must be at least 1")
    if sum((bool(values.prompt), bool(values.prompts), values.interactive)) > 1:
        raise UserError("--prompt, --prompts and --interactive: give one of them")
    if values.interactive and values.num_samples > 1:
        raise UserError("--num_samples: must be 1 with --interactive")
    if values.checkpoint and values.workdir:
        raise UserError("--checkpoint: must not be combined with --workdir")
    prompts = read_prompts(values.prompts) if values.prompts else [values.prompt]
    if values.int8 and not values.checkpoint:
        raise UserError("--int8: must have --checkpoint")
    if values.interactive:
        return _converse(values, settings)
    if values.checkpoint:
        return _from_checkpoint(values, prompts, settings)
    if len(prompts) == 1 and values.num_samples == 1:
        texts = generate(values.workdir, prompts[0], which=values.which, settings=settings)
        first = next(texts, "")  # loads the checkpoint, which can fail, before anything is shown
        _show(sampling.decode(sampling.encode(prompts[0])))
        _show(itertools.chain([first], texts))
        print()
        return 0
    model, params = _load(values.workdir, values.which)
    rows = [sampling.encode(p) for p in prompts for _ in range(values.num_samples)]
    for row, text in zip(rows, sampling.batch(model, params, rows, settings), strict=True):
        _show(sampling.decode(row + text))
        print("\n" + "-" * 40)
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
    settings: sampling.Settings | None = None,
) -> Iterator[str]:
    """Yield text from a checkpoint of a workdir as it is generated.

    `settings` replaces the keywords before it.
    """
    if settings is None:
        settings = sampling.Settings(num_bytes, temperature, top_p, seed=seed)
    model, params = _load(workdir, which)
    yield from sampling.decode(sampling.stream(model, params, sampling.encode(prompt), settings))


def _from_checkpoint(values: Any, prompts: list[str], settings: sampling.Settings) -> int:
    model = published.Published(values.checkpoint, in_int8=values.int8)
    for prompt, sample in itertools.product(prompts, range(values.num_samples)):
        own = dataclasses.replace(settings, seed=settings.seed + sample)
        _show(itertools.chain([prompt], model.stream(prompt, own)))
        print("" if len(prompts) == values.num_samples == 1 else "\n" + "-" * 40)
    return 0


def read_prompts(path: str) -> list[str]:
    """Return the lines of a file that are not empty."""
    text = pathlib.Path(path).read_bytes().decode("utf-8", "surrogateescape")
    lines = [line for line in text.splitlines() if line]
    if not lines:
        raise UserError(f"--prompts={path}: must have at least one line that is not empty")
    return lines


def _load(workdir: str, which: str) -> tuple[Any, Any]:
    model, params, config, _ = checkpoints.load_for_inference(workdir, which)
    language.require_text(config, "generation")
    return model, params


def _show(texts: Iterable[str]) -> None:
    for text in texts:
        print(sampling.printable(text, sys.stdout), end="", flush=True)


def _converse(values: Any, settings: sampling.Settings) -> int:
    if values.checkpoint:
        model = published.Published(values.checkpoint, in_int8=values.int8)
        answer = model.conversation(settings)
    else:
        conversation = sampling.Conversation(*_load(values.workdir, values.which), settings)

        def answer(line: str) -> Iterator[str]:
            return sampling.decode(conversation.answer(sampling.encode(line)))

    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return 0
        _show(answer(line))
        print()


def _unescape(text: str) -> bytes:
    try:
        # Bytes outside ASCII pass unchanged: the codec reads them as Latin-1.
        return sampling.encode(text).decode("unicode_escape").encode("latin-1")
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise UserError(f"--stop={text}: {error.reason}") from None


if __name__ == "__main__":
    sys.exit(cli.run(define_flags, main))
