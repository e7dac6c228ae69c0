"""``make demo``: both kinds of text, words for what was found, and a table that fits."""

import re

import pytest

from pp_lightning.app import demo


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A smaller run than the demo's."""
    sizes = {"window": 32, "batch_size": 4, "calibration_samples": 8, "limit_tokens": 1536}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "METHODS", ["flap", "best", "static_best"])
        return demo.compared(tmp_path_factory.mktemp("out"), **sizes)


@pytest.mark.slow
def test_two_kinds_of_text_under_the_continuation_protocol(rows):
    assert list(rows) == ["documentation", "code"]
    for found in rows.values():
        assert [row.evaluation.method for row in found] == ["dense", "flap", "best", "static_best"]
        assert all(row.evaluation.flops.after_prompt < 1 for row in found[1:])
    dense = {text: found[0].evaluation.perplexity for text, found in rows.items()}
    assert dense["code"] > 1.3 * dense["documentation"]  # the model was trained on documentation


@pytest.mark.slow
def test_what_it_prints(rows, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "compared", lambda out: rows)
    demo.main(["--out", str(tmp_path)])
    lines = capsys.readouterr().out.rstrip().splitlines()
    assert "minute" in "\n".join(lines[:4])  # at once, before any work
    assert max(len(line) for line in lines if line[:1] in "┏┃┡│└") <= 100
    best, saved, picture = lines[-3:]
    for text, found in rows.items():
        first = min(found[1:], key=lambda row: row.evaluation.perplexity)
        assert f"{demo.name_of(first.evaluation.method)} on {text} (+{first.degradation:.1f}" in best
    assert re.search(r"\d\d% of the FLOPs, -?\d+% of the time", saved)
    assert str(tmp_path / "demo.png") in picture
    assert {path.name for path in tmp_path.iterdir()} == {"demo.md", "demo.json", "demo.png"}


@pytest.mark.slow
def test_labels_of_the_picture_do_not_overlap(rows, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: saved.append(figure))
    demo.plot(rows, tmp_path / "demo.png")
    [figure] = saved
    figure.canvas.draw()
    texts = [text for axes in figure.axes for text in (*axes.texts, *axes.get_yticklabels(), axes.title)]
    boxes = [text.get_window_extent() for text in texts if text.get_text() and text.get_visible()]
    assert len(boxes) >= 8
    assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]


def test_a_place_that_cannot_be_written_to_is_one_line(tmp_path, capsys, monkeypatch):
    from pp_lightning.__main__ import main

    (tmp_path / "file").write_text("")
    monkeypatch.setattr("sys.argv", ["pp-lightning", "demo", "--out", str(tmp_path / "file" / "out")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and "name another place with --out" in printed.err and not printed.out
