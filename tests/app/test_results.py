"""Figures derived from an evaluation, and tables that show them."""

import csv
import io
import json

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pp_lightning.app.pictures import perplexity_axis, plot
from pp_lightning.app.report import HEADINGS, grids, lines_of, show
from pp_lightning.app.results import Comparison, Evaluation, FlopsRatios, Timing
from pp_lightning.records import write_json, write_text
from pp_lightning.tables import comma_separated, markdown


def evaluation(method, ratio, perplexity, flops, milliseconds, kept=None):
    return Evaluation(
        method=method,
        pruning_ratio=ratio,
        perplexity=perplexity,
        tokens=1000,
        flops=FlopsRatios(flops, flops - 0.01, 0.0),
        time=Timing.of(milliseconds),
        kept=kept or {},
    )


DENSE = evaluation("dense", 0.0, 10.0, 1.0, [500.0, 100.0, 90.0, 120.0])
PRUNED = evaluation("pp", 0.4, 16.0, 0.6, [300.0, 80.0, 75.0, 85.0], {"attention": (4, 4), "mlp": (192, 256)})
ROWS = [Comparison.of(DENSE, DENSE), Comparison.of(PRUNED, DENSE)]


def test_timing_leaves_the_warm_up_out():
    assert DENSE.time == Timing(median=100.0, fastest=90.0, slowest=120.0, batches=3)
    assert Timing.of([7.0]) == Timing(7.0, 7.0, 7.0, 1)
    assert Timing.of([9.0, 1.0, 3.0]).median == 2.0


def test_comparison_with_dense():
    row = ROWS[1]
    assert row.degradation == 6.0
    assert row.time_ratio == pytest.approx(0.8)
    assert row.efficiency == pytest.approx(0.6 / 0.8)
    assert row.prr == pytest.approx(6.0 / 20.0)


def test_no_prr_where_no_time_is_saved():
    slower = evaluation("full_batch", 0.4, 12.0, 1.1, [0.0, 150.0])
    assert Comparison.of(slower, DENSE).prr is None


def test_markdown_has_every_row_and_the_caption():
    text = markdown(grids(ROWS), "machine, dtype")
    lines = text.splitlines()
    columns = len(HEADINGS) - 2  # one seed, and nothing followed a prompt
    assert lines[0].count("|") == columns + 1 and "after the prompt" not in text and "above the first" not in text
    assert all(line.count("|") == columns + 1 for line in lines[:4])
    assert (
        "| Probe Pruning | 40% | 16.00 | +6.00 | 0.600 | 0.800 | 0.75 | 0.3 | 80.0 (75.0-85.0) | 4 | 192-256 |" in text
    )
    assert lines[-1] == "machine, dtype"


def test_terminal_table_is_whole_on_a_narrow_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    show(grids(ROWS), "caption")
    printed = capsys.readouterr().out
    assert all(cell in printed for cell in ("Probe Pruning", "+6.00", "80.0 (75.0-85.0)", "192-256", "caption"))


def test_csv_holds_unrounded_figures():
    rows = list(csv.DictReader(io.StringIO(comma_separated([line for row in ROWS for line in lines_of(row)]))))
    assert [row["method"] for row in rows] == ["dense", "pp"]
    assert float(rows[1]["efficiency"]) == ROWS[1].efficiency
    assert (rows[1]["mlp_kept_min"], rows[1]["mlp_kept_max"]) == ("192", "256")
    assert rows[0]["mlp_kept_min"] == ""


def test_plot_is_a_png(tmp_path):
    plot(ROWS, "caption", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_files_are_whole_or_absent(tmp_path):
    target = tmp_path / "new" / "results.json"
    write_json(target, {"rows": [row.as_dict() for row in ROWS]})
    assert json.loads(target.read_text())["rows"][1]["perplexity"] == 16.0
    with pytest.raises(TypeError):
        write_text(target, 3)  # type: ignore[arg-type]
    assert json.loads(target.read_text())["rows"][1]["perplexity"] == 16.0


def test_a_row_that_stands_alone_shows_dashes():
    assert "| - |" in markdown(grids([Comparison(PRUNED)]), "")


@pytest.mark.parametrize(("highest", "scale"), [(140.0, "linear"), (5000.0, "log")])
def test_perplexities_are_plain_numbers_on_their_axis(highest, scale):
    figure = Figure()
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([1, 2, 3], [123.0, 125.0, highest])
    perplexity_axis(axes, 123.0, highest)
    figure.draw_without_rendering()
    low, high = axes.get_ylim()
    ticks = zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
    shown = [label.get_text() for at, label in ticks if low <= at <= high]
    assert axes.get_yscale() == scale
    assert len(shown) >= 3
    assert all(float(text) > 0 for text in shown)
