"""An OPT model whose layers have widths of their own, as ``per_layer_config`` in config.json says.

Load it with ``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)``. It computes what the stock class
computes, with fewer heads and channels.
"""

from torch import nn
from transformers import OPTConfig, OPTForCausalLM


class PrunedConfig(OPTConfig):
    """The stock config; sizes at its top level are those of the model before pruning."""

    allow_global_per_layer_attribute_access = True  # the stock class is built with them before it is narrowed


class PrunedForCausalLM(OPTForCausalLM):
    """The stock model with narrower projections."""

    config_class = PrunedConfig

    def __init__(self, config: PrunedConfig) -> None:
        super().__init__(config)
        head_size = config.hidden_size // config.num_attention_heads
        for index, layer in enumerate(self.model.decoder.layers):
            _narrow(layer, config.per_layer_config[index], head_size, set(config.projection_biases))


def _narrow(layer: nn.Module, sizes: PrunedConfig, head_size: int, biases: set[str]) -> None:
    hidden, channels = sizes.hidden_size, sizes.ffn_dim
    width = sizes.num_attention_heads * head_size
    shapes = {
        "self_attn.q_proj": (hidden, width),
        "self_attn.k_proj": (hidden, width),
        "self_attn.v_proj": (hidden, width),
        "self_attn.out_proj": (width, hidden),
        "fc1": (hidden, channels),
        "fc2": (channels, hidden),
    }
    for path, (inputs, outputs) in shapes.items():
        layer.set_submodule(path, nn.Linear(inputs, outputs, bias=path in biases))
    setattr(layer.get_submodule("self_attn"), "num_heads", sizes.num_attention_heads)  # noqa: B010 (typed as a Module)
