"""``pp-lightning prune`` as a user types it."""

import json

import pytest

import pp_lightning.updating as updating_module
from tests.app.test_cli import refused


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "trust"), [("per-layer", True), ("uniform", False)])
def test_one_command_prunes_evaluates_and_writes_what_transformers_loads(
    type_in, asked, tmp_path, capsys, stock_perplexity, layout, trust
):
    out = tmp_path / "out"
    given = {**asked, "--target": "params=0.8", "--layout": layout, "--out": out}
    assert type_in("prune", given) == 0
    record = json.loads((out / "pruning.json").read_text())
    before, after = (record["evaluation"][row] for row in ("dense", "pruned"))
    assert (
        after["method"] == record["pruning"]["method"] == "static_best" and before["perplexity"] != after["perplexity"]
    )
    assert stock_perplexity(out, trust) == pytest.approx(after["perplexity"], rel=1e-4)
    printed = capsys.readouterr().out
    assert "about" in printed and "minutes" in printed  # before anything is done
    assert ("10 blocks pruned alone on 128 tokens" in printed) == (layout == "per-layer")
    assert f"{before['perplexity']:.2f} dense, {after['perplexity']:.2f} pruned" in printed
    assert not (tmp_path / "out.unfinished").exists()


@pytest.mark.slow
def test_an_interrupted_run_leaves_no_folder_and_goes_on(type_in, asked, tmp_path, monkeypatch):
    out, real, calls = tmp_path / "out", updating_module.solve_kept, []
    given = {**asked, "--target": "params=0.8", "--out": out}

    def dies(*args):
        calls.append(1)
        if len(calls) == 3:
            raise SystemExit(130)
        return real(*args)

    monkeypatch.setattr(updating_module, "solve_kept", dies)
    assert type_in("prune", given) == 130
    assert not out.exists() and (tmp_path / "out.unfinished").exists()
    first = len(calls) - 1
    calls.clear()
    monkeypatch.setattr(updating_module, "solve_kept", lambda *args: calls.append(1) or real(*args))
    assert type_in("prune", given) == 0
    assert first == 2 and len(calls) > 0
    resumed = len(calls)
    calls.clear()
    assert type_in("prune", {**given, "--out": tmp_path / "fresh"}) == 0
    assert len(calls) == resumed + first
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "fresh" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"--target": "0.6"}, "target must be"),
        ({"--target": "params=0.01"}, "the most that can go"),
        ({"--model.method": "ProbePruning"}, "chooses per batch"),
        ({"--data.calibration": "TextFile", "--data.calibration.path": "/nowhere.txt"}, "nowhere"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(type_in, asked, tmp_path, capsys, changes, words):
    out = tmp_path / "out"
    given = {"--target": "params=0.8", **asked, "--out": out} | changes
    assert type_in("prune", given) == 2
    assert words in refused(capsys)
    assert not out.exists() and not (tmp_path / "out.unfinished").exists()


def test_an_update_is_a_row_like_others(type_in, asked, tmp_path):
    out = tmp_path / "out"
    given = {**asked, "--methods": "[wanda_sp,wanda_sp_updated,static_best]", "--ratios": "[0.4]", "--out": out}
    assert type_in("compare", given) == 0
    rows = {row["method"]: row for row in json.loads((out / "results.json").read_text())["rows"]}
    assert rows["wanda_sp_updated"]["settings"]["update"] == "least_squares"
    assert rows["wanda_sp_updated"]["perplexity"] != rows["wanda_sp"]["perplexity"]
    assert rows["wanda_sp_updated"]["flops_ratio"] == rows["wanda_sp"]["flops_ratio"]
    alone = {**asked, "--model.method": "WandaSP", "--model.update": "least_squares", "--model.pruning_ratio": 0.4}
    assert type_in("test", {**alone, "--out": tmp_path / "alone"}) == 0
    (row,) = json.loads((tmp_path / "alone" / "results.json").read_text())["rows"]
    assert row["perplexity"] == rows["wanda_sp_updated"]["perplexity"]
