"""Writing the weights: shards of a limited size, one in memory at a time."""

import json
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file

from pp_lightning.errors import UserError
from pp_lightning.export.entries import Entry


def check_shard_size(max_shard_size: str) -> None:
    """Refuse a size that cannot be read.

    Raises:
        UserError: it is not a number and a unit.
    """
    try:
        split_torch_state_dict_into_shards({}, max_shard_size=max_shard_size)
    except ValueError as error:
        raise UserError(f"max_shard_size must be a size such as 5GB or 500MB, not {max_shard_size!r}") from error


def write_weights(entries: Sequence[Entry], folder: Path, max_shard_size: str) -> None:
    """Write ``model.safetensors``, or numbered shards and their index.

    Raises:
        UserError: a weight is not finite.
        OSError: the disk is full.
    """
    by_name = {entry.name: entry for entry in entries}
    plan = split_torch_state_dict_into_shards(
        {name: entry.placeholder for name, entry in by_name.items()}, max_shard_size=max_shard_size
    )
    for file, names in plan.filename_to_tensors.items():
        try:
            save_file({name: by_name[name].make() for name in names}, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:  # how safetensors reports what the system refused
            raise OSError(str(error)) from error
        (folder / file).chmod(folder.stat().st_mode & 0o666)  # safetensors makes files that only their owner reads
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
