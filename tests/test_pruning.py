"""prune_, unprune_ and what lies between: the promises of the library's own interface."""

import copy
import inspect

import pytest
import torch

from pp_lightning import KeptUnits, UserError, calibrate, frozen_history, kept_units, prune_, unprune_
from pp_lightning.blocks import Block
from pp_lightning.families import blocks_of
from pp_lightning.methods import FLAP, FullBatchProbing, ProbePruning, StaticPPsp, WandaSP
from pp_lightning.pruning import is_pruned, pruning_of
from tests.models import (
    GROUPED,
    GROUPS,
    HEADS,
    MODELS,
    PRUNED,
    SETTINGS,
    SKIPPED,
    TOKENS,
    assert_same_weights,
    assert_stock,
    calibration_batches,
    choices,
    histories,
    ids,
    logits,
    masked_dense,
    output_weights,
    pairs,
    plant,
    pruned,
    pruned_blocks,
    run_frozen,
    statistics,
    tiny,
)
from tests.recording import RecordingProbePruning

DYNAMIC = {
    "pp": ProbePruning,
    "pp_parallel": lambda: ProbePruning(probe_source="previous"),
    "full_batch": FullBatchProbing,
}
STATIC = {"ppsp": StaticPPsp, "wanda_sp": WandaSP, "flap": FLAP}
METHODS = {**DYNAMIC, **STATIC}


class TestUndo:
    @pytest.mark.parametrize(("name", "method"), pairs(MODELS, METHODS))
    def test_the_dense_model_again(self, name, method):
        model = pruned(name, METHODS[method])
        logits(model, ids())
        unprune_(model)
        assert_stock(model, tiny(name))

    def test_before_any_batch(self):
        model = pruned("llama", ProbePruning)
        unprune_(model)
        assert_stock(model, tiny("llama"))

    @pytest.mark.parametrize("method", METHODS)
    def test_prune_again_starts_afresh(self, method):
        model = pruned("llama", METHODS[method])
        first = logits(model, ids())
        unprune_(model)
        prune_(model, METHODS[method](), statistics("llama"), **SETTINGS)
        assert torch.equal(logits(model, ids()), first)

    @pytest.mark.parametrize("method", STATIC)
    def test_dense_weights_given_up(self, method):
        model = pruned("llama", STATIC[method], keep_dense=False)
        assert torch.equal(logits(model, ids()), logits(pruned("llama", STATIC[method]), ids()))
        with pytest.raises(UserError, match="given up with keep_dense=False: load the model again"):
            unprune_(model)

    def test_not_pruned(self):
        for ask in (unprune_, kept_units, pruning_of, lambda model: frozen_history(model).__enter__()):
            with pytest.raises(UserError, match="the model is not pruned: prune_ it first"):
                ask(tiny("llama"))

    @pytest.mark.parametrize("method", METHODS)
    def test_after_the_model_changed_its_dtype(self, method):
        model = pruned("llama", METHODS[method]).bfloat16()
        unprune_(model)
        assert_same_weights(model, tiny("llama").bfloat16())
        assert torch.equal(logits(model, ids()), logits(tiny("llama").bfloat16(), ids()))


class TestDynamicPruningChangesNoWeight:
    @pytest.mark.parametrize(("name", "method"), pairs(MODELS, DYNAMIC))
    def test_state_dict(self, name, method):
        dense, model = tiny(name), tiny(name)
        stats = calibrate(model, calibration_batches(), progress=False)
        prune_(model, DYNAMIC[method](), stats, **SETTINGS)
        logits(model, ids())
        assert_same_weights(model, dense)
        assert [n for n, _ in model.named_parameters()] == [n for n, _ in dense.named_parameters()]

    def test_class_and_call(self):
        dense, model = tiny("llama"), pruned("llama", ProbePruning)
        assert type(model) is type(dense)
        assert inspect.signature(model.forward) == inspect.signature(dense.forward)
        for layer, other in zip(model.model.layers, dense.model.layers, strict=True):
            assert type(layer) is type(other)

    def test_skipped_layers_are_untouched(self):
        dense = tiny("llama")
        model = copy.deepcopy(dense)
        before = list(model.model.layers)
        prune_(model, ProbePruning(), statistics("llama"), **SETTINGS)
        for index, layer in enumerate(model.model.layers):
            assert layer is before[index]
            assert "forward" not in vars(layer)
            assert any("pruner" in path for path, _ in layer.named_modules()) == (index in PRUNED)
        caught = {}
        for label, other in (("pruned", model), ("dense", dense)):
            other.model.layers[SKIPPED[-1]].register_forward_hook(
                lambda _, __, output, label=label: caught.__setitem__(label, output)
            )
            logits(other, ids())
        assert torch.equal(caught["pruned"], caught["dense"])

    def test_weights_changed_later_count(self):
        """Nothing of the weights is copied but the constant of the scores."""
        model = pruned("llama", ProbePruning, pruning_ratio=0.0)
        with torch.no_grad():
            model.model.layers[3].mlp.up_proj.weight.mul_(2)
        dense = tiny("llama")
        with torch.no_grad():
            dense.model.layers[3].mlp.up_proj.weight.mul_(2)
        torch.testing.assert_close(logits(model, ids()), logits(dense, ids()))

    def test_saved_and_loaded_it_is_the_dense_model(self, tmp_path):
        model = pruned("llama", ProbePruning)
        logits(model, ids())
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path)
        assert_same_weights(loaded, tiny("llama"))


