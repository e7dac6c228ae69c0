"""Small random models that every engine takes: heads of 32, a vocabulary of a real tokenizer."""

from functools import lru_cache

from pp_lightning import calibrate, prune_
from pp_lightning.methods import FLAP, WandaSP
from tests.models import calibration_batches, tiny

VOCABULARY = 1024
PARTICULARS = {
    "llama": {},
    "llama_gqa": {},
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False, "layer_types": None},
    "qwen3": {"use_sliding_window": False, "layer_types": None},
    "gemma": {"tie_word_embeddings": True},
    "gemma2": {"tie_word_embeddings": True, "query_pre_attn_scalar": 32},
    "gemma3_text": {"query_pre_attn_scalar": 32},
    "granite": {"attention_bias": False, "mlp_bias": False},
    "phi3": {"sliding_window": None, "partial_rotary_factor": 1.0},
    "opt": {},
}
METHODS = {"wanda_sp": WandaSP, "flap": FLAP}


def small(name, **overrides):
    """A small model of a family."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 256, "max_position_embeddings": 128}
    if name not in ("opt", "phi3", "llama", "qwen2", "granite"):
        sizes["head_dim"] = 32
    return tiny(name, **{**sizes, **PARTICULARS[name], **overrides})


@lru_cache
def _statistics(name):
    return calibrate(small(name), calibration_batches(), progress=False)


def small_pruned(name, method="wanda_sp", layout="uniform"):
    """The same, 40% removed as an export of this layout wants it."""
    model, chosen = small(name), METHODS[method]()
    if layout == "uniform":
        chosen = chosen.with_uniform_counts()
    skipped = () if layout == "uniform" else (1,)
    prune_(model, chosen, _statistics(name), pruning_ratio=0.4, round_to=32, skip_layers=skipped)
    return model
