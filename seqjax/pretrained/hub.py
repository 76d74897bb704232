"""Folders of checkpoints: local ones, and downloads from the Hugging Face hub."""

import os
import pathlib
import re

# Files of the config, the tokenizer and its chat template.
TEXT_FILES = ("*.json", "*.txt", "*.model", "*.jinja")


def find_folder(path: str | os.PathLike[str]) -> pathlib.Path:
    """Return a local folder, or download a repository of the hub and return its folder.

    Raises:
      ValueError: if the path is neither a folder nor a name such as "owner/model", or the download
        fails.
      ImportError: if the package huggingface_hub is missing for a name.
    """
    folder = pathlib.Path(path)
    if folder.is_dir():
        return folder
    text = os.fspath(path)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", text) or folder.exists():
        raise ValueError(
            "load: `path` must be a folder with config.json, or a name on the Hugging Face hub such"
            f" as 'owner/model', got {text!r}."
        )
    try:
        import huggingface_hub
    except ImportError:
        raise ImportError(
            f"load: {text!r} is not a folder, and the package huggingface_hub must be installed to"
            ' download it; run pip install -e ".[pretrained]".'
        ) from None
    try:
        found = huggingface_hub.snapshot_download(
            text, allow_patterns=[*TEXT_FILES, "*.safetensors"]
        )
    except (OSError, ValueError) as error:  # wrong names, missing rights, no network
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"load: `path` must be a folder or a repository that can be read, got {text!r};"
            f" {reason.rstrip('.')}."
        ) from None
    return pathlib.Path(found)
