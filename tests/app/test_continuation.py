"""Protocol ``continuation``: a prompt chooses, what follows is scored under its choice."""

import json
import math

import pytest
import torch

from pp_lightning import kept_units, prune_
from pp_lightning.continuation import continued_logits, pieces
from pp_lightning.data import LanguageModelling
from pp_lightning.errors import UserError
from pp_lightning.families import shape_of
from pp_lightning.flops import continued_flops, dense_flops, prompt_flops
from pp_lightning.methods import FLAP, FullBatchProbing, Griffin, ProbePruning, WandaSP
from pp_lightning.prefill import BreakEven, break_even_file
from pp_lightning.pruning import pruning_of
from tests.app.conftest import tokenizer
from tests.app.test_cli import refused
from tests.models import SETTINGS, choices, ids, logits, ragged, statistics, tiny

PREFIX = 9
DYNAMIC = {
    "paper": ProbePruning,
    "best": ProbePruning.best,
    "generation": lambda: ProbePruning.best(generation=True),
    "full_batch": FullBatchProbing,
    "griffin": Griffin,
}


def pruned(name, method, **settings):
    model = tiny(name)
    model.generation_config.eos_token_id = None
    prune_(model, method(), statistics(name), **SETTINGS, **settings)
    return model


@torch.no_grad()
def scored(model, text, mask=None):
    return continued_logits(model, text, mask, PREFIX)


