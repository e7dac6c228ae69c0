"""The benchmark measures what it says. Speed itself is never asserted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pp_lightning import UserError
from pp_lightning.benchmark import BenchmarkSettings, Case, ModelChoice, run_benchmark
from pp_lightning.benchmark.model import BenchmarkModel
from pp_lightning.benchmark.rows import Row, grids, paired_ratio
from pp_lightning.benchmark.timing import interleaved
from pp_lightning.benchmark.variants import VARIANTS, chosen_variants, pruned_copy, reference_of
from pp_lightning.benchmark.write import write_results
from pp_lightning.checkpoints import EMBEDDED_MODEL
from pp_lightning.tables import comma_separated, markdown
from tests.models import SETTINGS, ids, logits, statistics, tiny


@pytest.fixture
def measured(small):
    settings = BenchmarkSettings(
        model=small,
        cases=[Case(4, 16), Case(1, 8)],
        variants=["PP", "static PPsp", "Full-Batch Probing", "PP, best()"],
        round_to=16,
        repeats=3,
        warmup=1,
        decode=[2],
        decode_tokens=2,
        memory=False,
        device="cpu",
    )
    compiled = {name for name in VARIANTS if name.endswith("compiled")}
    assert compiled
    return settings


def eager(monkeypatch):
    """Without the compiled dense row: compiling is tested elsewhere."""
    only = {name: variant for name, variant in VARIANTS.items() if not variant.compiled}
    monkeypatch.setattr("pp_lightning.benchmark.variants.VARIANTS", only)


def test_every_case_has_its_rows(measured, monkeypatch):
    eager(monkeypatch)
    rows = run_benchmark(measured, tell=lambda _: None)
    assert {(row.rows, row.tokens) for row in rows if row.part == "decoder"} == {(4, 16), (1, 8)}
    assert {row.part for row in rows} == {"decoder", "model", "attention block", "MLP block", "prompt", "decoding"}
    by = {(row.variant, row.part, row.rows, row.tokens): row for row in rows}
    for row in rows:
        assert 0 < row.fastest <= row.median <= row.slowest
        assert row.rounds == 3
        assert row.efficiency == pytest.approx(row.flops_ratio / row.time_ratio)
    dense, pruned = by["dense", "decoder", 4, 16], by["PP", "decoder", 4, 16]
    assert dense.flops_ratio == dense.time_ratio == 1.0
    assert dense.changed is None
    assert by["static PPsp", "decoder", 4, 16].flops_ratio < pruned.flops_ratio < 1.0
    assert 0.0 <= pruned.changed <= 1.0
    assert by["dense", "model", 4, 16].median > dense.median


def test_results_are_written_for_eyes_and_machines(measured, monkeypatch, tmp_path):
    eager(monkeypatch)
    measured.cases, measured.decode, measured.blocks = [Case(4, 16)], [], False
    rows = run_benchmark(measured, tell=lambda _: None)
    text = write_results(rows, measured, tmp_path)
    assert "threads" in text
    assert torch.__version__.split("+")[0] in text
    assert (tmp_path / "results.md").read_text() == text
    record = json.loads((tmp_path / "results.json").read_text())
    assert len(record["rows"]) == len(rows)
    assert record["settings"]["model"]["shape"] == "small"
    assert (tmp_path / "results.csv").read_text().count("\n") == len(rows) + 1


def test_variants_share_weights_and_leave_the_dense_model_alone():
    dense = tiny("llama")
    before = logits(dense, ids())
    for name in ("PP", "static PPsp", "Full-Batch Probing"):
        copied = pruned_copy(dense, VARIANTS[name], statistics("llama"), **SETTINGS)
        assert copied.model.embed_tokens.weight.data_ptr() == dense.model.embed_tokens.weight.data_ptr()
        assert not torch.equal(logits(copied, ids()), before)
    assert torch.equal(logits(dense, ids()), before)
    assert all(layer.self_attn.o_proj.weight.is_contiguous() for layer in dense.model.layers)


def test_variants_share_what_they_can_with_each_other(measured):
    """Dynamic ones the output matrices by columns, the compiled static one its slices; histories are everyone's own."""
    benchmarked = BenchmarkModel(measured, "float32", 0.4)
    names = ("PP", "PP, compiled", "Full-Batch Probing", "static PPsp", "static PPsp, compiled")
    models = {name: benchmarked.variant(VARIANTS[name]) for name in names}
    layer = {name: model.model.layers[1] for name, model in models.items()}
    weights = [layer[name].mlp.down_proj.weight.data_ptr() for name in names]
    assert weights[0] == weights[1] == weights[2] != benchmarked.model.model.layers[1].mlp.down_proj.weight.data_ptr()
    assert weights[3] == weights[4] != weights[0]
    assert not layer["PP"].mlp.down_proj.weight.is_contiguous()
    histories = {layer[name].mlp.pruner.history.data_ptr() for name in ("PP", "PP, compiled")}
    assert len(histories) == 2
    expected = pruned_copy(
        benchmarked.model, VARIANTS["PP"], benchmarked.statistics, pruning_ratio=0.4, skip_layers=(), round_to=16
    )
    assert torch.equal(logits(models["PP, compiled"], ids()), logits(expected, ids()))