class TestStaticPruning:
    @pytest.mark.parametrize("name", MODELS)
    def test_narrow_weights(self, name):
        model = pruned(name, WandaSP)
        for layer in range(5):
            attention, mlp = output_weights(model, layer)
            dense_attention, dense_mlp = output_weights(tiny(name), layer)
            kept = (2 / 4 if MODELS[name].grouped else 3 / 8) if layer in PRUNED else 1
            assert attention.shape == (64, int(dense_attention.shape[1] * kept))
            assert mlp.shape == (64, 64 if layer in PRUNED else dense_mlp.shape[1])
        assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in tiny(name).parameters())

    def test_the_forward_is_the_stock_one(self):
        model = pruned("llama", WandaSP)
        assert not any("forward" in vars(module) for module in model.modules())
        assert not any("pruner" in dict(module.named_children()) for module in model.modules())

    def test_kept_units_are_known_at_once_and_for_good(self):
        model = pruned("llama", WandaSP)
        first = choices(kept_units(model))
        assert tuple(first) == PRUNED
        logits(model, ids())
        assert choices(kept_units(model)) == first

    def test_kept_units_are_copies(self):
        model = pruned("llama", WandaSP)
        first = choices(kept_units(model))
        for units in kept_units(model).values():
            units.attention.zero_()
            units.mlp.zero_()
        assert choices(kept_units(model)) == first
        unprune_(model)
        assert_stock(model, tiny("llama"))

    def test_slices_are_made_once(self):
        model = pruned("llama", WandaSP)
        before = {name: weight.data_ptr() for name, weight in model.named_parameters()}
        logits(model, ids())
        assert {name: weight.data_ptr() for name, weight in model.named_parameters()} == before

    @pytest.mark.parametrize(("name", "method"), pairs(GROUPED, [StaticPPsp, WandaSP, FLAP]))
    def test_single_query_heads_of_grouped_ones(self, name, method):
        """They run on their own keys and values: the dense model with the other heads silenced."""
        model = tiny(name)
        settings = {"bias": False} if method is FLAP else {}
        prune_(model, method(attention_unit="query_head", **settings), statistics(name), **SETTINGS)
        found, kept = logits(model, ids()), kept_units(model)
        assert all(len(units.attention) % (HEADS // GROUPS) for units in kept.values()) or method is FLAP
        expected = logits(masked_dense(tiny(name), kept, HEADS), ids())
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        unprune_(model)
        assert_stock(model, tiny(name))

    def test_frozen_history_of_a_model_without_one(self):
        model = pruned("llama", WandaSP)
        with frozen_history(model):
            assert torch.equal(logits(model, ids()), logits(pruned("llama", WandaSP), ids()))


class TestKeptUnits:
    def test_before_the_first_batch(self):
        assert kept_units(pruned("llama", ProbePruning)) == {}

    @pytest.mark.parametrize("method", METHODS)
    def test_ascending_and_counted(self, method):
        model = pruned("llama", METHODS[method])
        logits(model, ids())
        kept = kept_units(model)
        assert tuple(kept) == PRUNED
        for layer, units in kept.items():
            assert isinstance(units, KeptUnits)
            for block, found, number in (("attention", units.attention, 8), ("mlp", units.mlp, 160)):
                assert found.dtype == torch.int64
                assert found.tolist() == sorted(set(found.tolist()))
                assert found.min() >= 0 and found.max() < number
                assert pruning_of(model).keep[layer, Block(block)] == len(found)

    def test_a_report_does_not_change_with_the_next_batch(self):
        model = pruned("llama", ProbePruning)
        logits(model, ids(seed=1))
        first = kept_units(model)
        before = choices(first)
        logits(model, ids(seed=2))
        assert choices(first) == before
        assert choices(kept_units(model)) != before


class TestSettings:
    def test_separate_ratios(self):
        model = pruned("llama", ProbePruning, attention_ratio=0.2, mlp_ratio=0.5)
        logits(model, ids())
        for units in kept_units(model).values():
            assert (len(units.attention), len(units.mlp)) == (6, 32)  # r' = 0.33 and 0.83

    @pytest.mark.parametrize("method", [ProbePruning, FullBatchProbing, WandaSP, StaticPPsp, FLAP])
    @pytest.mark.parametrize("block", ["attention", "mlp"])
    def test_one_block_alone(self, method, block):
        model = pruned("llama", lambda: method(blocks=(block,)))
        found = logits(model, ids())
        for units in kept_units(model).values():
            whole, cut = (units.mlp, units.attention) if block == "attention" else (units.attention, units.mlp)
            assert whole.tolist() == list(range(160 if block == "attention" else 8))
            assert 0 < len(cut) < (8 if block == "attention" else 160)
        assert not torch.allclose(found, logits(tiny("llama"), ids()), atol=1e-3)

    def test_a_block_that_is_not_pruned_has_no_history(self):
        model = pruned("llama", lambda: ProbePruning(blocks=("mlp",)))
        assert {block for _, block in histories(model)} == {"mlp"}

    def test_every_layer(self):
        model = pruned("llama", ProbePruning, skip_layers=())
        logits(model, ids())
        assert tuple(kept_units(model)) == (0, 1, 2, 3, 4)

    def test_a_dense_layer_between_pruned_ones(self):
        for method in DYNAMIC.values():
            model = pruned("llama", method, skip_layers=(0, 3))
            assert torch.isfinite(logits(model, ids())).all()
            assert tuple(kept_units(model)) == (1, 2, 4)

    def test_statistics_of_the_pruned_layers_suffice(self):
        model = tiny("llama")
        stats = calibrate(model, calibration_batches(), layers=PRUNED, progress=False)
        prune_(model, ProbePruning(), stats, **SETTINGS)
        assert torch.equal(logits(model, ids()), logits(pruned("llama", ProbePruning), ids()))


class TestHistory:
    def test_starts_from_the_statistics(self):
        model, stats = pruned("llama", ProbePruning), statistics("llama")
        for (layer, block), history in histories(model).items():
            assert torch.equal(history, stats.second_moment(layer, Block(block)))

    def test_is_not_that_of_the_statistics(self):
        stats = statistics("llama")
        before = stats.sums[3, Block.MLP].squares.clone()
        model = tiny("llama")
        prune_(model, ProbePruning(momentum=0.5), stats, **SETTINGS)
        logits(model, ids())
        assert torch.equal(stats.sums[3, Block.MLP].squares, before)

    def test_follows_the_formula(self):
        """Kept channels move by 1 percent towards the pruned block's own second moment."""
        model = pruned("llama", ProbePruning)
        before = histories(model)
        states = {}
        down = blocks_of(model)[3, Block.MLP].projection("down_proj")
        down.register_forward_pre_hook(lambda _, inputs: states.setdefault(inputs[0].shape[1] < TOKENS, inputs[0]))
        logits(model, ids())
        kept = kept_units(model)[3].mlp
        moment = states[False].double().square().mean(0)
        expected = before[3, "mlp"].clone()
        expected[:24, kept] = (0.99 * expected[:24, kept].double() + 0.01 * moment).float()
        torch.testing.assert_close(histories(model)[3, "mlp"], expected, rtol=1e-6, atol=1e-8)
        assert not torch.equal(expected, before[3, "mlp"])

    def test_frozen(self):
        model, other = pruned("llama", ProbePruning), pruned("llama", ProbePruning)
        before = histories(model)
        with frozen_history(model):
            found = logits(model, ids())
            with frozen_history(model):  # nested
                logits(model, ids(seed=2))
            logits(model, ids(seed=2))
        assert all(torch.equal(history, before[key]) for key, history in histories(model).items())
        assert torch.equal(found, logits(other, ids()))
        logits(model, ids())
        assert all(not torch.equal(history, before[key]) for key, history in histories(model).items())

    def test_thaws_after_an_error(self):
        model = pruned("llama", ProbePruning)
        before = histories(model)
        with pytest.raises(ZeroDivisionError), frozen_history(model):
            raise ZeroDivisionError
        logits(model, ids())
        assert not torch.equal(histories(model)[3, "mlp"], before[3, "mlp"])

    def test_methods_without_history(self):
        assert histories(pruned("llama", FullBatchProbing)) == {}

    def test_full_batch_probing_needs_no_statistics(self):
        model = tiny("llama")
        prune_(model, FullBatchProbing(), **SETTINGS)
        assert torch.equal(logits(model, ids()), logits(pruned("llama", FullBatchProbing), ids()))

    @pytest.mark.parametrize("convert", [lambda m: m.to(torch.bfloat16), lambda m: m.bfloat16(), lambda m: m.half()])
    def test_stays_float32(self, convert):
        model, _ = plant(tiny("llama"))  # the same choice in any precision
        stats = calibrate(model, calibration_batches(), progress=False)
        method = RecordingProbePruning(1.0, 1.0)  # nothing to rank in a precision that may turn it
        prune_(model, method, stats, **SETTINGS)
        exact = logits(model, ids())
        first = method.taken(PRUNED)
        unprune_(model)
        prune_(model, method, stats, **SETTINGS)
        before = histories(model)
        convert(model)
        for block in pruned_blocks(model).values():
            assert block.history.dtype == block.weight_norm.dtype == torch.float32
        assert all(torch.equal(history, before[key]) for key, history in histories(model).items())
        found = logits(model, ids())
        assert found.dtype in (torch.bfloat16, torch.float16)
        assert (found.float() - exact).norm() / exact.norm() < 0.03
        for key, record in method.taken(PRUNED).items():
            assert record.scores.dtype == record.energy.dtype == torch.float32
            assert (record.scores - first[key].scores).norm() / first[key].scores.norm() < 0.05
        for key, history in histories(model).items():
            assert history.dtype == torch.float32
            assert not torch.equal(history, before[key])

    def test_released_statistics(self):
        model, stats = tiny("llama"), statistics("llama")
        prune_(model, ProbePruning(), stats, **SETTINGS, release_stats=True)
        assert {layer for layer, _ in stats.sums} == set(SKIPPED)
        assert torch.equal(logits(model, ids()), logits(pruned("llama", ProbePruning), ids()))
        unprune_(model)
        with pytest.raises(UserError, match="do not cover the attention block of layer 2"):
            prune_(model, ProbePruning(), stats, **SETTINGS)

    def test_statistics_are_kept_by_default(self):
        model, stats = tiny("llama"), statistics("llama")
        prune_(model, ProbePruning(), stats, **SETTINGS)
        assert {layer for layer, _ in stats.sums} == set(range(5))


class TestCopies:
    @pytest.mark.parametrize("method", METHODS)
    def test_a_copy_is_independent(self, method):
        model = pruned("llama", METHODS[method])
        expected = [logits(pruned("llama", METHODS[method]), ids(seed=s)) for s in (1,)]
        twin = copy.deepcopy(model)
        other = logits(twin, ids(seed=2))  # its history and its choice move
        assert not torch.allclose(other, expected[0], atol=1e-3)
        assert torch.equal(logits(model, ids(seed=1)), expected[0])
        unprune_(twin)
        assert_stock(twin, tiny("llama"))
        assert is_pruned(model)
        logits(model, ids(seed=1))

    @pytest.mark.parametrize("method", METHODS)
    def test_a_copy_gives_the_same(self, method):
        model = pruned("llama", METHODS[method])
        logits(model, ids(seed=3))
        twin = copy.deepcopy(model)
        assert choices(kept_units(twin)) == choices(kept_units(model))
        assert torch.equal(logits(twin, ids(seed=1)), logits(model, ids(seed=1)))
        assert choices(kept_units(twin)) == choices(kept_units(model))


class TestNegativeControls:
    @pytest.mark.parametrize(("name", "method"), pairs(MODELS, METHODS))
    def test_pruned_differs_from_dense(self, name, method):
        found, dense = logits(pruned(name, METHODS[method]), ids()), logits(tiny(name), ids())
        assert (found - dense).norm() / dense.norm() > 0.05

    @pytest.mark.parametrize(("name", "method"), pairs(MODELS, DYNAMIC))
    def test_another_text_another_choice(self, name, method):
        model = pruned(name, DYNAMIC[method])
        found = []
        for seed in (1, 2):
            run_frozen(model, ids(seed=seed))
            found.append(choices(kept_units(model)))
        assert found[0] != found[1]

    def test_parallel_probing_differs(self):
        current, previous = pruned("llama", ProbePruning), pruned("llama", DYNAMIC["pp_parallel"])
        assert not torch.allclose(logits(current, ids()), logits(previous, ids()), atol=1e-3)
        assert choices(kept_units(current)) != choices(kept_units(previous))

    def test_rank_by_differs(self):
        found = []
        for rank_by in ("residual", "input"):
            method = RecordingProbePruning(rank_by=rank_by)
            model = tiny("llama")
            prune_(model, method, statistics("llama"), **SETTINGS)
            logits(model, ids())
            found.append([r.probe.tokens.tolist() for r in method.records])
        assert found[0] != found[1]


class TestMistakes:
    @pytest.mark.parametrize("method", METHODS)
    def test_twice(self, method):
        model = pruned("llama", METHODS[method])
        with pytest.raises(UserError, match="the model is pruned already: unprune_ it first"):
            prune_(model, ProbePruning(), statistics("llama"), **SETTINGS)

    @pytest.mark.parametrize("method", [ProbePruning, StaticPPsp, WandaSP, FLAP])
    def test_without_statistics(self, method):
        model = tiny("llama")
        with pytest.raises(UserError, match=rf"{method.__name__} needs calibration statistics: pass the result of cal"):
            prune_(model, method(), **SETTINGS)
        assert_stock(model, tiny("llama"))

    @pytest.mark.parametrize("method", [ProbePruning, StaticPPsp, WandaSP, FLAP])
    def test_statistics_of_another_model(self, method):
        model = tiny("llama")
        with pytest.raises(UserError, match="collected on another model"):
            prune_(model, method(), statistics("llama_gqa"), **SETTINGS)
        assert_stock(model, tiny("llama"))

    @pytest.mark.parametrize("method", [ProbePruning, StaticPPsp, WandaSP, FLAP])
    def test_statistics_of_some_layers(self, method):
        model = tiny("llama")
        stats = calibrate(model, calibration_batches(), layers=(2, 3), progress=False)
        with pytest.raises(UserError, match="do not cover the attention block of layer 4"):
            prune_(model, method(), stats, **SETTINGS)
        assert_stock(model, tiny("llama"))  # layers 2 and 3 too

    def test_flap_needs_means(self):
        model = tiny("llama")
        stats = calibrate(model, calibration_batches(), means=False, progress=False)
        with pytest.raises(UserError, match="have no means, which this method needs"):
            prune_(model, FLAP(), stats, **SETTINGS)
        assert_stock(model, tiny("llama"))

    @pytest.mark.parametrize("keep_dense", [True, False])
    @pytest.mark.parametrize("method", METHODS)
    def test_weights_that_are_not_finite(self, method, keep_dense):
        def broken():
            model = tiny("llama")
            with torch.no_grad():
                model.model.layers[4].mlp.down_proj.weight[3, 5] = float("nan")
            return model

        model = broken()
        stats = calibrate(model, calibration_batches(), progress=False)
        with pytest.raises(UserError, match=r"mlp block of layer 4 .*not finite: check the checkpoint"):
            prune_(model, METHODS[method](), stats, **SETTINGS, keep_dense=keep_dense)
        assert not is_pruned(model)
        expected = broken().state_dict()
        assert all(torch.equal(w.nan_to_num(), expected[n].nan_to_num()) for n, w in model.state_dict().items())
        assert not any("forward" in vars(module) for module in model.modules())

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"pruning_ratio": 1.0}, r"must be in \[0, 1\)"),
            ({"pruning_ratio": 0.7}, "leaves no head in them"),
            ({"skip_layers": range(5)}, "leaves none of the 5 layers"),
            ({"skip_layers": (7,)}, "skip_layers names layer 7, but the model has layers 0 to 4"),
            ({"round_to": 0}, "round_to must be at least 1"),
        ],
    )
    @pytest.mark.parametrize("method", [ProbePruning, WandaSP])
    def test_settings_that_leave_nothing(self, method, settings, message):
        model = tiny("llama")
        with pytest.raises(UserError, match=message):
            prune_(model, method(), statistics("llama"), **{**SETTINGS, **settings})
        assert_stock(model, tiny("llama"))

    def test_an_error_is_a_value_error(self):
        assert issubclass(UserError, ValueError)
