"""Peak memory of choosing by gradients, and of training adapters, on the CPU: ``python benchmarks/gradient_memory.py``.

A LLaMA shape with random float32 weights, 10 windows of 64 tokens. Each variant runs in a process of its own; what is
printed is the highest resident memory of that process, and how much that is above the process that only evaluates.
``dense backward`` keeps every gradient, as a plain backward pass does: what the others are measured against.
"""

import resource
import subprocess
import sys
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from pp_lightning import taylor_importances
from pp_lightning.families import shape_of
from pp_lightning.functional.taylor import Taylor
from pp_lightning.gradients import frozen_except, next_token_loss, projections_of, recomputed
from pp_lightning.methods import LoRAPrune
from pp_lightning.plan import Amounts, make_plan
from pp_lightning.pruning import blocks_to_prune
from pp_lightning.recovery import Adapters, GradualPruning, lora_importances

SAMPLES, TOKENS, STEPS = 10, 64, 2


def model_and_batch() -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """The model, and random text."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=4,
        num_attention_heads=32,
        vocab_size=2000,
        max_position_embeddings=TOKENS,
    )
    return LlamaForCausalLM(config).eval(), {"input_ids": torch.randint(0, 2000, (SAMPLES, TOKENS))}


def evaluate(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        next_token_loss(model, batch)


def dense_backward(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> None:
    with frozen_except(model, list(projections_of(model).values())), recomputed(model):
        next_token_loss(model, batch).backward()


def taylor(variant: Taylor) -> Callable[[PreTrainedModel, dict[str, torch.Tensor]], None]:
    return lambda model, batch: (taylor_importances(model, [batch], variant, progress=False), None)[1]


def lora_one_shot(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> None:
    lora_importances(model, [batch], progress=False)


def train(model: PreTrainedModel, batch: dict[str, torch.Tensor], *, gradual: bool) -> None:
    method = LoRAPrune(every=1, warmup=0.0, cooldown=0.4)
    plan = make_plan(shape_of(model.config), method, Amounts(pruning_ratio=0.4, skip_layers=()))
    blocks = blocks_to_prune(model, plan)
    adapters = Adapters(model, rank=8, alpha=16)
    pruning = GradualPruning(adapters, blocks, method, STEPS) if gradual else None
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-4)
    with frozen_except(model, adapters.parameters()), recomputed(model):
        for step in range(1, STEPS + 1):
            next_token_loss(model, batch).backward()
            if pruning is not None:
                pruning.after_gradients(step)
            optimizer.step()
            optimizer.zero_grad()


VARIANTS: dict[str, Callable[[PreTrainedModel, dict[str, torch.Tensor]], None]] = {
    "evaluation": evaluate,
    "dense backward": dense_backward,
    **{f"LLM-Pruner, {variant.value}": taylor(variant) for variant in Taylor},
    "LoRAPrune, one choice": lora_one_shot,
    "LoRA fine-tuning": lambda model, batch: train(model, batch, gradual=False),
    "LoRAPrune while training": lambda model, batch: train(model, batch, gradual=True),
}


def main() -> None:
    if len(sys.argv) > 1:
        VARIANTS[sys.argv[1]](*model_and_batch())
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    parameters = sum(p.numel() for p in projections_of(LlamaForCausalLM(model_and_batch()[0].config)).values())
    print(f"one gradient of all projections: {4 * parameters / 2**20:.0f} MB; torch {torch.__version__}")
    base = 0.0
    for name in VARIANTS:
        found = subprocess.run([sys.executable, __file__, name], check=True, capture_output=True, text=True)
        peak = float(found.stdout.split()[-1])
        base = base or peak
        print(f"{name:28} {peak:6.0f} MB  {peak - base:+6.0f}", flush=True)


if __name__ == "__main__":
    main()
