"""A DeepSpeed JSON to make mistakes in, and the sentence that refuses them."""

import re

import pytest

from moe_hf.errors import ConfigError


def config_with(changes: dict | None = None) -> dict:
    """A valid ZeRO-2 JSON with expert parallelism over 2 ranks, and dotted keys changed (None deletes)."""
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "zero_optimization": {"stage": 2},
        "expert_parallel": {"enabled": True, "autoep_size": 2},
    }
    for path, value in (changes or {}).items():
        *sections, key = path.split(".")
        node = config
        for section in sections:
            node = node.setdefault(section, {})
        if value is None:
            del node[key]
        else:
            node[key] = value
    return config


def refuses(sentence: str):
    return pytest.raises(ConfigError, match=re.escape(sentence))
