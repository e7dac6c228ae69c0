"""From how many tokens on a probe pays: measured, written beside the statistics, and read by ``prefill auto``."""

import json

import pytest

from pp_lightning import UserError
from pp_lightning.benchmark.break_even import first_that_pays, measure_break_even
from pp_lightning.benchmark.settings import BenchmarkSettings, Case
from pp_lightning.prefill import BreakEven, break_even_file

SECONDS = {16: {"dense": 1.0, "probe": 1.4}, 32: {"dense": 2.0, "probe": 1.9}, 64: {"dense": 4.0, "probe": 3.0}}


def test_no_longer_prompt_is_slower():
    assert first_that_pays(SECONDS) == 32
    assert first_that_pays({**SECONDS, 48: {"dense": 3.0, "probe": 3.1}}) == 64
    assert first_that_pays({**SECONDS, 128: {"dense": 8.0, "probe": 9.0}}) is None


def test_it_is_measured_and_kept(small, tmp_path):
    settings = BenchmarkSettings(
        model=small, cases=[Case(2, 20)], variants=[], round_to=16, repeats=2, warmup=1, memory=False, device="cpu"
    )
    found = measure_break_even(settings, tell=lambda _: None)
    assert sorted(found.seconds) == [16, 32]
    assert all(value > 0 for times in found.seconds.values() for value in times.values())
    file = tmp_path / "even.json"
    file.write_text(json.dumps(found.as_dict()))
    assert BreakEven.load(file).tokens == found.tokens
    assert BreakEven.load(file).prefill == ("dense" if found.tokens is None else found.tokens)


def test_single_rows_are_refused(small):
    with pytest.raises(UserError, match="one row never pays"):
        measure_break_even(BenchmarkSettings(model=small, cases=[Case(1, 40)], device="cpu"), tell=lambda _: None)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"form": "pp-lightning break-even 1", "tokens": "x"}', "\x00"])
def test_other_files_are_refused(text, tmp_path):
    (tmp_path / "even.json").write_text(text)
    with pytest.raises(UserError, match="is not a break-even file"):
        BreakEven.load(tmp_path / "even.json")


def test_it_lies_beside_the_statistics(tmp_path):
    assert break_even_file(tmp_path / "a.b.safetensors") == tmp_path / "a.b.break-even.json"
