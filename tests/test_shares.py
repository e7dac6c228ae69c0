"""Models that transformers spread over two processes: each prunes among its own heads and channels.

What must come out is computed in one process: the same model, where each half of the units is chosen among itself.
"""

import os
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing import spawn
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, PreTrainedModel, Qwen2Config
from transformers.distributed import DistributedConfig

from pp_lightning import allocation, calibrate, kept_units, prune_, pruning, unprune_
from pp_lightning.blocks import Block
from pp_lightning.compilation import compile_
from pp_lightning.functional.scores import standardised, sum_over_units
from pp_lightning.functional.selection import keep_best, unit_channels
from pp_lightning.methods import FLAP, LLMPruner, ProbePruning, StaticBest, StaticPPsp, WandaSP
from pp_lightning.methods.base import StaticChoice
from pp_lightning.methods.dynamic import ProbeObservation
from pp_lightning.methods.ranking import ranked_counts
from pp_lightning.parallel import own_part
from pp_lightning.pruning import is_pruned, pruning_of
from pp_lightning.updating import LeastSquares
from tests.models import refusals

pytestmark = pytest.mark.slow

PROCESSES = 2
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, num_key_value_heads=16),
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=8),  # groups, and biases in query, key and value
    "gemma3": Gemma3TextConfig(**SIZES, num_key_value_heads=8, sliding_window=16, attn_implementation="eager"),
}
METHODS = {
    "wanda_sp": WandaSP(),
    "ppsp": StaticPPsp(),
    "flap": FLAP(),
    "global": WandaSP(),
    "outliers": WandaSP(),
    "pp": ProbePruning(),
    "best": ProbePruning.best(),
    "generation": ProbePruning.best(generation=True),
    "heads": ProbePruning(attention_unit="query_head"),
}
CASES = [("llama", name) for name in METHODS]
CASES += [("qwen2", name) for name in ("flap", "best", "heads")] + [("gemma3", name) for name in ("flap", "pp")]
ALLOCATIONS: dict[str, Any] = {"global": "global", "outliers": "outliers"}
RATIO: dict[str, Any] = {"pruning_ratio": 0.4, "skip_layers": [0]}


def batches() -> list[dict[str, Tensor]]:
    """Of calibration, and then of evaluation: the last one is padded."""
    generator = torch.Generator().manual_seed(1)
    found = [{"input_ids": torch.randint(1, 96, (4, 24), generator=generator)} for _ in range(5)]
    mask = torch.ones(4, 24, dtype=torch.long)
    mask[0, :5] = 0
    found[-1]["attention_mask"] = mask
    return found


def what_comes_out(model: PreTrainedModel) -> dict[str, Tensor]:
    """Logits of batches in a row, what was kept for the last, and tokens that are generated."""
    found = {}
    with torch.no_grad():
        for number, batch in enumerate(batches()[2:]):
            found[f"logits.{number}"] = model(**batch).logits
        if is_pruned(model):
            numbers = {plan.block: plan.units.number for plan in pruning_of(model).plan.blocks}
            for layer, units in kept_units(model).items():
                for block in Block:
                    found[f"kept.{layer}.{block}"] = getattr(units, block)
                    found[f"number.{layer}.{block}"] = torch.tensor(numbers[block])
        found["tokens"] = model.generate(
            batches()[0]["input_ids"], max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0
        )
    return found


def shared(folder: str | Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        folder, distributed_config=DistributedConfig(tp_plan="auto", tp_size=PROCESSES)
    ).eval()


