"""Chat templates of published tokenizers, and the parts of a chat that the assistant writes."""

from __future__ import annotations

import datetime
import json
import pathlib
from collections.abc import Iterator
from typing import Any

Span = tuple[int, int]


class Template:
    """The chat template of a checkpoint folder, a program in the language of Jinja."""

    def __init__(self, folder: pathlib.Path, date: str | None = None) -> None:
        """Read chat_template.jinja, or the field `chat_template` of tokenizer_config.json.

        Args:
          folder: the folder of the checkpoint.
          date: the date of the template's `strftime_now`, such as "2025-01-01", so that the text of
            a run does not depend on the day; by default the template has no such function.

        Raises:
          ValueError: if the folder has no chat template, or the template is not valid.
        """
        config = read_object(folder / "tokenizer_config.json")
        source = config.get("chat_template")
        if isinstance(source, list):  # several templates by name
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
        separate = folder / "chat_template.jinja"
        if separate.exists():
            source = separate.read_text(encoding="utf-8")
        if not isinstance(source, str):
            raise ValueError(
                "`messages` must have a tokenizer with a chat template, got a checkpoint without"
                ' one; write {"text": ...} lines'
            )
        self._template = _compile(source, date)
        self._tokens = {}
        for name, value in config.items():
            if name.endswith("_token") and value is not None:
                self._tokens[name] = value["content"] if isinstance(value, dict) else value

    def render(self, messages: list[dict[str, Any]]) -> Iterator[tuple[str, list[Span]]]:
        """Yield texts, each with the spans of characters that the assistant writes.

        A turn of the assistant starts where the text with a generation prompt ends, as in
        generation. Most templates only append text for later messages: then there is one text.
        Others change earlier turns, for example without their reasoning. Then there is one text
        for every turn of the assistant, which ends after that turn.
        """
        whole = self._text(messages)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            raise ValueError("`messages` must have a message of the role assistant, got none")
        texts = {i: self._text(messages[: i + 1]) for i in turns}
        starts = {i: self._text(messages[:i], add_generation_prompt=True) for i in turns}
        if all(whole.startswith(text) for text in texts.values()):
            yield whole, [(_common(starts[i], whole), len(texts[i])) for i in turns]
            return
        for i in turns:
            yield texts[i], [(_common(starts[i], texts[i]), len(texts[i]))]

    def _text(self, messages: list[dict[str, Any]], **options: Any) -> str:
        import jinja2

        # Templates compare the last two with none, as the reference passes them.
        options = {"add_generation_prompt": False, "tools": None, "documents": None} | options
        try:
            return self._template.render(messages=messages, **options, **self._tokens)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise ValueError(f"the chat template refuses the messages: {error}") from None


def _common(a: str, b: str) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def read_object(file: pathlib.Path) -> dict[str, Any]:
    """Return the fields of a JSON file; none if there is no file.

    Raises:
      ValueError: if the file is not a JSON object.
    """
    if not file.exists():
        return {}
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file.name} must be valid JSON, got {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{file.name} must be an object, got {type(fields).__name__}")
    return fields


def _compile(source: str, date: str | None) -> Any:
    try:
        now = None if date is None else datetime.datetime.fromisoformat(date)
    except ValueError:
        raise ValueError(f"config.data.date must be such as 2025-01-01, got {date!r}") from None
    try:
        import jinja2
        import jinja2.ext
        import jinja2.sandbox
    except ImportError:
        raise ValueError(
            "`messages` must have the package jinja2; run pip install jinja2"
        ) from None

    class Generation(jinja2.ext.Extension):
        """The tag that marks text of the assistant in some templates; its body is kept."""

        tags = {"generation"}  # noqa: RUF012, as in the base class

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, **options: Any) -> str:
        return json.dumps(value, **({"ensure_ascii": False} | options))

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    if now is not None:
        environment.globals["strftime_now"] = now.strftime
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template must be valid, got {error}") from None
