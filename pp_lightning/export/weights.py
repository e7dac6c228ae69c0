"""Writing the weights: shards of a limited size, one tensor in memory at a time."""

import json
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import split_torch_state_dict_into_shards

from pp_lightning.errors import UserError
from pp_lightning.export.entries import Entry
from pp_lightning.tensor_files import Placeholder, write_tensors


def check_shard_size(max_shard_size: str) -> None:
    """Refuse a size that cannot be read."""
    try:
        if max_shard_size.strip().startswith("-"):
            raise ValueError
        split_torch_state_dict_into_shards({}, max_shard_size=max_shard_size)
    except ValueError as error:
        raise UserError(f"max_shard_size must be a size such as 5GB or 500MB, not {max_shard_size!r}") from error


def write_weights(entries: Sequence[Entry], folder: Path, max_shard_size: str) -> None:
    """Write ``model.safetensors``, or numbered shards and their index."""
    by_name = {entry.name: entry for entry in entries}
    plan = split_torch_state_dict_into_shards(
        {name: entry.placeholder for name, entry in by_name.items()}, max_shard_size=max_shard_size
    )
    for file, names in plan.filename_to_tensors.items():
        tensors = {name: Placeholder(by_name[name].placeholder, by_name[name].make) for name in names}
        write_tensors(tensors, folder / file, {"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
