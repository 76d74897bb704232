"""A tiny published checkpoint with a tokenizer of words, for tests of the commands."""

import json

import pytest

# Turns in the form of many published templates, with a word for each role.
TEMPLATE = """
{%- for message in messages -%}
w1 {{ 'w2' if message.role == 'user' else 'w3' }} {{ message.content }} w4{{ ' ' }}
{%- endfor -%}
{%- if add_generation_prompt -%}w1 w3 {% endif -%}
"""


def write_checkpoint(folder, template=None):
    """Write a Mamba of 32 tokens, w0 to w31, with random weights; w31 ends a text."""
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("safetensors")
    from seqjax.pretrained.example import write_tiny_mamba

    write_tiny_mamba(folder)
    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(32)}, unk_token="w0")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [31]}))
    if template is not None:
        config = {"chat_template": template, "eos_token": {"content": "w31"}}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
