"""A choice per batch, made once for good."""

import pytest
import torch

from pp_lightning import UserError, kept_units, prune_, unprune_
from pp_lightning.freezing import choice_for
from pp_lightning.methods import FLAP, FullBatchProbing, ProbePruning, StaticPPsp, WandaSP
from pp_lightning.methods.frozen import FrozenOnHistory
from pp_lightning.pruning import frozen_history
from tests.models import MODELS, SETTINGS, choices, histories, ids, logits, ragged, run_frozen, statistics, tiny


def frozen(name, method, batch):
    """The dynamic model, and one that keeps for good what it kept for the batch."""
    dynamic, static = tiny(name), tiny(name)
    prune_(dynamic, method, statistics(name), **SETTINGS)
    prune_(static, choice_for(dynamic, batch), **SETTINGS)
    return dynamic, static


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", [ProbePruning(row_ratio=0.5), FullBatchProbing()], ids=["pp", "full_batch"])
def test_same_logits_as_the_dynamic_model_on_its_text(name, method):
    text = ids()
    dynamic, static = frozen(name, method, {"input_ids": text})
    torch.testing.assert_close(logits(static, text), run_frozen(dynamic, text), rtol=0, atol=1e-5)
    assert choices(kept_units(static)) == choices(kept_units(dynamic))
    other = ids(seed=9)
    assert not torch.allclose(
        logits(static, other), run_frozen(dynamic, other), atol=1e-4
    )  # there it would choose anew


def test_padding_is_left_out():
    batch = ragged([24, 10, 17, 5], "left")
    dynamic, _ = frozen("llama", ProbePruning(row_ratio=0.5), batch)
    with frozen_history(dynamic):
        logits(dynamic, batch["input_ids"], attention_mask=batch["attention_mask"])
    expected = choices(kept_units(dynamic))
    dynamic, static = frozen("llama", ProbePruning(row_ratio=0.5), batch)
    assert choices(kept_units(static)) == expected


def test_choosing_leaves_the_history_alone():
    model = tiny("llama")
    prune_(model, ProbePruning(), statistics("llama"), **SETTINGS)
    before = histories(model)
    choice_for(model, {"input_ids": ids()})
    assert all(torch.equal(before[key], after) for key, after in histories(model).items())


def test_the_choice_belongs_to_its_ratios():
    model = tiny("llama")
    prune_(model, ProbePruning(), statistics("llama"), **SETTINGS)
    method = choice_for(model, {"input_ids": ids()})
    unprune_(model)
    before = logits(model, ids())
    for change in ({"pruning_ratio": 0.2}, {"skip_layers": ()}):
        with pytest.raises(UserError, match="ratios it was made with"):
            prune_(model, method, **{**SETTINGS, **change})
        assert torch.equal(logits(model, ids()), before)


def test_only_a_dynamic_choice_is_frozen():
    model = tiny("llama")
    prune_(model, WandaSP(), statistics("llama"), **SETTINGS)
    with pytest.raises(UserError, match="for good"):
        choice_for(model, {"input_ids": ids()})


@pytest.mark.parametrize("name", ["llama", "llama_gqa", "opt"])
def test_frozen_on_the_history_is_static_ppsp(name):
    history, static = tiny(name), tiny(name)
    prune_(history, FrozenOnHistory(ProbePruning()), statistics(name), **SETTINGS)
    prune_(static, StaticPPsp(), statistics(name), **SETTINGS)
    assert choices(kept_units(history)) == choices(kept_units(static))


def test_frozen_on_the_history_is_what_the_method_keeps_without_its_probe():
    """Probe Pruning with all weight on the history and all positions in the probe, whatever the batch."""
    dynamic, static = tiny("llama"), tiny("llama")
    stats = statistics("llama")
    method = ProbePruning(token_ratio=1.0, fusion_weight=0.0)
    prune_(static, FrozenOnHistory(method), statistics("llama"), **SETTINGS)
    prune_(dynamic, method, stats, **SETTINGS)
    run_frozen(dynamic, ids(tokens=stats.num_positions))
    assert choices(kept_units(dynamic)) == choices(kept_units(static))
    assert static.state_dict().keys() == tiny("llama").state_dict().keys()


def test_without_a_history_there_is_nothing_to_freeze_on():
    with pytest.raises(UserError, match="keeps no history"):
        FrozenOnHistory(FullBatchProbing())


def test_what_a_batch_alone_can_tell_is_not_frozen():
    with pytest.raises(UserError, match="compensation"):
        FrozenOnHistory(ProbePruning(compensation="probe"))
    with pytest.raises(UserError, match="about the mean"):
        FrozenOnHistory(ProbePruning(score="centered"))


@pytest.mark.parametrize("method", [FLAP(), ProbePruning(allocation="global"), WandaSP()])
def test_uniform_counts(method):
    uniform = method.with_uniform_counts()
    assert not uniform.allocates and uniform.allocation == "uniform"
    assert uniform.with_uniform_counts() is uniform
    assert type(uniform) is type(method)


def test_settings_name_their_origin():
    settings = FrozenOnHistory(ProbePruning(row_ratio=0.25)).settings()
    assert settings["row_ratio"] == 0.25 and settings["frozen_on"] == "history"
