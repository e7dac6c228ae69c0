"""Models whose layers' weights two processes hold by halves (FSDP2): pruned and run, they are what one process runs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing import spawn

from pp_lightning import calibrate, prune_, unprune_
from pp_lightning.compilation import compile_
from pp_lightning.export import export_checkpoint
from pp_lightning.gradients import taylor_importances
from pp_lightning.methods import FLAP, ProbePruning, WandaSP
from pp_lightning.parallel import is_spread
from pp_lightning.sharding import shard_
from tests.models import SETTINGS, calibration_batches, ids, padded, refusals, tiny

KINDS = ("llama_gqa", "opt")
DYNAMIC = {
    "pp": ProbePruning(),
    "best": ProbePruning.best(generation=True),
    "ahead": ProbePruning(probe_source="previous"),
}
STATIC = {"flap": FLAP(), "wanda_sp": WandaSP()}


def what_comes_out(model: Any) -> dict[str, Tensor]:
    batches = [{"input_ids": ids(seed=1)}, padded(ids(seed=2), left=3), {"input_ids": ids(seed=3)}]
    with torch.no_grad():
        found = {f"logits.{number}": model(**batch).logits for number, batch in enumerate(batches)}
        found["tokens"] = model.generate(
            ids(seed=4), max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0
        )
    return found


def all_of_it(kind: str, shard: Any) -> dict[str, dict[str, Tensor]]:
    """What comes out of a dense and of pruned models, where ``shard`` spreads them as it likes."""
    found = {}
    model = tiny(kind)
    shard(model)
    found["dense"] = what_comes_out(model)
    stats = calibrate(model, calibration_batches())
    for name, method in DYNAMIC.items():
        prune_(model, method, stats, **SETTINGS)
        found[name] = what_comes_out(model)
        unprune_(model)
    found["again"] = what_comes_out(model)
    for name, method in STATIC.items():
        model = tiny(kind)
        prune_(model, method, stats, **SETTINGS)
        shard(model)
        found[name] = what_comes_out(model)
    return found


def _in_one_of_two(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found = {kind: all_of_it(kind, shard_) for kind in KINDS}
    torch.save((found, refused()), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def refused() -> list[str]:
    model = tiny("llama_gqa")
    shard_(model)
    assert all(is_spread(weight) for weight in model.model.layers.parameters())
    stats = calibrate(model, calibration_batches())
    pruned = tiny("llama_gqa")
    prune_(pruned, ProbePruning(), stats, **SETTINGS)
    asked = [
        lambda: shard_(model),
        lambda: shard_(pruned),
        lambda: compile_(model),
        lambda: taylor_importances(model, calibration_batches()),
        lambda: export_checkpoint(model, Path("nowhere")),
        lambda: prune_(model, FLAP(), stats, **SETTINGS),
    ]
    return refusals(asked)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("sharding")
    spawn(_in_one_of_two, (folder,), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_sharded_weights_change_nothing(kind, ranks):
    expected = all_of_it(kind, lambda model: None)
    for found, _ in ranks:
        for name, outputs in expected.items():
            for key, value in outputs.items():
                torch.testing.assert_close(found[kind][name][key], value, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected["pp"]["logits.0"], expected["dense"]["logits.0"], rtol=1e-2)


@pytest.mark.slow
def test_what_cannot_be_sharded_is_refused_in_one_line(ranks):
    parts = [
        "sharded already",
        "shard_ the model first",
        "a compiled layer needs all of them",
        "a gradient needs all of them",
        "an export needs",
        "before it is sharded",
    ]
    for _, refused in ranks:
        assert [part in said for part, said in zip(parts, refused, strict=True)] == [True] * len(parts)
