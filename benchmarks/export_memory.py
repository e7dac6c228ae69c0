"""Peak memory of an export, pruning and check included, beside the loaded model and one shard. Linux only.

python benchmarks/export_memory.py
"""

import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import logging

from pp_lightning import calibrate, prune_
from pp_lightning.checkpoints import load_model
from pp_lightning.export import export_checkpoint
from pp_lightning.export.layouts import Layout
from pp_lightning.methods import WandaSP

# Matrices of LLaMA-2-7B. The allocator keeps the memory of smaller ones for later instead of giving it back.
CONFIG = LlamaConfig(
    vocab_size=8000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=2,
    num_attention_heads=32,
    max_position_embeddings=256,
)
SHARD = 500  # MB


def main() -> None:
    """One line a layout."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as place:
        AutoModelForCausalLM.from_config(CONFIG).save_pretrained(f"{place}/dense")
        ids = torch.randint(0, CONFIG.vocab_size, (2, 32))
        stats = calibrate(load_model(f"{place}/dense"), [{"input_ids": ids}], progress=False)
        for layout, skipped in (("uniform", ()), ("per-layer", (0,)), ("padded", (0,))):
            measure(place, layout, skipped, stats)  # type: ignore[arg-type]


def measure(place: str, layout: Layout, skipped: tuple[int, ...], stats: object) -> None:
    """Load, prune and export once; print the memory of the process in MB."""
    model = load_model(f"{place}/dense")
    for weight in model.parameters():
        weight.data = weight.data.clone()  # really in memory, not a file that is mapped into it
    loaded = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    prune_(model, WandaSP(), stats, pruning_ratio=0.4, skip_layers=skipped, keep_dense=False)  # type: ignore[arg-type]
    export_checkpoint(model, Path(place) / layout, layout=layout, max_shard_size=f"{SHARD}MB", release=True)
    peak = memory("VmHWM")
    print(
        f"{layout:9}  with the loaded model {loaded:5.0f}  peak of pruning and export {peak:5.0f}  "
        f"above the loaded model {peak - loaded:+5.0f}  (one shard: {SHARD})",
        flush=True,
    )


def memory(what: str) -> float:
    """A line of the process's status in MB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return float(line.split()[1]) / 1024


if __name__ == "__main__":
    main()