@pytest.mark.parametrize("name", ["llama_gqa", "mistral", "opt"])
@pytest.mark.parametrize("method", [None, WandaSP, FLAP])
def test_without_a_choice_per_batch_it_is_the_plain_figure(name, method):
    model = tiny(name) if method is None else pruned(name, method)
    batch = ragged([24, 17, 20], "right")
    found = scored(model, batch["input_ids"], batch["attention_mask"])
    plain = logits(model, batch["input_ids"], attention_mask=batch["attention_mask"])[:, PREFIX - 1 :]
    real = batch["attention_mask"][:, PREFIX - 1 :].bool()
    torch.testing.assert_close(found[real], plain[real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama_gqa", "opt"])
@pytest.mark.parametrize("method", DYNAMIC)
def test_a_choice_does_not_see_what_follows_the_prompt(name, method):
    text, other = ids(), ids(seed=3)
    other[:, :PREFIX] = text[:, :PREFIX]
    kept = []
    for one in (text, other):
        model = pruned(name, DYNAMIC[method])
        first = scored(model, one)[:, 0]
        kept.append((choices(kept_units(model)), first))
    assert kept[0][0] == kept[1][0] and torch.equal(kept[0][1], kept[1][1])
    whole = []
    for one in (text, other):  # the control: where all of a window chooses, it does see it
        model = pruned(name, DYNAMIC[method])
        logits(model, one)
        whole.append(choices(kept_units(model)))
    assert whole[0] != whole[1]


@pytest.mark.parametrize("name", ["llama_gqa", "gemma3_text", "opt"])
@pytest.mark.parametrize("prefill", ["probe", "dense"])
@pytest.mark.parametrize("refresh", [None, 3])
def test_generated_text_is_scored_as_it_was_made(name, prefill, refresh):
    for method in (ProbePruning, ProbePruning.best, FullBatchProbing):
        model, judge = (pruned(name, method, prefill=prefill, refresh=refresh) for _ in range(2))
        made = model.generate(
            ids()[:2, :PREFIX],
            max_new_tokens=11,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        seen = torch.stack(made.logits, 1).log_softmax(-1)
        found = scored(judge, made.sequences)[:, :-1].log_softmax(-1)
        torch.testing.assert_close(found, seen, rtol=1e-4, atol=1e-4)
        new = made.sequences[:, PREFIX:, None]
        assert seen.gather(2, new).sum().item() == pytest.approx(found.gather(2, new).sum().item(), abs=1e-3)


def test_pieces_cover_what_follows():
    assert pieces(10, 4, 10) == [(0, 4), (4, 10)]
    assert pieces(10, 4, 4) == [(0, 4), (4, 8), (8, 10)]


@pytest.mark.parametrize("name", ["llama", "llama_gqa", "opt"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_flops_of_the_parts_add_up(name, tokens):
    shape = shape_of(tiny(name).config)
    whole = dense_flops(shape, 3, 8 + tokens)
    both = dense_flops(shape, 3, 8) + continued_flops(shape, None, 3, 8, tokens)
    # attention of the prompt does not look at what follows: two products of 8 x tokens fewer in each layer
    products = 2 * 2 * 3 * shape.num_heads * 8 * tokens * shape.head_size
    assert both.vocabulary == whole.vocabulary
    assert whole.layers - both.layers == products * shape.num_layers
    model = pruned(name, ProbePruning, prefill="dense")
    assert prompt_flops(shape, pruning_of(model), 3, 8).blocks == dense_flops(shape, 3, 8).blocks
    behind = continued_flops(shape, pruning_of(model), 3, 8, tokens)
    assert sum(behind.blocks.values()) < sum(continued_flops(shape, None, 3, 8, tokens).blocks.values())
    assert behind.probe == 0


class TestCommandLine:
    def rows(self, folder):
        return {row["method"]: row for row in json.loads((folder / "results.json").read_text())["rows"]}

    @pytest.mark.slow
    def test_compare(self, type_in, arguments, tmp_path):
        options = {**arguments, "--data.protocol": "continuation", "--data.prefix": 20}
        extra = ["--methods", "[pp,best_generation,griffin,flap]", "--ratios", "[0.4]", "--seeds", "[0,1]"]
        assert type_in("compare", options, extra=[*extra, "--out", tmp_path]) == 0
        rows = self.rows(tmp_path)
        assert list(rows) == ["dense", "pp", "best_generation", "griffin", "flap"]
        for row in rows.values():
            first, second = row["perplexities"]
            assert row["perplexity"] == pytest.approx((first + second) / 2)
            assert row["perplexity_error"] == pytest.approx(abs(first - second) / 2)
        assert rows["dense"]["perplexity_error"] == 0 < rows["flap"]["perplexity_error"]
        assert rows["dense"]["flops_ratio_after_prompt"] == 1.0
        assert rows["best_generation"]["flops_ratio"] > rows["best_generation"]["flops_ratio_after_prompt"]
        text = (tmp_path / "results.md").read_text()
        assert "continuation (prompts of 20 tokens choose" in text and "±" in text and "after the prompt" in text
        data = json.loads((tmp_path / "results.json").read_text())["data"]
        assert (data["protocol"], data["prefix"]) == ("continuation", 20)

    def test_static_methods_have_the_plain_figure_of_the_same_tokens(self, type_in, arguments, tmp_path, place):
        given = {**arguments, "--data.protocol": "continuation"}
        extra = ["--methods", "[flap]", "--ratios", "[0.4]", "--out", tmp_path]
        assert type_in("compare", given, extra=extra) == 0
        found = self.rows(tmp_path)
        data = LanguageModelling(
            text=_text(place / "text.txt"), window=32, batch_size=4, protocol="continuation", calibration_samples=8
        )
        model, tokenizer = _loaded(place / "model")
        data.use_tokenizer(tokenizer)
        nll = tokens = 0
        for batch in data.test_batches():
            out = logits(model, batch["input_ids"], attention_mask=batch["attention_mask"])
            chances = out[:, :-1].double().log_softmax(-1)
            for row, labels in zip(chances, batch["labels"][:, 1:], strict=True):
                for place_, label in enumerate(labels.tolist()):
                    if label >= 0:
                        assert place_ + 1 >= 16
                        nll, tokens = nll - row[place_, label].item(), tokens + 1
        assert found["dense"]["tokens"] == tokens
        assert found["dense"]["perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-5)

    @pytest.mark.parametrize(("prefill", "dense"), [("dense", True), (4 * 16, False), (4 * 16 + 1, True)])
    def test_test(self, prefill, dense, type_in, arguments, tmp_path):
        given = {**arguments, "--data.protocol": "continuation", "--model.method": "ProbePruning"}
        assert type_in("test", given, extra=["--model.prefill", prefill, "--out", tmp_path]) == 0
        found = self.rows(tmp_path)["pp"]
        assert found["flops_ratio_after_prompt"] < 0.9
        assert (found["probe_share"] == 0) == dense

    @pytest.mark.parametrize(("tokens", "dense"), [(4 * 16, False), (4 * 16 + 1, True), (None, True)])
    def test_auto_takes_what_was_measured(self, tokens, dense, type_in, arguments, tmp_path):
        file = tmp_path / "stats.safetensors"
        found = BreakEven(tokens, {}, 0.4, "float32", {})
        break_even_file(file).write_text(json.dumps(found.as_dict()))
        given = {**arguments, "--data.protocol": "continuation", "--model.method": "ProbePruning"}
        extra = ["--model.prefill", "auto", "--model.statistics", file, "--out", tmp_path / "out"]
        assert type_in("test", given, extra=extra) == 0
        assert (self.rows(tmp_path / "out")["pp"]["probe_share"] == 0) == dense

    @pytest.mark.slow
    def test_choosing_again_has_its_price(self, type_in, arguments, tmp_path):
        given = {**arguments, "--data.protocol": "continuation", "--model.method": "ProbePruning"}
        for refresh in (16, 4):  # of 16 tokens that are scored: nothing is chosen again behind the last one
            extra = ["--model.refresh", refresh, "--out", tmp_path / str(refresh)]
            assert type_in("test", given, extra=extra) == 0
        held, again = (self.rows(tmp_path / str(refresh))["pp"] for refresh in (16, 4))
        assert held["flops_ratio_after_prompt"] < again["flops_ratio_after_prompt"]
        assert held["perplexity"] != again["perplexity"]

    @pytest.mark.slow
    @pytest.mark.parametrize(("study", "number"), [("rows", 4 + 2 * 4), ("refresh", 1 + 4)])
    def test_studies(self, study, number, type_in, arguments, tmp_path):
        given = {**arguments, "--data.protocol": "continuation", "--data.prefix": 8}
        assert type_in("compare", given, extra=["--study", study, "--ratios", "[0.4]", "--out", tmp_path]) == 0
        rows = json.loads((tmp_path / "results.json").read_text())["rows"]
        assert len(rows) == number
        assert len({row["perplexity"] for row in rows if row["pruning_ratio"]}) > 1

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"--data.prefix": 8}, "prefix is for --data.protocol continuation"),
            ({"--data.protocol": "continuation", "--data.prefix": 32}, "must leave something of a window"),
            ({"--data.protocol": "continuation", "--model.prefill": -3}, "must not be negative"),
            ({"--model.method": "WandaSP", "--model.prefill": "dense"}, "WandaSP is static"),
            ({"--model.refresh": 0}, "at least 1"),
        ],
    )
    def test_mistakes_are_one_line(self, options, reason, type_in, arguments, tmp_path, capsys):
        given = {**arguments, "--model.method": "ProbePruning", **options}
        assert type_in("test", given, extra=["--out", tmp_path / "out"]) == 2
        assert reason in refused(capsys)

    @pytest.mark.parametrize("seeds", ["[]", "[1,1]"])
    def test_seeds_are_different_numbers(self, seeds, type_in, arguments, tmp_path, capsys):
        assert type_in("compare", arguments, extra=["--seeds", seeds, "--out", tmp_path]) == 2
        assert "seeds must be different numbers" in refused(capsys)


def test_a_text_that_is_shorter_than_a_prompt(tmp_path):
    (short := tmp_path / "short.txt").write_text("a few words")
    data = LanguageModelling(_text(short), window=32, protocol="continuation")
    data.use_tokenizer(tokenizer())
    with pytest.raises(UserError, match="needs more than 16"):
        data.test_batches()


def _text(path):
    from pp_lightning.data import TextFile

    return TextFile(str(path))


def _loaded(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder).float().eval(), AutoTokenizer.from_pretrained(folder)


@pytest.mark.slow
def test_break_even_is_measured_and_read(type_in, arguments, place, capfd, tmp_path):
    """``benchmark --calibrate-break-even`` writes beside the statistics what ``--model.prefill auto`` reads there."""
    file = tmp_path / "stats.safetensors"
    given = {**arguments, "--data.protocol": "continuation", "--model.method": "ProbePruning"}
    extra = ["--model.prefill", "auto", "--model.statistics", file]
    assert type_in("test", given, extra=[*extra, "--out", tmp_path / "before"]) == 0  # makes the statistics
    measured = {
        "--model.path": arguments["--model.path"],
        "--text": place / "text.txt",
        "--statistics": file,
        "--cases": '[{"rows": 2, "tokens": 16}]',
        "--dtypes": "[float32]",
        "--round_to": 16,
        "--repeats": 1,
        "--memory": "false",
        "--out": tmp_path / "benchmark",
    }
    assert not break_even_file(file).exists()
    assert type_in("benchmark", measured, extra=["--calibrate-break-even"]) == 0, capfd.readouterr().err
    found = BreakEven.load(break_even_file(file))
    assert sorted(map(int, found.seconds)) == [16, 32]
    break_even_file(file).write_text("{}")
    assert type_in("test", given, extra=[*extra, "--out", tmp_path / "after"]) == 2  # it is read