@pytest.mark.slow
def test_the_embedded_model_on_text(measured, monkeypatch):
    """Its embeddings are tied, as those of many checkpoints are."""
    eager(monkeypatch)
    text = Path(__file__).parents[2] / "LICENSE"
    measured.model, measured.text = ModelChoice(path=str(EMBEDDED_MODEL)), str(text)
    measured.cases, measured.decode, measured.variants, measured.repeats = [Case(2, 16)], [1], ["all"], 1
    rows = run_benchmark(measured, tell=lambda _: None)
    perplexity = {row.variant: row.perplexity for row in rows if row.part == "model"}
    assert perplexity.keys() == {name for name, one in VARIANTS.items() if one.whole and not one.compiled}
    decoded = {row.variant for row in rows if row.part == "decoding"}
    assert decoded == {name for name, one in VARIANTS.items() if one.decodes and not one.compiled}
    assert all(value > perplexity["dense"] for name, value in perplexity.items() if name != "dense")
    benchmarked = BenchmarkModel(measured, "float32", 0.4)
    copied = benchmarked.variant(VARIANTS["PP"])
    assert copied.lm_head.weight is copied.model.embed_tokens.weight is benchmarked.model.lm_head.weight


def test_what_was_measured_stays_if_a_later_case_fails(measured, monkeypatch):
    eager(monkeypatch)
    measured.cases, measured.blocks, kept = [Case(4, 16), Case(1, 8)], False, []
    monkeypatch.setattr("pp_lightning.benchmark.run.decoding_rows", lambda *_: pytest.fail("an error of the device"))
    with pytest.raises(pytest.fail.Exception):
        run_benchmark(measured, tell=lambda _: None, keep=lambda rows: kept.append([*rows]))
    assert [len({(row.rows, row.tokens) for row in rows}) for rows in kept] == [1, 2]


def test_no_peak_is_no_reason_to_stop(measured, monkeypatch):
    eager(monkeypatch)
    measured.cases, measured.decode, measured.blocks, measured.memory = [Case(4, 16)], [], False, True
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="out of memory")
    monkeypatch.setattr("pp_lightning.benchmark.memory.subprocess.run", lambda *_, **__: failed)
    told = []
    rows = run_benchmark(measured, told.append)
    assert all(row.peak_megabytes is None for row in rows)
    assert any("out of memory" in line for line in told)


def test_all_runners_have_their_turn_on_every_batch():
    turns = []

    def runner(name):
        def run(index):
            turns.append((name, index))
            return {"part": 1.0}

        return run

    samples = interleaved({"a": runner("a"), "b": runner("b")}, rounds=5, batches=3, models={})
    assert turns == [(name, i % 3) for i in range(5) for name in "ab"]
    assert samples["a"].seconds == {"part": [1.0] * 5}


def test_ratios_are_taken_round_by_round():
    assert paired_ratio([1.0, 10.0, 2.0], [2.0, 20.0, 2.0]) == 0.5
    assert reference_of(VARIANTS["PP, compiled"]) == "dense, compiled"
    assert reference_of(VARIANTS["PP"]) == "dense"