def _in_one_of_two(rank: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(PROCESSES)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/m", rank=rank, world_size=PROCESSES)
    found: dict[str, Any] = {}
    for kind in CONFIGS:
        model = shared(folder / kind)
        weights = list(model.parameters())
        found[f"{kind}.dense"] = what_comes_out(model)
        stats = calibrate(model, batches()[:2])
        for name in [name for one, name in CASES if one == kind]:
            prune_(model, METHODS[name], stats, **RATIO, round_to=8, allocation=ALLOCATIONS.get(name))
            found[f"{kind}.{name}"] = what_comes_out(model)
            unprune_(model)
        found[f"{kind}.again"] = what_comes_out(model)
        found[f"{kind}.same"] = all(
            type(new) is type(old) and torch.equal(own_part(new), own_part(old))
            for new, old in zip(model.parameters(), weights, strict=True)
        )
    found["refused"] = refused(model, stats, shared(folder / "uneven"))
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def refused(model: PreTrainedModel, stats: Any, uneven: PreTrainedModel) -> list[str]:
    """What is said about that which one process cannot do alone."""
    update = LeastSquares(batches()[:2])
    asked = [
        lambda: prune_(model, StaticBest(), stats, **RATIO, update=update),
        lambda: prune_(model, LLMPruner(), stats, **RATIO),
        lambda: compile_(model),
    ]
    said = refusals(asked)
    prune_(model, WandaSP(), stats, **RATIO, round_to=8)
    return said + refusals([lambda: model(**batches()[0]), lambda: calibrate(uneven, batches()[:2])])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints, and what came out of them in both processes."""
    place = tmp_path_factory.mktemp("shares")
    for name, config in {**CONFIGS, "uneven": LlamaConfig(**{**SIZES, "intermediate_size": 127})}.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for weight in model.parameters():  # biases and norms too
            torch.nn.init.normal_(weight, float(weight.dim() == 1), 0.2)
        model.save_pretrained(place / name)
    spawn(_in_one_of_two, (place,), nprocs=PROCESSES)
    return place


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


def halves(scores: Tensor) -> Tensor:
    """Scores (U,) by which the best of all are equally many of each half: a unit's place within its half."""
    return torch.cat([half.argsort().argsort().float() for half in scores.chunk(PROCESSES)])


def by_halves(method: Any) -> Any:
    """The method, where each half of the units is chosen among itself."""

    class ByHalves(type(method)):
        def unit_scores(self, *arguments: Any) -> Tensor:
            return halves(super().unit_scores(*arguments))

        def observe(self, states: Tensor, probe: Any, places: Any, history: Any, mean: Any) -> ProbeObservation:
            parts = [
                super(ByHalves, self).observe(own, probe, places, *past)
                for own, *past in zip(states.chunk(2, -1), *(chunks(one) for one in (history, mean)), strict=True)
            ]
            restored = None if parts[0].restored is None else torch.cat([one.restored for one in parts])
            return ProbeObservation(torch.cat([one.energy for one in parts]), restored)

    found = copy(method)
    found.__class__ = ByHalves
    return found


def chunks(whole: Tensor | None) -> Any:
    return [None] * PROCESSES if whole is None else whole.chunk(PROCESSES, -1)


class FlapByHalves(FLAP):
    """Standardised in each half; counts by the mean of what is k-th best in both."""

    def choose(self, blocks: Any, calibration_data: Any) -> Any:
        halved, together, scores = [], [], []
        for block in blocks:
            units = replace(block.units, number=block.units.number // PROCESSES)
            halved.append(replace(block, plan=replace(block.plan, units=units, round_to=block.plan.round_to // 2)))
            columns = calibration_data.variance(*block.key) * block.weight.float().square().sum(0)
            if block.plan.block is Block.ATTENTION:
                columns = columns.square()
            width = block.units.channels
            scores.append([sum_over_units(standardised(half), width) / width for half in columns.chunk(PROCESSES)])
            together.append(torch.stack([half.sort().values for half in scores[-1]]).mean(0))
        for block, own, count in zip(blocks, scores, ranked_counts(halved, together), strict=True):
            kept = torch.cat([keep_best(half, count) + i * len(half) for i, half in enumerate(own)])
            stays = unit_channels(kept, block.units.channels)
            goes = calibration_data.channel_moments(*block.key)[0].index_fill(0, stays, 0.0)
            yield block, StaticChoice(kept, block.weight.detach().float() @ goes)


def counted_in_pairs(losses: Tensor) -> Tensor:
    """What units of both halves are counted by: the mean of what is k-th best in both, once for each."""
    if losses.numel() == 1:  # a share of outliers, see below
        return losses
    return torch.stack([half.sort().values for half in losses.chunk(PROCESSES)]).mean(0).repeat_interleave(PROCESSES)


def mean_of_halves(share: Any, energies: Tensor) -> float:
    """The share of outliers, each among the channels of its half."""
    return sum(share(half) for half in energies.chunk(PROCESSES)) / PROCESSES


@pytest.fixture(scope="module")
def dense(folder: Path) -> dict[str, PreTrainedModel]:
    return {name: AutoModelForCausalLM.from_pretrained(folder / name).eval() for name in CONFIGS}


def close(found: Tensor, expected: Tensor) -> None:
    # sums over two processes are rounded in another order than one product
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_shared_dense_model_is_the_dense_model(kind, ranks, dense):
    expected = what_comes_out(dense[kind])
    for rank in ranks:
        assert rank[f"{kind}.same"]
        for name, value in expected.items():
            close(rank[f"{kind}.dense"][name], value)
            assert torch.equal(rank[f"{kind}.again"][name], rank[f"{kind}.dense"][name])


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_each_process_chooses_among_its_own(kind, name, ranks, dense, monkeypatch):
    monkeypatch.setattr(pruning, "spread", partial(counting_together, pruning.spread))
    monkeypatch.setattr(allocation, "outlier_share", partial(mean_of_halves, allocation.outlier_share))
    method = FlapByHalves() if name == "flap" else by_halves(METHODS[name])
    expected = pruned(dense[kind], method, name)
    for key, value in expected.items():
        if key.startswith("kept"):
            assert len({len(rank[f"{kind}.{name}"][key]) for rank in ranks}) == 1
            assert torch.equal(chosen_together(ranks, f"{kind}.{name}", key), value)
        elif not key.startswith("number"):
            for rank in ranks:
                close(rank[f"{kind}.{name}"][key], value)


@pytest.mark.parametrize("name", METHODS)
def test_it_is_not_what_one_process_chooses(name, ranks, dense):
    """Otherwise nothing above would show that each half is chosen among itself."""
    expected = pruned(dense["llama"], METHODS[name], name)
    kept = [key for key in expected if key.startswith("kept")]
    assert any(not torch.equal(chosen_together(ranks, f"llama.{name}", key), expected[key]) for key in kept)


def test_what_needs_whole_blocks_is_refused_in_one_line(ranks):
    needs = [
        "with an update",
        "importances of whole blocks",
        "a compiled layer needs all of them",
        "no gradients",
        "evenly",
    ]
    for rank in ranks:
        assert len(rank["refused"]) == len(needs)
        for said, part in zip(rank["refused"], needs, strict=True):
            assert part in said and "\n" not in said


def chosen_together(ranks: list[dict[str, Any]], case: str, key: str) -> Tensor:
    """What both processes keep, by the numbers that units have in the whole model."""
    numbers = [int(rank[case][key.replace("kept", "number")]) for rank in ranks]
    return torch.cat(
        [rank[case][key] + i * number for i, (rank, number) in enumerate(zip(ranks, numbers, strict=True))]
    )


def pruned(model: PreTrainedModel, method: Any, name: str) -> dict[str, Tensor]:
    stats = calibrate(model, batches()[:2])
    prune_(
        model,
        method,
        stats,
        **RATIO,
        round_to=8 * PROCESSES,
        tensor_parallel=PROCESSES,
        allocation=ALLOCATIONS.get(name),
    )
    try:
        return what_comes_out(model)
    finally:
        unprune_(model)


def counting_together(spread: Any, *arguments: Any, over: Any, **more: Any) -> Any:
    assert over is None, "one process counts by its own scores"
    return spread(*arguments, over=counted_in_pairs, **more)
