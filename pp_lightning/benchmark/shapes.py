"""Models of known shapes with random weights: speed does not depend on what the weights say."""

from collections.abc import Callable, Mapping

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PreTrainedConfig, PreTrainedModel

from pp_lightning.errors import unknown

SHAPES: Mapping[str, Callable[[], PreTrainedConfig]] = {
    "llama-2048": lambda: LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=4, num_attention_heads=32, vocab_size=32000
    ),
    "llama-2-7b": lambda: LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
    ),
    "llama-2-13b": lambda: LlamaConfig(
        hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40, vocab_size=32000
    ),
    "llama-3-8b": lambda: LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    ),
    "opt-13b": lambda: OPTConfig(
        hidden_size=5120,
        ffn_dim=20480,
        num_hidden_layers=40,
        num_attention_heads=40,
        word_embed_proj_dim=5120,
        vocab_size=50272,
    ),
}


def random_model(
    shape: str, layers: int | None, tokens: int, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """A model with random weights, in evaluation mode.

    It has positions for ``tokens``, and the shape's own number of layers where ``layers`` is None.
    """
    if shape not in SHAPES:
        raise unknown("shape", shape, SHAPES)
    config = SHAPES[shape]()
    config.num_hidden_layers = layers or config.num_hidden_layers
    config.max_position_embeddings = max(2048, tokens)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