def test_tables_hold_every_row():
    row = Row("PP", "decoder", "float32", 4, 16, 0.4, 1.0, 0.5, 2.0, 3, 0.7, 0.5, 100.0, changed=0.25)
    text = markdown(grids([row]), "caption")
    assert "1.40" in text and "25.0%" in text and "| variant | part |" in text and "| --- | --- | ---: |" in text
    assert comma_separated([row.as_dict()]).splitlines()[1].startswith("PP,decoder")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batches": 3}, "at least 8"),
        ({"repeats": 0}, "at least 1"),
        ({"cases": []}, "cases"),
        ({"mode": "reduce-overhead", "warmup": 2}, "warmup to at least 3"),
        ({"model": {"path": "somewhere"}}, "--text"),
        ({"nonsense": 1}, "there is no setting"),
        ({"cases": [{"rows": 1}]}, "cannot read"),
        ({"model": {"shape": "nothing"}}, "there is no shape"),
        ({"variants": ["nothing"]}, "there is no variant"),
    ],
)
def test_mistakes_are_one_line(values, message):
    with pytest.raises(UserError, match=message):
        run_benchmark(BenchmarkSettings.from_plain(values), tell=lambda _: None)


def test_both_dense_rows_are_always_there():
    assert set(chosen_variants(["PP"])) == {"dense", "dense, compiled", "PP"}
    assert list(chosen_variants(["all"])) == list(VARIANTS)


@pytest.mark.slow
def test_it_runs_where_lightning_is_not_installed(tmp_path):
    """And measures memory in processes of their own."""
    config = tmp_path / "config.yaml"
    config.write_text(
        "model: {shape: llama-2048, layers: 1}\ncases: [{rows: 1, tokens: 8}]\nvariants: [PP]\nrepeats: 1\nwarmup: 1\n"
        "blocks: false\nmemory: true\n"
    )
    code = (
        "import runpy, sys\n"
        "for name in ('lightning', 'pytorch_lightning', 'jsonargparse', 'torchmetrics', 'matplotlib', 'datasets'):\n"
        "    sys.modules[name] = None\n"
        f"sys.argv = ['benchmark', '--config', {str(config)!r}, '--out', {str(tmp_path)!r}]\n"
        "runpy.run_module('pp_lightning.benchmark', run_name='__main__')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    peaks = {row["variant"]: row["peak_megabytes"] for row in rows if row["part"] == "model"}
    assert all(peak > 600 for peak in peaks.values()), "the weights alone have more"
    assert {row["graphs"] for row in rows if row["variant"] == "dense, compiled" and row["part"] == "model"} == {1}


def test_types_without_arithmetic_are_left_out(measured, monkeypatch):
    eager(monkeypatch)
    measured.cases, measured.decode, measured.blocks, measured.variants = [Case(4, 16)], [], False, ["PP"]
    measured.dtypes = ["float32", "bfloat16"]
    monkeypatch.setattr("pp_lightning.benchmark.run.is_emulated", lambda dtype, device: dtype == torch.bfloat16)
    told = []
    assert {row.dtype for row in run_benchmark(measured, told.append)} == {"float32"}
    assert "bfloat16 is left out" in told[0]
    measured.emulated = True
    assert {row.dtype for row in run_benchmark(measured, told.append)} == {"float32", "bfloat16"}
    measured.emulated, measured.dtypes = False, ["bfloat16"]
    with pytest.raises(UserError, match="add float32 to dtypes"):
        run_benchmark(measured, told.append)


def test_methods_by_the_names_that_they_have_elsewhere():
    found = chosen_variants(["flap", "best"])
    assert list(found) == ["dense", "dense, compiled", "flap", "flap, compiled", "best", "best, compiled"]
    assert found["flap"].method.label == "flap" and found["flap, compiled"].compiled
    for name, says in (("flapp", "did you mean flap"), ("lora_prune", "chooses from importances")):
        with pytest.raises(UserError, match=says):
            chosen_variants([name])
