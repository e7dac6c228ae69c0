"""A causal language model whose layers have widths of their own: see ``pruned_shapes`` in config.json.

Load it with ``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)``. It computes what the stock class
computes, with fewer heads and channels. ``per_layer_config`` says the same to engines.
"""

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel


class PrunedConfig(LlamaConfig):
    """The stock config, of the model before pruning."""


class PrunedModel(LlamaModel):
    """The stock model without its vocabulary projection: what engines build their own around."""

    config_class = PrunedConfig

    def __init__(self, config: PrunedConfig) -> None:
        super().__init__(config)
        _narrow(self, config, f"{self.base_model_prefix}.")


class PrunedForCausalLM(LlamaForCausalLM):
    """The stock model with weights of other shapes, and with the numbers of heads that go with them."""

    config_class = PrunedConfig

    def __init__(self, config: PrunedConfig) -> None:
        super().__init__(config)
        _narrow(self, config, "")


def _narrow(model: Any, config: PrunedConfig, prefix: str) -> None:
    """Give every projection its shape and every module its numbers of heads; paths are relative to ``prefix``."""
    for path, shape in config.pruned_shapes.items():
        owner, _, name = path.removeprefix(prefix).rpartition(".")
        module = model.get_submodule(owner)
        setattr(module, name, nn.Parameter(torch.empty(shape)))
        if isinstance(module, nn.Linear) and name == "weight":
            module.out_features, module.in_features = shape
        model._init_weights(module)
    for path, number in config.pruned_counts.items():
        owner, _, name = path.removeprefix(prefix).rpartition(".")
        counting: Any = model.get_submodule(owner.removesuffix(".config"))
        if owner.endswith(".config"):
            counting.config = _WithCount(counting.config, name, number)
        else:
            setattr(counting, name, number)


class _WithCount:
    """The model's config, as a module reads it that has a number of heads of its own."""

    def __init__(self, config: Any, name: str, number: int) -> None:
        self._config = config
        setattr(self, name, number)

    def __getattr__(self, name: str) -> Any:
        if name == "_config":  # while it is being copied
            raise AttributeError(name)
        return getattr(self._config, name)
