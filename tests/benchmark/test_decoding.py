"""Decoders of the benchmark. Compiling is tested elsewhere: here graphs are replaced by what they are made from."""

import pytest
import torch

from pp_lightning.benchmark import run_benchmark
from pp_lightning.benchmark.decoding import EagerDecoder, GraphDecoder
from pp_lightning.benchmark.settings import BenchmarkSettings, Case
from pp_lightning.methods import FullBatchProbing, WandaSP
from tests.models import ids
from tests.test_generation import pruned

PROMPT, NEW = 64, 6


@pytest.fixture(autouse=True)
def without_compiling(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@torch.inference_mode()
def decoded(decoder, prompt):
    """Logits of all the tokens after a prompt, (B, NEW, V)."""
    cache, found = decoder.empty_cache(), []
    token = decoder.model(input_ids=prompt, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
    for number in range(NEW):
        found.append(decoder.logits(token, cache, number))
        token = found[-1].argmax(-1)
    return torch.cat(found, 1)


@pytest.mark.parametrize("name", ["llama_gqa", "opt"])
@pytest.mark.parametrize("method", [FullBatchProbing, WandaSP])
def test_both_decoders_say_the_same(name, method):
    """A mask or a position that is off by one would change the logits."""
    eager, graph = (pruned(name, method=method) for _ in range(2))
    graph = GraphDecoder(graph, 2, PROMPT, NEW, "default")
    for seed in (1, 2):
        prompt = ids(2, PROMPT, seed)
        expected = decoded(EagerDecoder(eager), prompt)
        torch.testing.assert_close(decoded(graph, prompt), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compiled", [True, False])
def test_rows_of_compiled_variants(small, compiled):
    settings = BenchmarkSettings(
        model=small,
        cases=[Case(2, 8)],
        variants=["PP", "PP, compiled"],
        round_to=16,
        repeats=1,
        warmup=1,
        decode=[2],
        decode_tokens=2,
        decode_compiled=compiled,
        memory=False,
        blocks=False,
        device="cpu",
    )
    rows = run_benchmark(settings, tell=lambda _: None)
    decoding = {row.variant: row for row in rows if row.part == "decoding"}
    eager = {"dense", "PP"}
    assert set(decoding) == (eager | {"dense, compiled", "PP, compiled"} if compiled else eager)
    assert {row.variant for row in rows if row.part == "prompt"} == eager
    if compiled:
        assert decoding["dense, compiled"].time_ratio == 1.0, "compiled ones stand against the compiled dense one"
        assert decoding["PP, compiled"].flops_ratio == decoding["PP"].flops_ratio < 1.0
