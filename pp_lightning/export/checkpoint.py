"""A statically pruned model as a transformers folder."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pp_lightning.export.configs import write_configs
from pp_lightning.export.costs import Costs, costs_of
from pp_lightning.export.folder import appearing, check_free, check_space
from pp_lightning.export.int8 import quantise_folder
from pp_lightning.export.layouts import BUNDLED, Layout, target_for
from pp_lightning.export.packages import check_packages
from pp_lightning.export.record import pruning_record, write_card, write_record
from pp_lightning.export.verify import Agreement, Behaviour, verify
from pp_lightning.export.weights import check_shard_size, write_weights
from pp_lightning.families import layers_of
from pp_lightning.progress import Tell, ignore_line
from pp_lightning.stored import is_settled


def export_checkpoint(
    model: PreTrainedModel,
    out: Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    layout: Layout = "uniform",
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
    provenance: Mapping[str, Any] | None = None,
    release: bool = False,
    int8: bool = False,
    tell: Tell = ignore_line,
) -> tuple[Costs, Agreement]:
    """Write a pruned model as a folder that transformers loads, and prove that it does.

    The folder appears whole or not at all. Weights are written shard by shard; with ``release`` the memory never
    exceeds the loaded model and one shard, the check included.

    Args:
        model: pruned by a static method (or dense), on any device.
        out: the folder.
        tokenizer: written beside the model.
        layout: see :mod:`export.layouts`.
        dtype: of the weights written; None keeps the model's. Another one changes ``model`` too.
        overwrite: replace an earlier export at ``out``.
        max_shard_size: of a weights file, such as ``5GB``.
        provenance: for ``pruning.json``: ``base_model`` (its name), and whatever else is worth knowing.
        release: give up the model's weights before the folder is loaded for the check. ``model`` is empty afterwards.
        int8: quantise the matrices with torchao once the folder has passed its check; it is checked again then.
        tell: told what is going on.

    Returns:
        What was written, and how closely the reloaded folder follows the model.

    Raises:
        UserError: the layout cannot hold the model, a weight is not finite, the disk is full, ``out`` is taken, or the
            check failed. Nothing is left behind.
    """
    check_free(out, overwrite)
    check_shard_size(max_shard_size)
    if int8:
        check_packages("int8", "int8", "torchao")
    target = target_for(layout, model)
    if dtype is not None:
        cast_weights(model, dtype)
    model.eval()
    costs, pruning, device = costs_of(model, target), pruning_record(model), model.device
    given = dict(provenance or {})
    base = {"name": given.pop("base_model", "a model in memory"), "model_type": model.config.model_type}
    check_space(out, costs.bytes)
    expected, streamed = Behaviour.of_model(model), is_settled(layers_of(model)[0])
    with appearing(out, overwrite) as folder:
        tell("writing the weights")
        write_configs(folder, target.config, model, tokenizer)
        if target.code is not None:
            (folder / f"{BUNDLED}.py").write_text(target.code, encoding="utf-8")
        write_weights(target.entries, folder, max_shard_size)
        if release:
            model.to("meta")
        tell("loading the folder and comparing it with the model")
        bundled = target.code is not None
        agreement = verify(folder, expected, device, bundled_code=bundled, streamed=streamed)
        if int8:
            tell("quantising the folder and comparing it with the model")
            check = quantise_folder(folder, expected, device, bundled_code=bundled, max_shard_size=max_shard_size)
            agreement = replace(agreement, int8=check)
        record = {"base_model": base, "pruning": pruning, "written": asdict(costs), "check": asdict(agreement), **given}
        write_record(folder, record)
        write_card(folder, base, pruning, costs, agreement)
    return costs, agreement


def cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Change the dtype of the weights only.

    Buffers such as rotary frequencies stay in float32, as they do in a model that is loaded.
    """
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    model.config.dtype = dtype
