"""The text of `--help`: description, examples, flags, and the words and fields of a config."""

from __future__ import annotations

import importlib.util
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from experiments.base import fields

_FOLDER = Path(__file__).parents[1] / "configs"
# `--helpshort` omits the options of layers; `--helpfull` adds those of all layers and absl's flags.
_HELP_FLAGS = {
    "help": "Show the flags and the fields of the configuration.",
    "helpshort": "Like --help, without the options of layers.",
    "helpfull": "Like --help, with the options of all layers and the flags of absl.",
}


def define_flags(values: flags.FlagValues) -> None:
    """Define `--help`, `--helpshort` and `--helpfull`."""
    for name, text in _HELP_FLAGS.items():
        short = "h" if name == "help" else None
        flags.DEFINE_boolean(name, False, text, short_name=short, flag_values=values)


def requested(values: flags.FlagValues) -> str:
    """Return the help flag that is set: `help`, `helpshort`, `helpfull` or an empty string."""
    return next((name for name in _HELP_FLAGS if values[name].value), "")


def text(description: str, values: flags.FlagValues, detail: str) -> str:
    """Return the help of a command.

    Args:
      description: the docstring of the command's module, with its examples.
      values: the parsed flags.
      detail: a result of `requested`.
    """
    # Python 3.13 removes the indentation of docstrings, older versions keep it.
    description = re.sub(r"^ *python -m", "    python -m", description.strip(), flags=re.MULTILINE)
    sections = [description, _flags(values, detail == "helpfull")]
    if "config" in values:
        example = re.search(r"--config=(\S+)", description)
        sections += _config(values, example[1] if example else "", detail)
    return "\n\n".join(sections)


def _flags(values: flags.FlagValues, full: bool) -> str:
    names = [name for name in sorted(values) if values[name].name == name]  # no short names
    lines = ["Flags:"]
    for name in names:
        flag = values[name]
        if name.startswith("config."):  # listed with the fields
            continue
        # The default of `config` is a parsed configuration; its path is shown.
        parsed = name == "config" and flag.default is not None
        default = config_path(values) if parsed else flag.default
        shown = f"--[no]{name}" if flag.boolean else f"--{name}={_shown(default)}"
        comment = " ".join((flag.help or "").split())
        lines += _entry(shown, comment)
    if full:
        lines += [
            "",
            "".join(values.get_help(include_special_flags=True).partition("absl.flags:")[1:]),
        ]
    return "\n".join(lines)


def _shown(default: Any) -> str:
    if default is None:
        return ""
    return ",".join(default) if isinstance(default, list) else str(default)


def _entry(shown: str, comment: str) -> list[str]:
    """Return the lines of a flag or field: the comment to the right, or below a long name."""
    indent = " " * 36
    lines = textwrap.wrap(comment, 62)
    if len(shown) > 32:
        return [f"  {shown}", *(indent + line for line in lines)]
    first = f"  {shown:<34}{lines[0] if lines else ''}".rstrip()
    return [first, *(indent + line for line in lines[1:])]


def _config(values: flags.FlagValues, example: str, detail: str) -> Iterator[str]:
    """Yield the list of configuration files, then the words and fields of one file."""
    yield "\n".join(
        [
            "Configurations, --config=FILE:WORD,WORD:",
            *(
                f"  experiments/configs/{path.name}\n      {_summary(path)}"
                for path in sorted(_FOLDER.glob("*.py"))
                if "def get_config" in path.read_text()
            ),
        ]
    )
    config = values["config"].value
    selected = example if config is None else config_path(values)
    path, _, arg = selected.partition(":")
    file = _FOLDER / Path(path).name if config is None else Path(path)
    if config is None:
        config = _load(file).get_config(arg)
    words = _words(_load(file))
    if words:
        yield "\n".join([f"Words of {path}, at most one of each kind:", *words])
    yield "\n".join([f"Fields of {selected}:", *_fields(config, detail)])


def config_path(values: flags.FlagValues) -> str:
    """Return the value of `--config` as it was given, FILE:WORD,WORD."""
    flag: Any = values["config"]  # a flag of ml_collections, which has one more attribute
    return flag.config_filename


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _summary(path: Path) -> str:
    return (_load(path).__doc__ or "").split("\n\n")[0].replace("\n", " ")


def _words(module: ModuleType) -> list[str]:
    """Return the help lines for the words of a configuration file, if it declares any."""
    kinds = getattr(module, "KINDS", {})
    lines = []
    for kind, words in kinds.items():
        lines += _entry(kind, ", ".join([f"{words[0]} (default)", *words[1:]]))
    for switch, comment in getattr(module, "SWITCHES", {}).items():
        lines += _entry(switch, comment)
    return lines


def _fields(config: ConfigDict, detail: str) -> list[str]:
    lines = []
    mixers = {name.strip() for name in config.get("model", {}).get("mixers", "").split(",")}
    for name, value in leaves(config.to_dict()):
        if name.startswith("model.options."):
            layer = name.split(".")[2]
            if detail == "helpshort" or (detail == "help" and layer not in mixers):
                continue
        lines += _entry(f"--config.{name}={value}", fields.comment(name))
    if detail != "helpfull":
        lines.append("Options of the other layers: --helpfull, or --config=FILE:LAYER --help.")
    return lines


def resolved(config: ConfigDict) -> str:
    """Return the configuration as `field = value  # comment` lines.

    Options of layers that `model.mixers` does not name have no effect and are left out.
    """
    lines = []
    mixers = {name.strip() for name in config.model.mixers.split(",")}
    for name, value in leaves(config.to_dict()):
        if name.startswith("model.options.") and name.split(".")[2] not in mixers:
            continue
        text, comment = f"{name} = {value!r}", fields.comment(name)
        lines.append(f"{text:<48}  # {comment}" if comment else text)
    return "\n".join(lines)


def leaves(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) for every field of a configuration; sections come last."""
    for name, value in sorted(config.items(), key=lambda item: isinstance(item[1], dict)):
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
