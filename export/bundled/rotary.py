"""A causal language model whose layers have widths of their own, as ``per_layer_config`` in config.json says.

Load it with ``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)``. It computes what the stock class
computes, with fewer heads and channels.
"""

from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


class PrunedConfig(LlamaConfig):
    """The stock config; sizes at its top level are those of the model before pruning."""

    allow_global_per_layer_attribute_access = True  # the stock class is built with them before it is narrowed


class PrunedForCausalLM(LlamaForCausalLM):
    """The stock model with narrower projections."""

    config_class = PrunedConfig

    def __init__(self, config: PrunedConfig) -> None:
        super().__init__(config)
        for index, layer in enumerate(self.model.layers):
            _narrow(layer, config.per_layer_config[index], set(config.projection_biases))


def _narrow(layer: nn.Module, sizes: PrunedConfig, biases: set[str]) -> None:
    hidden, heads, keys = sizes.hidden_size, sizes.num_attention_heads, sizes.num_key_value_heads
    queries, channels = heads * sizes.head_dim, sizes.intermediate_size
    shapes = {
        "self_attn.q_proj": (hidden, queries),
        "self_attn.k_proj": (hidden, keys * sizes.head_dim),
        "self_attn.v_proj": (hidden, keys * sizes.head_dim),
        "self_attn.o_proj": (queries, hidden),
        "mlp.gate_proj": (hidden, channels),
        "mlp.up_proj": (hidden, channels),
        "mlp.down_proj": (channels, hidden),
    }
    for path, (inputs, outputs) in shapes.items():
        layer.set_submodule(path, nn.Linear(inputs, outputs, bias=path in biases))
