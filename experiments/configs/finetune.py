"""Fine-tuning of a published checkpoint on text or chats.

    python -m experiments.finetune --checkpoint=path/to/mamba-130m-hf --data=book.txt

Hardware: any that holds the model. The defaults are for a model of about 0.1 billion parameters.
The learning rate is for adapters; for `--lora_rank=0` use about a tenth of it.
"""

from __future__ import annotations

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """Build the configuration; `arg` is not used."""
    del arg
    return ConfigDict(
        {
            "name": "finetune",
            "seed": 0,
            "mesh": "",
            "mesh_axis_types": "auto",
            "steps": 200,
            "stop_at": 0.0,
            "log_every": 10,
            "eval_every": 50,
            "save_every": 50,
            "keep": 2,
            "model": {
                "checkpoint": "",
                "lora_rank": 8,
                "lora_alpha": 16.0,
                "dtype": "",  # that of the stored embedding
                "remat": True,
                "scan": False,
            },
            "optimizer": {
                "learning_rate": 2e-4,
                "final_fraction": 0.1,
                "warmup_steps": 20,
                "b1": 0.9,
                "b2": 0.95,
                "weight_decay": 0.0,
                "clip_norm": 1.0,
                "recurrence_rate": 1.0,
            },
            "data": {
                "path": "",
                "date": "2025-01-01",  # fixed, so that a resumed run has the same chats
                "heldout_fraction": 0.05,
                "length": 512,
                "batch_size": 8,
                "shuffle_windows": 1024,
                "streams": 1,
            },
            "eval": {"windows": 32, "final_windows": 1024},
        }
    )
