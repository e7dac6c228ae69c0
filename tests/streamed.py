"""The same tiny checkpoint in memory and with its layers' weights on disk."""

from pathlib import Path

from transformers import PreTrainedModel

from pp_lightning.checkpoints import load_model, load_streamed
from tests.models import tiny


def checkpoint(folder: Path, name: str, **overrides) -> Path:
    """A tiny model's folder, in several shards."""
    tiny(name, **overrides).save_pretrained(folder / name, max_shard_size="100KB")
    return folder / name


def both(folder: Path, name: str, **overrides) -> tuple[PreTrainedModel, PreTrainedModel]:
    """In memory, and streamed."""
    path = str(checkpoint(folder, name, **overrides))
    return load_model(path), load_streamed(path)
