"""What the benchmark's tests share."""

import pytest
from transformers import LlamaConfig

from pp_lightning.benchmark import ModelChoice, shapes


@pytest.fixture
def small(monkeypatch):
    """A shape that is measured in a second."""
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=100
    )
    monkeypatch.setattr(shapes, "SHAPES", {"small": lambda: config})
    return ModelChoice("small")
